"""What completions and chats have in common: opening answers, reading them, counting tokens."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from jaxserve.serving.answer import Answer, Delta, check_logprobs
from jaxserve.serving.http.call import unless_gone
from jaxserve.serving.http.errors import JSON, HttpError
from jaxserve.serving.http.limits import RequestLimits
from jaxserve.serving.http.logprobs import TokenNames
from jaxserve.serving.http.stream import DONE, EventStream
from jaxserve.serving.request import Completion, Request
from jaxserve.serving.server_options import ServerOptions
from jaxserve.serving.service import Service


@dataclass(frozen=True)
class Site:
    """What every route works with.

    Attributes:
        service: the model.
        options: what the operator set.
        limits: what nobody needs to set.
        names: what the model's tokens are called.
    """

    service: Service
    options: ServerOptions
    limits: RequestLimits
    names: TokenNames = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", TokenNames(self.service.intake.tokenizer))


class CachedTokens(msgspec.Struct):
    """Tokens of the prompt that were not computed again."""

    cached_tokens: int


class UsageBody(msgspec.Struct):
    """Tokens that an HTTP request cost."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class Format(Protocol):
    """How an endpoint writes answers."""

    def chunk(self, position: int, answer: Answer, deltas: Sequence[Delta]) -> bytes:
        """Returns the events of one step of the answer at `position`; may be empty."""
        ...

    def last(self, answers: Sequence[Answer]) -> bytes:
        """Returns the events that follow when all answers are complete; may be empty."""
        ...

    def whole(self, answers: Sequence[Answer], done: Sequence[Sequence[Completion]]) -> bytes:
        """Returns the body that tells all answers at once."""
        ...


def usage_of(answers: Sequence[Answer], uncounted: int = 0) -> UsageBody:
    """Returns what answers cost together, less `uncounted` generated tokens."""
    all_of = [answer.usage for answer in answers]
    prompt = sum(usage.prompt_tokens for usage in all_of)
    completion = sum(usage.completion_tokens for usage in all_of) - uncounted
    cached = sum(usage.cached_tokens for usage in all_of)
    return UsageBody(prompt, completion, prompt + completion, CachedTokens(cached))


async def respond(
    site: Site,
    http: HttpRequest,
    requests: Sequence[Request],
    form: Format,
    *,
    stream: bool,
    end: bytes = DONE,
) -> Response:
    """Returns the response to requests, which are aborted when the client goes.

    The status line of a stream waits until all of them are admitted.

    Raises:
        UsageError: more log-probabilities are asked for than are held for one answer.
    """
    check_logprobs(requests)
    stack = AsyncExitStack()
    try:
        opening = _open(site, stack, requests)
        if not stream:
            body = await unless_gone(http.receive, _whole(opening, form))
            await stack.aclose()
            return Response(body, media_type=JSON)
        answers = await unless_gone(http.receive, opening)
        timeout_s = site.limits.write_timeout_s
        return EventStream(_events(answers, form), stack.aclose, end, timeout_s)
    except BaseException:
        await stack.aclose()
        raise


async def _open(site: Site, stack: AsyncExitStack, requests: Sequence[Request]) -> list[Answer]:
    limit_s = site.options.request_timeout_s
    began = time.monotonic()
    answers: list[Answer] = []
    for request in requests:
        left_s = None if limit_s is None else limit_s - (time.monotonic() - began)
        answer = await Answer.open(site.service, request, left_s)
        answers.append(await stack.enter_async_context(answer))
    return answers


async def _whole(opening: Coroutine[Any, Any, list[Answer]], form: Format) -> bytes:
    answers = await opening
    done = await asyncio.gather(*(answer.completions() for answer in answers))
    for completions in done:
        _check([completion.finish_reason for completion in completions])
    return form.whole(answers, done)


async def _events(answers: Sequence[Answer], form: Format) -> AsyncGenerator[bytes]:
    async with aclosing(_merged(answers)) as merged:
        async for position, deltas in merged:
            _check([delta.finish_reason for delta in deltas])
            if data := form.chunk(position, answers[position], deltas):
                yield data
    if data := form.last(answers):
        yield data


def _check(reasons: Sequence[str | None]) -> None:
    """Checks that nobody else ended the request.

    Raises:
        HttpError: somebody did.
    """
    if "abort" in reasons:
        raise HttpError(499, "the request was aborted while it ran", "aborted")


async def _merged(answers: Sequence[Answer]) -> AsyncGenerator[tuple[int, list[Delta]]]:
    """Yields (position of the answer, what came for it), from whichever answer has something."""
    readers = [answer.steps() for answer in answers]
    if len(readers) == 1:
        async with aclosing(readers[0]) as reader:
            async for deltas in reader:
                yield 0, deltas
        return
    waiting = {_next(reader): at for at, reader in enumerate(readers)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=waiting.__getitem__):
                at = waiting.pop(task)
                if (deltas := task.result()) is not None:
                    yield at, deltas
                    waiting[_next(readers[at])] = at
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


def _next(reader: AsyncIterator[list[Delta]]) -> asyncio.Task[list[Delta] | None]:
    async def step() -> list[Delta] | None:
        return await anext(reader, None)

    return asyncio.ensure_future(step())
