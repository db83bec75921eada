"""`/v1/completions`: prompts, continued."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, cast

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from jaxserve.serving.answer import Answer, Delta
from jaxserve.serving.http.bodies import read
from jaxserve.serving.http.call import call_of
from jaxserve.serving.http.errors import FieldError
from jaxserve.serving.http.generate import Site, UsageBody, respond, usage_of
from jaxserve.serving.http.logprobs import (
    CompletionLogprobs,
    CompletionTokens,
    PromptLogprobs,
    prompt_logprobs,
)
from jaxserve.serving.http.sampling import Prompts, check_model, sampling_params
from jaxserve.serving.http.schemas import REFUSED_IN_COMPLETIONS, CompletionRequest
from jaxserve.serving.http.stream import frame
from jaxserve.serving.request import MAX_PROMPTS, Completion, FinishReason, TokenLogprob

DEFAULT_MAX_TOKENS = 16

Prompt = str | list[int]


class CompletionChoice(msgspec.Struct, kw_only=True):
    """A completion, or a piece of one in a stream."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    seed: int | msgspec.UnsetType = msgspec.UNSET
    token_ids: Sequence[int] | msgspec.UnsetType = msgspec.UNSET
    prompt_token_ids: Sequence[int] | msgspec.UnsetType = msgspec.UNSET
    prompt_logprobs: PromptLogprobs | msgspec.UnsetType | None = msgspec.UNSET


class CompletionBody(msgspec.Struct, kw_only=True):
    """The answer to a request for completions, or a chunk of it."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageBody | msgspec.UnsetType | None = msgspec.UNSET


async def complete(site: Site, http: HttpRequest) -> Response:
    """Returns the completions of prompts, at once or as a stream."""
    call = call_of(http)
    body = read(call.body, CompletionRequest, REFUSED_IN_COMPLETIONS)
    check_model(body.model, site.service.card.name)
    if body.user is not None:
        call.notes["user"] = body.user
    prompts = split(body.prompt)
    _check(body)
    echoed = {"prompt_logprobs": body.logprobs} if body.echo and body.logprobs is not None else {}
    params = sampling_params(
        body,
        site.options,
        max_tokens=body.max_tokens or (1 if body.max_tokens == 0 else None),
        logprobs=body.logprobs,
        **echoed,
    )
    making = Prompts(site.service.intake, site.options, call, body)
    requests = await making.requests(prompts, params, DEFAULT_MAX_TOKENS)
    form = _Completions(site, f"cmpl-{call.request_id}", body, prompts)
    return await respond(site, http, requests, form, stream=bool(body.stream))


def split(prompt: str | list[Any]) -> list[Prompt]:
    """Returns the prompts of a request: text or token ids, one or several.

    Raises:
        FieldError: kinds are mixed, or there are none or too many.
    """
    if isinstance(prompt, str):
        return [prompt]
    kinds = set(map(type, prompt))
    if kinds == {int}:
        return [cast("list[int]", prompt)]
    if kinds not in ({str}, {list}):
        raise FieldError(
            "prompt must be a string, token ids, a list of strings or a list of lists of token "
            "ids, and not empty",
            "prompt",
        )
    if len(prompt) > MAX_PROMPTS:
        raise FieldError(
            f"prompt holds {len(prompt)} prompts; send at most {MAX_PROMPTS} at once", "prompt"
        )
    return cast("list[Prompt]", prompt)


def _check(body: CompletionRequest) -> None:
    """Checks fields that depend on each other."""
    if body.max_tokens == 0 and not body.echo:
        raise FieldError("max_tokens=0 asks for nothing; use at least 1, or echo", "max_tokens")
    if body.stream_options is not None and not body.stream:
        raise FieldError("stream_options needs stream=true", "stream_options")


class _Completions:
    """Writes completions.

    Args:
        id: of the answer.
        body: what was asked.
        prompts: as they were sent.
    """

    def __init__(
        self, site: Site, id: str, body: CompletionRequest, prompts: Sequence[Prompt]
    ) -> None:
        self._site, self._body, self._prompts = site, body, prompts
        self._head = CompletionBody(
            id=id, created=int(time.time()), model=site.service.card.name, choices=[]
        )
        self._n = body.n or 1
        self._only_echo = body.max_tokens == 0
        self._with_usage = bool(body.stream_options and body.stream_options.include_usage)
        self._tokens: dict[int, CompletionTokens] = {}
        self._encoder = msgspec.json.Encoder()

    def chunk(self, position: int, answer: Answer, deltas: Sequence[Delta]) -> bytes:
        """Returns the events of one step."""
        return b"".join(
            self._frame(choice)
            for delta in deltas
            for choice in self._pieces(position * self._n + delta.sample_index, answer, delta)
        )

    def last(self, answers: Sequence[Answer]) -> bytes:
        """Returns the event of the usage, if it was asked for."""
        if not self._with_usage:
            return b""
        return self._encode_frame([], usage_of(answers, self._uncounted(answers)))

    def whole(self, answers: Sequence[Answer], done: Sequence[Sequence[Completion]]) -> bytes:
        """Returns all completions."""
        choices = [
            self._choice(at * self._n + sample, answers[at], completion)
            for at, completions in enumerate(done)
            for sample, completion in enumerate(completions)
        ]
        usage = usage_of(answers, self._uncounted(answers))
        body = msgspec.structs.replace(self._head, choices=choices, usage=usage)
        return self._encoder.encode(body)

    def _uncounted(self, answers: Sequence[Answer]) -> int:
        """Returns the tokens that were generated only because a prompt is never read alone."""
        if not self._only_echo:
            return 0
        return sum(answer.usage.completion_tokens for answer in answers)

    def _choice(self, index: int, answer: Answer, completion: Completion) -> CompletionChoice:
        text, token_ids = completion.text, completion.token_ids
        logprobs = completion.logprobs
        reason: FinishReason = completion.finish_reason
        if self._only_echo:
            text, token_ids, logprobs, reason = "", (), (), "length"
        choice = CompletionChoice(
            index=index,
            text=self._echo(index, answer) + text,
            logprobs=self._logprobs(index, answer, token_ids, logprobs, first=True),
            finish_reason=reason,
            seed=answer.seed,
        )
        self._add_extras(choice, answer, token_ids, first=True)
        return choice

    def _pieces(self, index: int, answer: Answer, delta: Delta) -> list[CompletionChoice]:
        """Returns what a delta tells: text first, then, apart from it, the end."""
        first = index not in self._tokens
        text, token_ids, logprobs = delta.text, delta.token_ids, delta.logprobs
        if self._only_echo:
            text, token_ids, logprobs = "", (), ()
        if first:
            self._tokens[index] = CompletionTokens(self._site.names)
            text = self._echo(index, answer) + text
        told = self._body.logprobs is not None or self._body.return_token_ids
        pieces: list[CompletionChoice] = []
        if text or (told and token_ids) or (first and self._body.prompt_logprobs is not None):
            choice = CompletionChoice(
                index=index,
                text=text,
                logprobs=self._logprobs(index, answer, token_ids, logprobs, first),
                finish_reason=None,
            )
            self._add_extras(choice, answer, token_ids, first)
            pieces.append(choice)
        if (reason := delta.finish_reason) is not None:
            reason = "length" if self._only_echo else reason
            end = CompletionChoice(index=index, text="", logprobs=None, finish_reason=reason)
            end.seed = answer.seed
            pieces.append(end)
        return pieces

    def _add_extras(
        self, choice: CompletionChoice, answer: Answer, token_ids: Sequence[int], first: bool
    ) -> None:
        """Adds what OpenAI's own interface does not have, where asked for."""
        if self._body.return_token_ids:
            choice.token_ids = token_ids
            if first:
                choice.prompt_token_ids = answer.request.prompt
        if first and self._body.prompt_logprobs is not None:
            choice.prompt_logprobs = prompt_logprobs(self._site.names, answer.prompt_logprobs)

    def _echo(self, index: int, answer: Answer) -> str:
        """Returns what comes before the text of a completion."""
        if not self._body.echo:
            return ""
        prompt = self._prompts[index // self._n]
        if isinstance(prompt, str) and self._body.truncate_prompt_tokens is None:
            return prompt
        tokenizer = self._site.service.intake.tokenizer
        return "" if tokenizer is None else tokenizer.decode(answer.request.prompt)

    def _logprobs(
        self,
        index: int,
        answer: Answer,
        token_ids: Sequence[int],
        logprobs: Sequence[TokenLogprob] | None,
        first: bool,
    ) -> CompletionLogprobs | None:
        if self._body.logprobs is None:
            return None
        tokens = self._tokens.setdefault(index, CompletionTokens(self._site.names))
        entries: list[tuple[int, TokenLogprob | None]] = []
        if first and self._body.echo and answer.prompt_logprobs is not None:
            entries += zip(answer.request.prompt, answer.prompt_logprobs, strict=True)
        return tokens.add([*entries, *zip(token_ids, logprobs or (), strict=True)])

    def _frame(self, choice: CompletionChoice) -> bytes:
        return self._encode_frame([choice], None if self._with_usage else msgspec.UNSET)

    def _encode_frame(self, choices: list[CompletionChoice], usage: Any) -> bytes:
        self._head.choices, self._head.usage = choices, usage
        return frame(self._encoder.encode(self._head))
