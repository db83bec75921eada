"""One request's answer: text piece by piece, from the tokens that an engine gives.

    async with await Answer.open(service, request) as answer:
        async for delta in answer:
            print(delta.text, end="")
    answer.usage

Leaving the block early, by cancellation too, aborts the request. Whatever came while the reader was
busy arrives as one `Delta` per sample.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Self

import msgspec

from jaxserve.errors import GenerationError, UsageError
from jaxserve.serving.completion import CompletionBuilder
from jaxserve.serving.request import (
    Completion,
    FinishReason,
    Request,
    RequestTimes,
    TokenEvent,
    TokenLogprob,
)
from jaxserve.serving.service import Service
from jaxserve.serving.streams import TokenStream
from jaxserve.serving.tracing import RequestSpan

MAX_LOGPROB_ENTRIES = 2_000_000
"""Log-probabilities of one answer, each of some hundred bytes."""


class Delta(msgspec.Struct, frozen=True):
    """What one sample gained.

    Attributes:
        sample_index: which of the `n` completions.
        text: what is certain now; it may lag behind the tokens.
        token_ids: new tokens, without a stop token.
        logprobs: one entry per token id, where asked for.
        finish_reason: set on the last delta of a sample.
    """

    sample_index: int
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None


class AnswerUsage(msgspec.Struct, frozen=True):
    """Tokens and time that a request took.

    Attributes:
        prompt_tokens: tokens of the prompt, the cached ones included.
        completion_tokens: tokens generated, over all samples.
        cached_tokens: tokens of the prompt that the prefix cache held.
        queue_s, prefill_s, decode_s: until it got a slot, from there to its first token, and from
            there to its last; None until known.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    queue_s: float | None = None
    prefill_s: float | None = None
    decode_s: float | None = None

    @property
    def total_tokens(self) -> int:
        """Returns prompt and completion tokens together."""
        return self.prompt_tokens + self.completion_tokens


def check_logprobs(requests: Sequence[Request]) -> None:
    """Checks that the log-probabilities of an answer to some requests cannot fill the memory.

    Raises:
        UsageError: they could.
    """
    count = 0
    for request in requests:
        params = request.params
        if params.logprobs is not None:
            count += params.n * (params.max_tokens or 0) * (1 + params.logprobs)
        if params.prompt_logprobs is not None:
            count += params.n * len(request.prompt) * (1 + params.prompt_logprobs)
    if count > MAX_LOGPROB_ENTRIES:
        params = requests[0].params
        raise UsageError(
            f"logprobs={params.logprobs}, prompt_logprobs={params.prompt_logprobs}: prompts, n and "
            f"max_tokens could give {count:,} log-probabilities; at most {MAX_LOGPROB_ENTRIES:,} "
            "are told at once: lower one of them"
        )


class Answer:
    """The deltas of one request. Read once, by one task.

    Attributes:
        request: what is answered.
        prompt_logprobs: one entry per token of the prompt, the first None; where asked for, and
            from the first delta on.
    """

    def __init__(self, service: Service, request: Request, stream: TokenStream) -> None:
        self.request = request
        self.prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
        self._stream = stream
        self._times: RequestTimes | None = None
        self._span = RequestSpan(request)
        self._closed = False
        self._first_s = self._last_s = 0.0
        self._builders = [
            CompletionBuilder(service.intake.tokenizer, request)
            for _ in range(max(request.params.n, request.beam_width))
        ]
        self._cached = 0

    @classmethod
    async def open(
        cls, service: Service, request: Request, deadline_s: float | None = None
    ) -> Self:
        """Returns the answer of a request that is admitted; errors as `Service.submit`."""
        return cls(service, request, await service.submit(request, deadline_s))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the request if it is not over."""
        if not self._closed:
            self._closed = True
            drawn = sum(builder.num_drawn for builder in self._builders)
            self._span.end(drawn, self._times, self._stream.error)
        self._stream.close()

    async def __aiter__(self) -> AsyncIterator[Delta]:
        """Yields what comes; errors as `steps`."""
        async for deltas in self.steps():
            for delta in deltas:
                yield delta

    async def steps(self) -> AsyncGenerator[list[Delta]]:
        """Yields what came since the last turn, one delta a sample.

        Raises:
            GenerationError: the request failed while it ran.
            DeadlineError: it took too long.
            UnavailableError: the engine died or stopped.
            QueueFullError: it was read too slowly.
        """
        async for events in self._stream:
            if deltas := self._deltas(events):
                yield deltas

    @property
    def seed(self) -> int:
        """Returns the seed that gives the same answer again."""
        return self.request.params.seed or 0

    @property
    def usage(self) -> AnswerUsage:
        """Returns tokens and time so far."""
        drawn = sum(builder.num_drawn for builder in self._builders)
        usage = AnswerUsage(len(self.request.prompt), drawn, self._cached)
        if (times := self._times) is None:
            return usage
        # A stop string in the text is found here, after the engine's last word.
        decode_s = times.decode_s or self._last_s - self._first_s
        return msgspec.structs.replace(
            usage, queue_s=times.queue_s, prefill_s=times.prefill_s, decode_s=decode_s
        )

    async def completions(self) -> list[Completion]:
        """Returns all samples, in order, read to their end."""
        async for _ in self:
            pass
        return [builder.completion() for builder in self._builders]

    def _deltas(self, events: list[TokenEvent]) -> list[Delta]:
        """Returns what events bring, those of one sample as one."""
        self._last_s = time.perf_counter()
        self._first_s = self._first_s or self._last_s
        texts: dict[int, list[str]] = {}
        before: dict[int, int] = {}
        for event in events:
            self._note(event)
            index = event.sample_index
            builder = self._builders[index]
            if builder.finish_reason is not None:
                continue
            if index not in texts:
                texts[index], before[index] = [], builder.num_tokens
            texts[index].append(builder.push(event))
            if builder.finish_reason is not None and event.finish_reason is None:
                self._stream.finish(index, builder.num_drawn)
        return [
            Delta(
                index,
                "".join(pieces),
                *self._builders[index].tokens_from(before[index]),
                self._builders[index].finish_reason,
            )
            for index, pieces in texts.items()
        ]

    def _note(self, event: TokenEvent) -> None:
        """Takes what an event says of the request as a whole."""
        if event.error is not None:
            kind = event.error.partition(":")[0]  # the rest is for the log, it may hold paths
            raise GenerationError(f"the step that computed this failed ({kind}); send it again")
        self._cached = max(self._cached, event.cached_tokens)
        if event.times is not None:
            self._times = event.times
        if event.prompt_logprobs is not None:
            self.prompt_logprobs = event.prompt_logprobs
