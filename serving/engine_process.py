"""The process in which an engine runs, beside the servers.

    python -m jaxserve.serving.engine_process 7         # 7: an open socket to the server

The first message is `wire.Start`; then come requests. Events of a step go out in one frame, written
by the engine's own thread. When the socket closes, the process ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from jaxserve.errors import JaxserveError, UsageError
from jaxserve.serving import logs
from jaxserve.serving.engine import Engine
from jaxserve.serving.metrics import MetricsSnapshot, snapshot
from jaxserve.serving.request import Request, SamplingParams, TokenEvent
from jaxserve.serving.wire import (
    FROM_SERVER,
    Abort,
    Admitted,
    Beat,
    Events,
    Failed,
    Finish,
    FrameReader,
    FromEngine,
    FromServer,
    Measure,
    Phase,
    Ready,
    Refused,
    Start,
    Started,
    Stop,
    Submit,
    Trace,
    Traced,
    error_fields,
    frame,
)

BEAT_S = 0.25
MEASURED_BEATS = 4
"""Every so many beats carry metrics."""
LEAST_STALL_S = 5.0
STALL_FACTOR = 10.0

_log = logging.getLogger(__name__)


class Made(NamedTuple):
    """An engine that is ready, and what there is to tell of it.

    Attributes:
        info: versions, capacity, memory plan.
        late_compiles: how many programs were compiled since.
        trace: records for so many seconds and returns the folder.
    """

    engine: Engine
    info: dict[str, Any]
    late_compiles: Callable[[], int] = lambda: 0
    trace: Callable[[float], str] | None = None


class Build(Protocol):
    """Makes the engine that a server asks for; `phase` is told what begins."""

    def __call__(self, start: Start, phase: Callable[[str], None]) -> Made: ...


class Outlet:
    """Sends messages, and never waits in the thread that has one to send. Safe from any thread.

    What the socket does not take at once is sent by a thread of its own.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._guard = threading.Condition()
        self._rest = bytearray()
        threading.Thread(target=self._write_on, name="jaxserve-outlet", daemon=True).start()

    def send(self, message: FromEngine) -> None:
        """Sends a message after those before it."""
        data = frame(message)
        with self._guard:
            if self._rest:
                self._rest += data
                return
            try:
                sent = self._sock.send(data, socket.MSG_DONTWAIT)
            except BlockingIOError:
                sent = 0
            except OSError:  # the server is gone; the reader ends the process
                return
            if sent < len(data):
                self._rest += data[sent:]
                self._guard.notify()

    def drain(self, patience_s: float) -> None:
        """Waits until all is sent."""
        with self._guard:
            self._guard.wait_for(lambda: not self._rest, patience_s)

    def _write_on(self) -> None:
        while True:
            with self._guard:
                self._guard.wait_for(lambda: self._rest)
                data = bytes(self._rest)
            try:
                sent = self._sock.send(data)  # blocks; the guard is free
            except OSError:
                return
            with self._guard:
                del self._rest[:sent]
                self._guard.notify_all()


class EngineProcess:
    """Serves one socket until it closes or the server says stop."""

    def __init__(self, sock: socket.socket, build: Build) -> None:
        self._sock = sock
        self._build = build
        self._outlet = Outlet(sock)
        self._started: queue.SimpleQueue[Start] = queue.SimpleQueue()
        self._ended = threading.Event()
        self._made: Made | None = None
        self._startup_seconds: dict[str, float] = {}
        self._phase: tuple[str, float] | None = None
        self._outbox: list[TokenEvent] = []

    def run(self) -> int:
        """Returns the exit status, once the server says stop."""
        threading.Thread(target=self._read, name="jaxserve-reader", daemon=True).start()
        threading.Thread(target=self._beat, name="jaxserve-beat", daemon=True).start()
        start = self._started.get()
        self._startup_seconds["import"] = time.monotonic() - start.launched_s
        logs.set_up(start.log_json, "engine")
        try:
            made = self._build(start, self._enter)
            self._enter("first request")
            _first_request(made.engine)
        except Exception as error:
            _log.exception("the engine cannot be made")
            self._fail(error)
            return 1
        self._enter(None)
        gc.collect()
        gc.freeze()  # what is there now stays; no collection walks it again
        _give_back_memory()
        made.engine.after_events = self._hand_over
        made.engine.before_start = lambda ids: self._outlet.send(Started(ids))
        made.engine.start()
        self._made = made
        self._send_beat(0.0, measured=True)
        self._outlet.send(Ready(made.info, self._startup_seconds))
        self._ended.wait()
        made.engine.stop()
        self._outlet.drain(1.0)
        return 0

    def _enter(self, name: str | None) -> None:
        """Notes that a phase of the start is over and another begins."""
        now = time.perf_counter()
        if self._phase is not None:
            self._startup_seconds[self._phase[0]] = now - self._phase[1]
        self._phase = None if name is None else (name, now)
        if name is not None:
            self._outlet.send(Phase(name))

    def _fail(self, error: Exception) -> None:
        kind, message, _ = error_fields(error)
        self._outlet.send(Failed(kind, message))
        self._outlet.drain(1.0)

    # In the reader's thread.

    def _read(self) -> None:
        """Obeys the server; without one there is nothing to live for."""
        reader = FrameReader(FROM_SERVER)
        try:
            while data := self._sock.recv(1 << 16):
                for message in reader.feed(data):
                    self._obey(message)
        except Exception:
            _log.exception("the connection to the server failed")
        if not self._ended.is_set():
            os._exit(1)

    def _obey(self, message: FromServer) -> None:
        match message:
            case Submit(request):
                self._submit(request)
            case Abort(request_id):
                self._engine.abort(request_id)
            case Finish(request_id, sample_index, num_tokens):
                try:
                    self._engine.finish(request_id, sample_index, num_tokens)
                except UsageError as error:  # nobody waits for an answer
                    _log.warning("a sample goes on: %s", error)
            case Measure():
                self._send_beat(0.0, measured=True)
            case Trace():
                threading.Thread(target=self._trace, args=(message,), daemon=True).start()
            case Start():
                self._started.put(message)
            case Stop():
                self._ended.set()

    @property
    def _engine(self) -> Engine:
        assert self._made is not None, "requests come after Ready"
        return self._made.engine

    def _submit(self, request: Request) -> None:
        try:
            self._engine.submit(request, self._outbox_append)
        except JaxserveError as error:
            self._outlet.send(Refused(request.id, *error_fields(error)))
        else:
            self._outlet.send(Admitted(request.id))

    def _trace(self, asked: Trace) -> None:
        assert self._made is not None
        if self._made.trace is None:
            self._outlet.send(Traced(asked.number, None, "this engine runs nothing to trace"))
            return
        try:
            self._outlet.send(Traced(asked.number, self._made.trace(asked.seconds)))
        except Exception as error:
            _log.exception("no trace could be taken")
            self._outlet.send(Traced(asked.number, None, f"no trace: {type(error).__name__}"))

    # In the engine's thread.

    def _outbox_append(self, event: TokenEvent) -> None:
        self._outbox.append(event)

    def _hand_over(self) -> None:
        """Sends the events of a step."""
        events, self._outbox = self._outbox, []
        if events:
            self._outlet.send(Events(events))

    # In the thread of beats.

    def _beat(self) -> None:
        """Tells now and then how long the loop has been at one turn.

        Time counts by beats: while the whole machine sleeps nothing is late.
        """
        age_s, number, count = 0.0, -1, 0
        while True:
            time.sleep(BEAT_S)
            count += 1
            made = self._made
            if made is None:
                self._outlet.send(Beat(0.0, LEAST_STALL_S))
                continue
            watch = made.engine.watch
            if watch.busy and watch.number == number:
                age_s += BEAT_S
            else:
                age_s, number = 0.0, watch.number
            self._send_beat(age_s, measured=count % MEASURED_BEATS == 0)

    def _send_beat(self, age_s: float, measured: bool) -> None:
        if self._made is None:
            return
        watch = self._made.engine.watch
        limit_s = max(LEAST_STALL_S, STALL_FACTOR * watch.slowest_s())
        self._outlet.send(Beat(age_s, limit_s, self._measured() if measured else None))

    def _measured(self) -> MetricsSnapshot:
        assert self._made is not None
        found = snapshot(self._made.engine.metrics)
        found.counters["compiles_after_ready"] = self._made.late_compiles()
        found.startup_seconds.update(self._startup_seconds)
        return found


def _first_request(engine: Engine) -> None:
    """Serves one short request, which shows that the engine works and warms what is lazy.

    Raises:
        JaxserveError: it fails.
    """
    events: list[TokenEvent] = []
    params = SamplingParams(max_tokens=2, seed=0, temperature=0.0).resolved({})
    engine.submit(Request(id="first", prompt=(1, 2, 3), params=params), events.append)
    while engine.step():
        pass
    if not events or events[-1].finish_reason == "error":
        raise JaxserveError("the engine cannot serve a first request; its log tells why")
    engine.forget_counts()


def _give_back_memory() -> None:
    """Gives what compiling took and left free back to the system: with glibc about half of it."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def serve(fd: int, build: Build) -> int:
    """Returns the exit status of this process, which serves the socket `fd`."""
    # Ctrl-C reaches the whole terminal; the server alone decides what it means, and blocked it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    return EngineProcess(socket.socket(fileno=fd), build).run()


def main() -> None:
    """Runs the engine of a model."""
    from jaxserve.serving.engine_model import build_model

    status = serve(int(sys.argv[1]), build_model)
    logging.shutdown()
    sys.stderr.flush()
    os._exit(status)  # no thread of the compiler or the device holds up the end


if __name__ == "__main__":
    main()
