"""What servers stand on: one model's engine, wherever it runs, seen from an asyncio loop.

    service = LocalService(engine, intake, card)            # or RemoteService, in its own process
    await service.start()
    stream = await service.submit(request)                  # admitted, or an error
    async for events in stream:                             # all that came since the last turn
        ...
    stream.close()                                          # aborts what is not over

`answer.Answer` turns a stream into text. Nothing here imports JAX.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from jaxserve.errors import UnavailableError, UnsupportedError
from jaxserve.serving.intake import Intake
from jaxserve.serving.metrics import MetricsSnapshot, snapshot
from jaxserve.serving.request import Request, TokenEvent
from jaxserve.serving.streams import Streams, TokenStream

if TYPE_CHECKING:
    from jaxserve.serving.engine import Engine


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """What a server tells of its model.

    Attributes:
        name: what requests call it.
        created: Unix time at which the server took it.
        architecture: its family.
        dtype: in which it runs.
        max_context_tokens: longest prompt and completion together.
        vocab_size: all token ids are below.
        num_parameters: number of its weights.
        owner: who serves it.
    """

    name: str
    created: int
    architecture: str
    dtype: str
    max_context_tokens: int
    vocab_size: int
    num_parameters: int
    owner: str = "jaxserve"


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """How busy the engine is.

    Attributes:
        running: sequences with a slot.
        waiting: requests without one.
        waiting_tokens: tokens of their prompts.
        total_pages, free_pages: memory for keys and values; what only the prefix cache holds is
            free.
        generated_tokens: since the start.
        tokens_per_s: generated in the last seconds.
        expected_wait_s: how long a request that comes now will probably wait for a slot.
    """

    running: int
    waiting: int
    waiting_tokens: int
    total_pages: int
    free_pages: int
    generated_tokens: int
    tokens_per_s: float
    expected_wait_s: float = 0.0


class State(StrEnum):
    """Whether a service takes requests: only READY does."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    DEAD = "dead"


class Service(Protocol):
    """An engine as servers see it. All methods are called in the loop that started it.

    Attributes:
        card: of its model.
        intake: makes requests; its tokenizer may be None.
    """

    card: ModelCard
    intake: Intake

    @property
    def state(self) -> State:
        """Returns whether requests are taken."""
        ...

    @property
    def reason(self) -> str:
        """Returns why they are not, for people; empty when they are."""
        ...

    @property
    def failed(self) -> bool:
        """Returns whether the engine was lost and is not back."""
        ...

    async def start(self) -> None:
        """Returns once requests are taken.

        Raises:
            JaxserveError: the engine cannot be started.
        """
        ...

    async def submit(self, request: Request, deadline_s: float | None = None) -> TokenStream:
        """Returns the events of a request, once it is admitted.

        Args:
            deadline_s: seconds from now after which the answer is of no use; it is then aborted,
                and the stream raises `DeadlineError`.

        Raises:
            QueueFullError: too much waits.
            CapacityError: the request can never fit.
            UsageError: a request of this id is under way, or it is malformed.
            DeadlineError: it would wait longer than `deadline_s`.
            UnavailableError: the service is not ready.
        """
        ...

    def abort(self, request_id: str) -> None:
        """Ends a request by the next step, with "abort"; unknown ids are left."""
        ...

    async def load(self) -> Load:
        """Returns how busy the engine is."""
        ...

    async def server_info(self) -> dict[str, Any]:
        """Returns versions, layout, mesh, capacity, memory plan and start-up time by phase."""
        ...

    def metrics(self) -> MetricsSnapshot:
        """Returns what was counted; a moment old if the engine is elsewhere."""
        ...

    async def profile(self, seconds: float) -> str:
        """Returns the folder of a trace of the next seconds.

        Raises:
            UnsupportedError: there is nothing to trace.
        """
        ...

    def drain(self) -> None:
        """Takes no more requests; those under way go on."""
        ...

    async def stop(self, grace_s: float = 0.0) -> None:
        """Ends the engine. What is under way after the grace fails with `UnavailableError`."""
        ...


class LocalService:
    """An engine of this process, in its own thread; for tests, notebooks and measurements.

    Args:
        engine: not started yet.
        info: what `server_info` tells.
        trace: records for so many seconds and returns the folder.
    """

    def __init__(
        self,
        engine: Engine,
        intake: Intake,
        card: ModelCard,
        info: dict[str, Any] | None = None,
        trace: Callable[[float], str] | None = None,
    ) -> None:
        self.card = card
        self.intake = intake
        self.engine = engine
        self._info = info or {}
        self._trace = trace
        self._state = State.STARTING
        self._streams = Streams(engine.abort, engine.finish)
        self._outbox: list[TokenEvent] = []
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def state(self) -> State:
        """Returns whether requests are taken."""
        return self._state

    @property
    def reason(self) -> str:
        """Returns why they are not."""
        return REASONS[self._state]

    @property
    def failed(self) -> bool:
        """Returns False: an engine of this process is lost with it."""
        return False

    async def start(self) -> None:
        """Starts the engine's thread."""
        self._loop = asyncio.get_running_loop()
        self.engine.after_events = self._hand_over
        self.engine.start()
        self._state = State.READY

    async def submit(self, request: Request, deadline_s: float | None = None) -> TokenStream:
        """Returns the events of a request, once it is admitted."""
        check_ready(self)
        self._streams.check_deadline(deadline_s, (await self.load()).expected_wait_s)
        stream = self._streams.open(request, deadline_s)
        try:
            self.engine.submit(request, self._outbox_append)
        except BaseException:
            self._streams.forget(request.id)
            raise
        return stream

    def abort(self, request_id: str) -> None:
        """Ends a request by the next step."""
        self.engine.abort(request_id)

    async def load(self) -> Load:
        """Returns how busy the engine is."""
        return load_of(self.metrics())

    async def server_info(self) -> dict[str, Any]:
        """Returns what the service was given to tell."""
        return self._info

    def metrics(self) -> MetricsSnapshot:
        """Returns what was counted."""
        return snapshot(self.engine.metrics)

    async def profile(self, seconds: float) -> str:
        """Returns the folder of a trace of the next seconds."""
        if self._trace is None:
            raise UnsupportedError("this engine runs no programs that could be traced")
        return await asyncio.to_thread(self._trace, seconds)

    def drain(self) -> None:
        """Takes no more requests; those under way go on."""
        if self._state is State.READY:
            self._state = State.DRAINING

    async def stop(self, grace_s: float = 0.0) -> None:
        """Ends the engine's thread."""
        self.drain()
        await self._streams.empty(grace_s)
        self._streams.fail_all(UnavailableError("the server stopped before this was answered"))
        await asyncio.to_thread(self.engine.stop)
        self._state = State.DEAD

    # In the engine's thread.

    def _outbox_append(self, event: TokenEvent) -> None:
        self._outbox.append(event)

    def _hand_over(self) -> None:
        """Gives the events of a step to the loop, all at once."""
        events, self._outbox = self._outbox, []
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._streams.route, events)


EMPTY_METRICS = MetricsSnapshot(
    gauges=dict.fromkeys(
        (
            "running",
            "waiting",
            "waiting_tokens",
            "pages",
            "pages_held",
            "pages_cached",
            "tokens_per_s",
            "expected_wait_s",
        ),
        0.0,
    ),
    counters={"generated_tokens": 0.0},
)
"""Of an engine that has told nothing yet; not to be written to."""

REASONS = {
    State.STARTING: "the engine starts",
    State.READY: "",
    State.DRAINING: "the server stops and takes no new requests",
    State.DEAD: "the engine has ended",
}


def check_ready(service: Service) -> None:
    """Checks that a service takes requests.

    Raises:
        UnavailableError: it does not.
    """
    if service.state is not State.READY:
        raise UnavailableError(f"{service.reason}; try again later")


def load_of(metrics: MetricsSnapshot) -> Load:
    """Returns how busy an engine is."""
    gauges, counters = metrics.gauges, metrics.counters
    return Load(
        running=int(gauges["running"]),
        waiting=int(gauges["waiting"]),
        waiting_tokens=int(gauges["waiting_tokens"]),
        total_pages=int(gauges["pages"]),
        free_pages=int(gauges["pages"] - gauges["pages_held"]),
        generated_tokens=int(counters["generated_tokens"]),
        tokens_per_s=gauges["tokens_per_s"],
        expected_wait_s=gauges["expected_wait_s"],
    )
