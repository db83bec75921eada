"""Requests that run in the caller's thread: together in a batch, or one as a stream of text.

done = Batch(engine, tokenizer, requests).run()         # the completions of each request
for piece in TextStream(engine, tokenizer, request):
print(piece, end="")
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, Self

import numpy as np

from jaxserve.errors import QueueFullError, UsageError
from jaxserve.serving.completion import CompletionBuilder
from jaxserve.serving.engine import Engine
from jaxserve.serving.request import Completion, Request, TokenEvent
from jaxserve.tokenizer import Tokenizer


class Batch:
    """Requests that run together, and the completions that come of them."""

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer | None, requests: Sequence[Request]
    ) -> None:
        self._engine = engine
        self._requests = requests
        self._waiting = deque(requests)
        self._builders = {
            request.id: [
                CompletionBuilder(tokenizer, request)
                for _ in range(max(request.params.n, request.beam_width))
            ]
            for request in requests
        }
        self._num_running = sum(map(len, self._builders.values()))

    def run(self) -> list[list[Completion]]:
        """Returns the completions of each request, in order."""
        try:
            while self._num_running:
                self._submit()
                self._engine.step()
        except BaseException:  # Ctrl-C, too, leaves the engine free for others
            for request in self._requests:
                self._engine.abort(request.id)
            while self._engine.step():
                pass
            raise
        return [
            [builder.completion() for builder in self._builders[request.id]]
            for request in self._requests
        ]

    def _submit(self) -> None:
        """Hands the engine as many requests as its queue takes."""
        while self._waiting:
            try:
                self._engine.submit(self._waiting[0], self._push)
            except QueueFullError:
                return
            self._waiting.popleft()

    def _push(self, event: TokenEvent) -> None:
        """Takes the events of all requests."""
        builder = self._builders[event.request_id][event.sample_index]
        if builder.finish_reason is not None:
            return
        builder.push(event)
        if builder.finish_reason is not None:
            self._num_running -= 1
            if event.finish_reason is None:
                self._engine.finish(event.request_id, event.sample_index, builder.num_drawn)


class TextStream:
    """The pieces of one completion, as they come; see `LLM.stream`.

    Dropping it before its end ends the request, as `close` and leaving a `with` block do.

    Args:
        before: called when the first piece is asked for, before the request is submitted.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer | None,
        request: Request,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        # The engine keeps the reading, which knows neither this nor its iterator: so both are
        # gone, and the request is over, as soon as nobody reads.
        self._reading = _Reading(engine, tokenizer, request, before)
        self._iterator = self._reading.pieces()

    @property
    def first_token_at(self) -> float:
        """Returns time.perf_counter() when the first token was there; 0 before."""
        return self._reading.first_token_at

    @property
    def completion(self) -> Completion:
        """Returns the whole completion, once the stream is exhausted or closed."""
        builder = self._reading.builder
        if builder.finish_reason is None:
            raise UsageError("the stream still runs; read it to its end first")
        return builder.completion()

    def close(self) -> None:
        """Ends the request if it is not over; its completion then ends with "abort"."""
        self._iterator.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[str]:
        return self._iterator

    def __next__(self) -> str:
        return next(self._iterator)


class _Reading:
    """What has come of a streamed request; the engine writes it, through `_push`."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer | None,
        request: Request,
        before: Callable[[], None],
    ) -> None:
        self._engine = engine
        self._before = before
        self._request = request
        self._ready: deque[str] = deque()
        self.builder = CompletionBuilder(tokenizer, request)
        self.first_token_at = 0.0

    def pieces(self) -> Generator[str, None, None]:
        """Returns an iterator over the pieces, which runs the engine; closing it ends the request.

        It holds this object, and must not be held by it.
        """
        self._before()
        self._engine.submit(self._request, self._push)
        try:
            while self.builder.finish_reason is None or self._ready:
                while self._ready:
                    yield self._ready.popleft()
                if self.builder.finish_reason is None:
                    self._engine.step()
        finally:
            if self.builder.finish_reason is None:  # nobody reads on
                self._engine.abort(self._request.id)
                if not self._engine.watch.busy:  # else garbage collected in the midst of a step
                    self._engine.step()
        _ = self.builder.completion()  # a failed request raises its cause

    def _push(self, event: TokenEvent) -> None:
        self.first_token_at = self.first_token_at or time.perf_counter()
        if self.builder.finish_reason is not None:
            return
        if piece := self.builder.push(event):
            self._ready.append(piece)
        if self.builder.finish_reason is not None and event.finish_reason is None:
            self._engine.finish(self._request.id, 0, self.builder.num_drawn)


def is_single(prompts: Any) -> bool:
    """Returns whether `prompts` is one prompt: a string, or a flat list of ints.

    Raises:
        UsageError: it is neither that nor a list of such.
    """
    if isinstance(prompts, str):
        return True
    if _is_list(prompts):
        if len(prompts) and all(isinstance(item, int | np.integer) for item in prompts):
            return True
        if all(isinstance(item, str) or _is_list(item) for item in prompts):
            return False
    raise UsageError(
        f"a prompt is text or a list of token ids, prompts are a list of them: {prompts!r:.80}; "
        "make an array a list with .tolist()"
    )


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence | np.ndarray) and not isinstance(value, bytes | str)
