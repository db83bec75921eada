"""An engine in a process of its own, and what happens when it dies.

    service = RemoteService(Start("tiny"), intake, card)
    await service.start()                  # launches the process; ready when its programs are
    stream = await service.submit(request)
    await service.stop(grace_s=30)

A process that dies or hangs is replaced, later and later while that goes on. Requests that had
their first step fail with `UnavailableError`; the others are sent again, once.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from jaxserve.errors import JaxserveError, UnavailableError, UnsupportedError
from jaxserve.serving.engine_child import EngineChild
from jaxserve.serving.intake import Intake
from jaxserve.serving.metrics import MetricsSnapshot
from jaxserve.serving.request import Request
from jaxserve.serving.service import (
    EMPTY_METRICS,
    REASONS,
    Load,
    ModelCard,
    State,
    check_ready,
    load_of,
)
from jaxserve.serving.streams import Streams, TokenStream
from jaxserve.serving.wire import (
    Abort,
    Admitted,
    Beat,
    Events,
    Failed,
    Finish,
    FromEngine,
    Lost,
    Measure,
    Phase,
    Ready,
    Refused,
    Start,
    Started,
    Submit,
    Trace,
    Traced,
    error_of,
)

COMMAND = (sys.executable, "-m", "jaxserve.serving.engine_process")
MEASURE_S = 1.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Backoff:
    """How long to wait before an engine is started again.

    Attributes:
        first_s, most_s: after the first failure, and at most; each wait is twice the last.
        healthy_s: an engine that served so long has made good for those before it.
    """

    first_s: float = 0.25
    most_s: float = 30.0
    healthy_s: float = 60.0

    def wait_s(self, failures: int) -> float:
        """Returns the wait after so many failures in a row, at least 1."""
        return min(self.first_s * 2.0 ** (failures - 1), self.most_s)


@dataclass(eq=False)
class _Sent:
    """A request at the engine; the supervisor alone writes it.

    Attributes:
        admission: resolves when the engine has taken it.
        started: it had its first step; then it is not sent again.
        again: it was sent again.
    """

    request: Request
    stream: TokenStream
    admission: asyncio.Future[None]
    started: bool = False
    again: bool = False


class RemoteService:
    """A `Service` whose engine runs in a child process.

    Args:
        launch: which engine.
        command: words that start the process.
        backoff: waits before restarts.

    Attributes:
        card, intake: of the model.
        restarts: how often the engine was started again.
    """

    def __init__(
        self,
        launch: Start,
        intake: Intake,
        card: ModelCard,
        command: Sequence[str] = COMMAND,
        backoff: Backoff | None = None,
    ) -> None:
        self.card = card
        self.intake = intake
        self.restarts = 0
        self._launch = launch
        self._command = command
        self._backoff = backoff or Backoff()
        self._streams = Streams(self.abort, self._finish)
        self._sent: dict[str, _Sent] = {}
        self._child: EngineChild | None = None
        self._supervision: asyncio.Task[None] | None = None
        self._ready: asyncio.Future[None] | None = None
        self._up = self._draining = self._stopped = False
        self._phase = ""
        self._trouble = self._last_words = ""
        self._info: dict[str, Any] = {}
        self._metrics: MetricsSnapshot = EMPTY_METRICS
        self._measured: asyncio.Event = asyncio.Event()
        self._traces: dict[int, asyncio.Future[Traced]] = {}
        self._num_traces = 0

    @property
    def state(self) -> State:
        """Returns whether requests are taken."""
        if self._stopped:
            return State.DEAD
        if self._draining:
            return State.DRAINING
        if self._up:
            return State.READY
        return State.DEAD if self._trouble else State.STARTING

    @property
    def reason(self) -> str:
        """Returns why they are not."""
        state = self.state
        if self._trouble and state is State.DEAD and not self._stopped:
            return f"the engine failed ({self._trouble}) and is started again"
        if state is State.STARTING and self._phase:
            return f"the engine starts (phase: {self._phase})"
        return REASONS[state]

    @property
    def failed(self) -> bool:
        """Returns whether the engine was lost and is not back."""
        return bool(self._trouble)

    @property
    def engine_pid(self) -> int | None:
        """Returns the number of the engine's process, if there is one."""
        return None if self._child is None else self._child.pid

    async def start(self) -> None:
        """Returns once the engine takes requests.

        Raises:
            JaxserveError: it cannot be made.
        """
        if self._ready is None:
            self._ready = asyncio.get_running_loop().create_future()
            self._supervision = asyncio.create_task(self._supervise())
        try:
            await asyncio.shield(self._ready)
        except BaseException:
            await self.stop()
            raise

    async def launch(self) -> asyncio.Task[None]:
        """Returns the start, once the process runs: what else is to be done can be done beside."""
        start = asyncio.create_task(self.start())
        while self._child is None and not start.done():
            await asyncio.sleep(0.001)
        return start

    async def submit(self, request: Request, deadline_s: float | None = None) -> TokenStream:
        """Returns the events of a request, once it is admitted."""
        check_ready(self)
        wait_s = self._metrics.gauges.get("expected_wait_s", 0.0)
        self._streams.check_deadline(deadline_s, wait_s)
        stream = self._streams.open(request, deadline_s)
        admission = asyncio.get_running_loop().create_future()
        sent = self._sent[request.id] = _Sent(request, stream, admission)
        stream.when_over(lambda: self._over(sent))
        self._send(Submit(request))
        try:
            await sent.admission
        except BaseException:
            stream.close()
            raise
        return stream

    def abort(self, request_id: str) -> None:
        """Ends a request by the next step."""
        self._send(Abort(request_id))

    async def load(self) -> Load:
        """Returns how busy the engine is, asked of it now."""
        if self._up:
            self._measured.clear()
            self._send(Measure())
            try:
                await asyncio.wait_for(self._measured.wait(), MEASURE_S)
            except TimeoutError:
                _log.warning("the engine does not tell its load; the last known one is given")
        return load_of(self._metrics)

    async def server_info(self) -> dict[str, Any]:
        """Returns what the engine told when it was ready."""
        return self._info | {"engine_restarts": self.restarts}

    def metrics(self) -> MetricsSnapshot:
        """Returns what the engine last told, about a second ago."""
        counters = self._metrics.counters | {"engine_restarts": self.restarts}
        return msgspec.structs.replace(self._metrics, counters=counters)

    async def profile(self, seconds: float) -> str:
        """Returns the folder of a trace of the next seconds."""
        check_ready(self)
        self._num_traces += 1
        number = self._num_traces
        done = self._traces[number] = asyncio.get_running_loop().create_future()
        self._send(Trace(number, seconds))
        try:
            traced = await asyncio.wait_for(done, seconds + 60.0)
        finally:
            del self._traces[number]
        if traced.folder is None:
            raise UnsupportedError(traced.message)
        return traced.folder

    def drain(self) -> None:
        """Takes no more requests; those under way go on."""
        self._draining = True

    async def stop(self, grace_s: float = 0.0) -> None:
        """Ends the engine's process."""
        self.drain()
        if self._up:
            await self._streams.empty(grace_s)
        self._stopped = True
        stopped = UnavailableError("the server stopped before this was answered")
        self._fail_open(stopped)
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(stopped)
            self._ready.exception()  # seen, whether or not `start` still waits
        if self._supervision is not None:
            self._supervision.cancel()
            await asyncio.gather(self._supervision, return_exceptions=True)
        if self._child is not None:
            await self._child.stop()
            self._child = None

    # Supervision.

    async def _supervise(self) -> None:
        """Keeps an engine running until the service stops."""
        failures = 0
        while True:
            began = time.monotonic()
            try:
                self._child = await EngineChild.launch(self._command, self._launch, self._receive)
                how = await self._child.ended
            except OSError as error:
                how = f"it could not be launched: {error.strerror}"
            first = self._ready is not None and not self._ready.done()
            self._lose(self._last_words or how)
            self._last_words = ""
            if self._child is not None:
                self._child.kill()
                await self._child.close()
                self._child = None
            if first:  # it never served: its error is the caller's
                return
            healthy = time.monotonic() - began > self._backoff.healthy_s
            failures = 1 if healthy else failures + 1
            wait_s = self._backoff.wait_s(failures)
            _log.info("the engine starts again in %.2f s", wait_s)
            await asyncio.sleep(wait_s)
            self.restarts += 1

    def _lose(self, how: str) -> None:
        """Deals with the end of an engine."""
        self._up = False
        self._trouble = self._trouble or how
        _log.error("the engine is lost: %s", how, extra={"open_requests": len(self._sent)})
        assert self._ready is not None
        if not self._ready.done():
            self._ready.set_exception(
                JaxserveError(f"the engine ended while it started: {how}; its log tells why")
            )
        lost = UnavailableError(f"the engine failed ({how}) while this was answered; send it again")
        for sent in list(self._sent.values()):
            if sent.started or sent.again:
                sent.stream.fail(lost)
            else:
                sent.again = True
        for done in self._traces.values():
            if not done.done():
                done.set_result(Traced(0, None, "the engine failed while it was traced"))

    def _over(self, sent: _Sent) -> None:
        """Forgets a request that is over, one that waits for its admission too."""
        self._sent.pop(sent.request.id, None)
        if sent.admission.done():
            return
        if sent.stream.error is not None:
            sent.admission.set_exception(sent.stream.error)
        else:  # a short answer may overtake the news that it is admitted
            sent.admission.set_result(None)

    def _fail_open(self, error: JaxserveError) -> None:
        for sent in list(self._sent.values()):
            sent.stream.fail(error)

    def _send(self, message: Any) -> None:
        if self._up and self._child is not None:
            self._child.send(message)

    def _finish(self, request_id: str, sample_index: int, num_tokens: int) -> None:
        self._send(Finish(request_id, sample_index, num_tokens))

    # Messages of the engine.

    def _receive(self, message: FromEngine) -> None:
        match message:
            case Events(events):
                self._streams.route(events)
            case Beat(_, _, metrics):
                if metrics is not None:
                    self._metrics = metrics
                    self._measured.set()
            case Admitted(request_id):
                if (sent := self._sent.get(request_id)) is not None and not sent.admission.done():
                    sent.admission.set_result(None)
            case Started(request_ids):
                for request_id in request_ids:
                    if (sent := self._sent.get(request_id)) is not None:
                        sent.started = True
            case Refused(request_id, error, text, retry_after_s):
                if (sent := self._sent.get(request_id)) is not None:
                    sent.stream.fail(error_of(error, text, retry_after_s))
            case Ready(info, startup_seconds):
                self._serve(info, startup_seconds)
            case Phase(name):
                self._phase = name
                _log.info("the engine starts: %s", name)
            case Failed(error, text):
                # Anyone may ask after the health, and the text may hold paths.
                self._trouble = "it cannot be made; the log tells why"
                _log.error("the engine cannot be made: %s", text)
                if self._ready is not None and not self._ready.done():
                    self._ready.set_exception(error_of(error, text))
            case Lost(text):
                self._last_words = text
            case Traced(number):
                if (done := self._traces.get(number)) is not None and not done.done():
                    done.set_result(message)

    def _serve(self, info: dict[str, Any], startup_seconds: dict[str, float]) -> None:
        """Begins to send requests to an engine that is ready; those of its predecessor first."""
        self._info = info | {"startup_seconds": startup_seconds}
        self._up, self._phase, self._trouble = True, "", ""
        for sent in self._sent.values():
            self._send(Submit(sent.request))
        if self._ready is not None and not self._ready.done():
            self._ready.set_result(None)
