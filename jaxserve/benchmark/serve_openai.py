"""Asks a server through the OpenAI interface: completions of token ids or words, or chats.

    target = OpenAITarget("http://127.0.0.1:8000", Api.COMPLETIONS)
    facts = await target.prepare()
    await target.call(request, record, clock)

Servers differ in what they take. The first request asks for everything a benchmark wants: a prompt
of token ids, no stop at the end of text, a count of the tokens. While the server refuses, it is
sent again with less; `TargetFacts` says what was left.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import msgspec

from jaxserve.benchmark.metrics import Record
from jaxserve.benchmark.serve_http import HttpClient, HttpError, StatusError
from jaxserve.benchmark.serve_target import CallError, Note, RefusedError, TargetFacts
from jaxserve.benchmark.trace import FIRST_ID, TraceRequest

REFUSALS = (429, 503)
PROBE_TOKENS = 32
_COMMON = """
    time year people way day man thing woman life child world school state family student group
    country problem hand part place case week company system program question work government
    number night point home water room mother area money story fact month lot right study book
    eye job word business issue side kind head house service friend father power hour game line
"""
WORDS = _COMMON.split()


class Api(StrEnum):
    """The route that is asked."""

    COMPLETIONS = "completions"
    CHAT = "chat"


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None


class _Frame(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


class _Model(msgspec.Struct):
    id: str
    max_model_len: int | None = None
    max_context_tokens: int | None = None
    vocab_size: int | None = None


class _Models(msgspec.Struct):
    data: list[_Model]


@dataclass(frozen=True)
class Wishes:
    """What to ask of a server beyond a prompt and a number of tokens."""

    token_ids: bool = True
    ignore_eos: bool = True
    usage: bool = True

    def fewer(self) -> list[Wishes]:
        """Returns what to try next, the least loss first."""
        words = replace(self, token_ids=False)
        plain = replace(self, ignore_eos=False)
        both = replace(words, ignore_eos=False)
        tried = [words, plain, both, replace(both, usage=False)]
        return [wishes for wishes in tried if wishes != self]


class OpenAITarget:
    """A server with the OpenAI interface."""

    def __init__(
        self,
        url: str,
        api: Api = Api.COMPLETIONS,
        model: str | None = None,
        api_key: str | None = None,
        timeout_s: float = 600.0,
    ) -> None:
        base = url.rstrip("/").removesuffix("/v1")
        headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
        self._http = HttpClient(base, headers, timeout_s)
        self._path = "/v1/chat/completions" if api is Api.CHAT else "/v1/completions"
        self._chat = api is Api.CHAT
        self._model = model
        self._wishes = Wishes(token_ids=not self._chat)
        self._tokens_of_words = 1.0
        self._decoder = msgspec.json.Decoder(_Frame)
        self._encoder = msgspec.json.Encoder()

    async def prepare(self) -> TargetFacts:
        """Returns what the server can do; its first requests are not measured."""
        card = await self._card()
        self._model = card.id
        probe = TraceRequest(tuple(range(FIRST_ID, FIRST_ID + PROBE_TOKENS)), 2, 0.0)
        record = await self._first_accepted(probe)
        if not self._wishes.token_ids and record.prompt_tokens:
            self._tokens_of_words = record.prompt_tokens / PROBE_TOKENS
        return TargetFacts(
            model=card.id,
            context=card.max_model_len or card.max_context_tokens,
            vocab_size=card.vocab_size,
            prompts="token ids" if self._wishes.token_ids else "words",
            ignore_eos=self._wishes.ignore_eos,
            counted="usage" if self._wishes.usage else "pieces",
        )

    async def call(self, request: TraceRequest, record: Record, clock: Note) -> None:
        """Sends a request and notes the arrival of its tokens."""
        try:
            usage = await self._stream(self._body(request), record, clock)
        except StatusError as error:
            kind = RefusedError if error.status in REFUSALS else CallError
            raise kind(str(error)) from error
        except (HttpError, OSError, msgspec.MsgspecError) as error:
            raise CallError(f"{type(error).__name__}: {error}") from error
        if usage is not None:
            record.prompt_tokens = usage.prompt_tokens or record.prompt_tokens
            if usage.prompt_tokens_details is not None:
                record.cached_tokens = usage.prompt_tokens_details.cached_tokens or 0
            spread_tokens(record, usage.completion_tokens)
        if not record.times_s:
            raise CallError("the answer held no token")

    async def close(self) -> None:
        """Closes connections."""
        await self._http.close()

    async def _stream(self, body: bytes, record: Record, clock: Note) -> _Usage | None:
        """Returns the usage that the answer ended with, if any."""
        usage, ended = None, False
        async with self._http.stream("POST", self._path, body) as events:
            async for data in events:
                if data == b"[DONE]":
                    ended = True
                    continue
                frame = self._decoder.decode(data)
                if frame.error is not None:
                    raise CallError(f"error in the stream: {frame.error}")
                usage = frame.usage or usage
                if frame.choices and self._holds_token(frame.choices[0]):
                    record.add(clock(), 1)
        if not ended:
            raise CallError("the stream ended without [DONE]")
        return usage

    def _holds_token(self, choice: _Choice) -> bool:
        """Returns whether a piece of the answer came because of a token.

        A token may have no text yet: a part of a character. The first piece of a chat has none
        either, but tells only the role, and the last may only tell why it is the last.
        """
        if self._chat:
            return choice.delta is not None and bool(choice.delta.content)
        return bool(choice.text) or choice.finish_reason is None

    def _body(self, request: TraceRequest) -> bytes:
        fields: dict[str, Any] = {
            "model": self._model,
            "max_tokens": request.output_tokens,
            "temperature": 0,
            "stream": True,
        }
        if self._wishes.ignore_eos:
            fields["ignore_eos"] = True
        if self._wishes.usage:
            fields["stream_options"] = {"include_usage": True}
        if self._wishes.token_ids:
            fields["prompt"] = request.prompt
        elif self._chat:
            fields["messages"] = [{"role": "user", "content": self._words(request.prompt)}]
        else:
            fields["prompt"] = self._words(request.prompt)
        return self._encoder.encode(fields)

    def _words(self, prompt: tuple[int, ...]) -> str:
        """Returns words that make about as many tokens as the prompt has ids.

        Each id gives one word, so different prompts have different words.
        """
        count = max(1, round(len(prompt) / self._tokens_of_words))
        return " ".join(WORDS[i % len(WORDS)] for i in prompt[:count])

    async def _card(self) -> _Model:
        """Returns what the server tells of the model that is asked for, or of its first."""
        try:
            models = msgspec.json.decode(
                await self._http.request("GET", "/v1/models"), type=_Models
            )
        except StatusError as error:
            if self._model is None:
                raise CallError(f"GET /v1/models: {error}; name the model with --model") from error
            return _Model(self._model)
        except (HttpError, OSError, msgspec.MsgspecError) as error:
            raise CallError(f"GET /v1/models: {error}") from error
        if self._model is not None:
            named = [card for card in models.data if card.id == self._model]
            return named[0] if named else _Model(self._model)
        if not models.data:
            raise CallError("GET /v1/models lists no model; name one with --model")
        return models.data[0]

    async def _first_accepted(self, probe: TraceRequest) -> Record:
        """Returns the record of the first way to ask that the server does not call malformed."""
        refusals: list[str] = []
        for wishes in (self._wishes, *self._wishes.fewer()):
            self._wishes = wishes
            record = Record(0.0, len(probe.prompt))
            try:
                await self.call(probe, record, lambda: 0.0)
            except CallError as error:
                cause = error.__cause__
                if not (isinstance(cause, StatusError) and cause.status in (400, 422)):
                    raise
                refusals.append(str(error))
            else:
                return record
        raise CallError(f"every way to ask was refused, the first with: {refusals[0]}")


def spread_tokens(record: Record, tokens: int) -> None:
    """Spreads the number of tokens that the server counted evenly over the arrivals.

    A piece of text may hold several tokens, and a token's text may come with a later one's.
    """
    pieces = len(record.times_s)
    record.counts = [(k + 1) * tokens // pieces - k * tokens // pieces for k in range(pieces)]
