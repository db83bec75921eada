"""The events of requests on their way to whoever reads them. One asyncio loop owns all of it.

streams = Streams(abort, finish)
stream = streams.open(request)
streams.route(events)                   # of many requests, as they come from the engine
async for events in stream: ...
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Self

from jaxserve.errors import DeadlineError, JaxserveError, QueueFullError, UsageError
from jaxserve.serving.request import Request, TokenEvent

MAX_PENDING = 1 << 16
"""Tokens and likeliest tokens that may wait for a reader; one further behind loses its request."""


class TokenStream:
    """The events of one request: each turn gives all that came since the last one.

    So a slow reader costs no more than a fast one, and no step ever waits for it.

    Attributes:
        request: what is answered.
        error: what it ended with, if it failed.
    """

    def __init__(self, request: Request, owner: Streams) -> None:
        self.request = request
        self._owner = owner
        self._remaining = set(range(max(request.params.n, request.beam_width)))
        self._pending: list[TokenEvent] = []
        self._num_pending = 0
        self._cost = 1 + (request.params.logprobs or 0)
        self.error: JaxserveError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._when_over: Callable[[], object] | None = None
        self._left = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[TokenEvent]:
        while not self._pending:
            if self.error is not None:
                raise self.error
            if not self._remaining:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        events, self._pending = self._pending, []
        self._num_pending = 0
        return events

    @property
    def over(self) -> bool:
        """Returns whether no more events will come."""
        return not self._remaining or self.error is not None

    def finish(self, sample_index: int, num_tokens: int) -> None:
        """Ends one sample, cut to `num_tokens`, because its text has a stop string."""
        if sample_index in self._remaining:
            self._owner.send_finish(self.request.id, sample_index, num_tokens)
            self._end(sample_index)

    def close(self) -> None:
        """Ends the request if it is not over."""
        if not self.over:
            self._owner.send_abort(self.request.id)
            self._remaining.clear()
        self._pending = []
        self._leave()

    def push(self, event: TokenEvent) -> None:
        """Takes an event from the engine."""
        if event.sample_index not in self._remaining:
            return
        self._pending.append(event)
        self._num_pending += self._cost * len(event.token_ids)
        if event.finish_reason is not None:
            self._end(event.sample_index)
        elif self._num_pending > MAX_PENDING:
            self._owner.send_abort(self.request.id)
            self._pending = []
            self.fail(
                QueueFullError(
                    f"more than {MAX_PENDING} tokens waited for their reader; read faster, or ask "
                    "for fewer tokens or log-probabilities"
                )
            )
        self._wake()

    def fail(self, error: JaxserveError) -> None:
        """Ends the stream with an error, after the events that have come."""
        if not self.over:
            self.error = error
            self._leave()
            self._wake()

    def when_over(self, call: Callable[[], object]) -> None:
        """Has `call` called once, when no more events will come."""
        self._when_over = call

    def end_after(self, deadline_s: float) -> None:
        """Aborts the request if it is under way after so many seconds."""
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(deadline_s, self._late, deadline_s)

    def _late(self, deadline_s: float) -> None:
        if not self.over:
            self._owner.send_abort(self.request.id)
            self.fail(DeadlineError(f"the answer was not ready after {deadline_s:.3g} s"))

    def _end(self, sample_index: int) -> None:
        self._remaining.discard(sample_index)
        if not self._remaining:
            self._leave()

    def _leave(self) -> None:
        """Lets go of what the open request held, once: its id may be another's by now."""
        if self._left:
            return
        self._left = True
        if self._timer is not None:
            self._timer.cancel()
        if self._when_over is not None:
            self._when_over()
        self._owner.forget(self.request.id)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Streams:
    """The open streams of a service.

    Args:
        send_abort: tells the engine to end a request.
        send_finish: tells it to end a sample, cut to so many tokens.
    """

    def __init__(
        self, send_abort: Callable[[str], None], send_finish: Callable[[str, int, int], None]
    ) -> None:
        self.send_abort = send_abort
        self.send_finish = send_finish
        self._open: dict[str, TokenStream] = {}
        self._emptied = asyncio.Event()

    def __len__(self) -> int:
        return len(self._open)

    def open(self, request: Request, deadline_s: float | None = None) -> TokenStream:
        """Returns the stream of a request that is about to be sent.

        Raises:
            UsageError: a request of this id is under way.
        """
        if request.id in self._open:
            raise UsageError(f"request id {request.id!r} is open already; use another one")
        stream = self._open[request.id] = TokenStream(request, self)
        self._emptied.clear()
        if deadline_s is not None:
            stream.end_after(deadline_s)
        return stream

    def check_deadline(self, deadline_s: float | None, expected_wait_s: float) -> None:
        """Checks that a request will probably not wait beyond its deadline.

        Raises:
            DeadlineError: it will.
        """
        if deadline_s is not None and expected_wait_s >= deadline_s:
            raise DeadlineError(
                f"requests wait about {expected_wait_s:.3g} s now, and this one has "
                f"{max(deadline_s, 0):.3g} s; try again later or allow more"
            )

    def route(self, events: Sequence[TokenEvent]) -> None:
        """Gives events to their streams; those of forgotten requests are dropped."""
        streams = self._open
        for event in events:
            if (stream := streams.get(event.request_id)) is not None:
                stream.push(event)

    def forget(self, request_id: str) -> None:
        """Drops a stream that is over."""
        self._open.pop(request_id, None)
        if not self._open:
            self._emptied.set()

    def fail_all(self, error: JaxserveError) -> None:
        """Ends every stream with an error."""
        for stream in list(self._open.values()):
            stream.fail(error)

    async def empty(self, grace_s: float) -> bool:
        """Returns whether every stream was over within so many seconds."""
        if not self._open:
            return True
        try:
            await asyncio.wait_for(self._emptied.wait(), grace_s)
        except TimeoutError:
            return False
        return True
