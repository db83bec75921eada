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

from jaxserve.errors import JaxserveError, UsageError
from jaxserve.serving import logs
from jaxserve.serving.engine import Engine
from jaxserve.serving.made import Build, Follows, Made
from jaxserve.serving.metrics import MetricsSnapshot, snapshot
from jaxserve.serving.multihost.ranks import Ranks, end_process
from jaxserve.serving.outlet import Outlet
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
    Left,
    Lost,
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


class EngineProcess:
    """Serves one socket until it closes or the server says stop."""

    def __init__(self, sock: socket.socket, build: Build) -> None:
        self._sock = sock
        self._build = build
        self._outlet = Outlet(sock)
        self._started: queue.SimpleQueue[Start] = queue.SimpleQueue()
        self._ended = threading.Event()
        self._made: Made | None = None
        self._follows: Follows | None = None
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
            made = self._build(start, self._enter, self._join)
            if isinstance(made, Made):
                self._enter("first request")
                _first_request(made.engine)
        except Exception as error:
            _log.exception("the engine cannot be made")
            self._fail(error)
            return 1
        self._enter(None)
        _settle()
        if isinstance(made, Follows):
            return self._follow(made)
        made.engine.after_events = self._hand_over
        made.engine.before_start = lambda ids: self._tell(Started(ids))
        made.engine.start()
        self._made = made
        self._send_beat(0.0, measured=True)
        self._tell(Ready(made.info, self._startup_seconds))
        self._ended.wait()
        made.engine.stop()
        if made.ranks is not None:
            made.ranks.leave()
        self._outlet.drain(1.0)
        return 0

    def _follow(self, made: Follows) -> int:
        """Returns the exit status, once the group has ended in good order."""
        # Kept: letting go of programs takes longer than rank 0 takes to end, and JAX aborts a
        # process that outlives it.
        self._follows = made
        self._tell(Ready(made.info, self._startup_seconds))
        made.follow()
        self._tell(Left())
        self._outlet.drain(1.0)
        made.ranks.leave()  # last, since rank 0 waits for it
        return 0

    def _join(self, ranks: Ranks) -> None:
        """Belongs to a group from now on: its end is told, while this process starts too."""
        ranks.on_lost = self._lose

    def _lose(self, reason: str) -> None:
        """Ends the process whose group is lost: what a step waits for never comes."""
        self._tell(Lost(reason))
        self._outlet.drain(1.0)
        end_process(reason)

    def _tell(self, message: FromEngine) -> None:
        self._outlet.send(frame(message))

    def _enter(self, name: str | None) -> None:
        """Notes that a phase of the start is over and another begins."""
        now = time.perf_counter()
        if self._phase is not None:
            self._startup_seconds[self._phase[0]] = now - self._phase[1]
        self._phase = None if name is None else (name, now)
        if name is not None:
            self._tell(Phase(name))

    def _fail(self, error: Exception) -> None:
        kind, message, _ = error_fields(error)
        self._tell(Failed(kind, message))
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
                if self._made is None:  # it starts, or follows; nobody would look
                    os._exit(0)

    @property
    def _engine(self) -> Engine:
        assert self._made is not None, "requests come after Ready"
        return self._made.engine

    def _submit(self, request: Request) -> None:
        try:
            self._engine.submit(request, self._outbox_append)
        except JaxserveError as error:
            self._tell(Refused(request.id, *error_fields(error)))
        else:
            self._tell(Admitted(request.id))

    def _trace(self, asked: Trace) -> None:
        assert self._made is not None
        if self._made.trace is None:
            self._tell(Traced(asked.number, None, "this engine runs nothing to trace"))
            return
        try:
            self._tell(Traced(asked.number, self._made.trace(asked.seconds)))
        except Exception as error:
            _log.exception("no trace could be taken")
            self._tell(Traced(asked.number, None, f"no trace: {type(error).__name__}"))

    # In the engine's thread.

    def _outbox_append(self, event: TokenEvent) -> None:
        self._outbox.append(event)

    def _hand_over(self) -> None:
        """Sends the events of a step."""
        events, self._outbox = self._outbox, []
        if events:
            self._tell(Events(events))

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
                self._tell(Beat(0.0, LEAST_STALL_S))
                continue
            watch = made.engine.watch
            if watch.busy and watch.number == number:
                age_s += BEAT_S
            else:
                age_s, number = 0.0, watch.number
            if made.ranks is not None and age_s > self._limit_s(made):
                made.ranks.stalled(age_s)  # before the server ends this process, and names nobody
            self._send_beat(age_s, measured=count % MEASURED_BEATS == 0)

    def _send_beat(self, age_s: float, measured: bool) -> None:
        if self._made is None:
            return
        limit_s = self._limit_s(self._made)
        self._tell(Beat(age_s, limit_s, self._measured() if measured else None))

    @staticmethod
    def _limit_s(made: Made) -> float:
        """Returns how long a turn may take."""
        return max(LEAST_STALL_S, STALL_FACTOR * made.engine.watch.slowest_s())

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


def _settle() -> None:
    """Keeps collections short from now on, and gives back what compiling took and left free.

    With glibc that is about half of it.
    """
    gc.collect()
    gc.freeze()  # what is there now stays; no collection walks it again
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

    try:
        status = serve(int(sys.argv[1]), build_model)
    except Exception:
        _log.critical("the engine's process has failed", exc_info=True)
        status = 1
    logging.shutdown()
    sys.stderr.flush()
    os._exit(status)  # no thread of the compiler or the device holds up the end


if __name__ == "__main__":
    main()
