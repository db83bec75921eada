"""`/v1/chat/completions`: the assistant's next turn."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from jaxserve.serving.answer import Answer, Delta
from jaxserve.serving.http.bodies import read
from jaxserve.serving.http.call import call_of
from jaxserve.serving.http.errors import FieldError
from jaxserve.serving.http.generate import Site, UsageBody, respond, usage_of
from jaxserve.serving.http.logprobs import (
    ChatLogprobs,
    PromptLogprobs,
    chat_logprobs,
    prompt_logprobs,
)
from jaxserve.serving.http.sampling import Prompts, check_model, sampling_params
from jaxserve.serving.http.schemas import REFUSED_IN_CHAT, ChatRequest
from jaxserve.serving.http.stream import frame
from jaxserve.serving.request import Completion, FinishReason


class AssistantMessage(msgspec.Struct, kw_only=True):
    """The assistant's turn."""

    role: str = "assistant"
    content: str
    refusal: None = None
    tool_calls: list[None] = []


class ChatChoice(msgspec.Struct, kw_only=True):
    """One answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    seed: int
    token_ids: Sequence[int] | msgspec.UnsetType = msgspec.UNSET


class ChatBody(msgspec.Struct, kw_only=True):
    """The answer to a conversation."""

    id: str
    object: str = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageBody
    prompt_token_ids: Sequence[int] | msgspec.UnsetType = msgspec.UNSET
    prompt_logprobs: PromptLogprobs | msgspec.UnsetType | None = msgspec.UNSET


class MessageDelta(msgspec.Struct, omit_defaults=True):
    """What a message gained."""

    role: str | None = None
    content: str | None = None


class ChunkChoice(msgspec.Struct, kw_only=True):
    """A piece of one answer."""

    index: int
    delta: MessageDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    seed: int | msgspec.UnsetType = msgspec.UNSET
    token_ids: Sequence[int] | msgspec.UnsetType = msgspec.UNSET


class ChatChunk(msgspec.Struct, kw_only=True):
    """An event of a stream."""

    id: str
    object: str = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: UsageBody | msgspec.UnsetType | None = msgspec.UNSET
    prompt_token_ids: Sequence[int] | msgspec.UnsetType = msgspec.UNSET
    prompt_logprobs: PromptLogprobs | msgspec.UnsetType | None = msgspec.UNSET


async def chat(site: Site, http: HttpRequest) -> Response:
    """Returns answers to a conversation, at once or as a stream."""
    call = call_of(http)
    body = read(call.body, ChatRequest, REFUSED_IN_CHAT)
    check_model(body.model, site.service.card.name)
    if body.user is not None:
        call.notes["user"] = body.user
    _check(body)
    params = sampling_params(
        body,
        site.options,
        max_tokens=body.max_completion_tokens or body.max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    making = Prompts(site.service.intake, site.options, call, body)
    request = await making.chat(body.messages, params)
    form = _Chat(site, f"chatcmpl-{call.request_id}", body)
    return await respond(site, http, [request], form, stream=bool(body.stream))


def _check(body: ChatRequest) -> None:
    """Checks fields that depend on each other."""
    if body.top_logprobs and not body.logprobs:
        raise FieldError("top_logprobs needs logprobs=true", "top_logprobs")
    if body.max_tokens == 0:
        raise FieldError("max_tokens=0 asks for nothing; use at least 1", "max_tokens")
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise FieldError(
            f"max_tokens={body.max_tokens} and max_completion_tokens="
            f"{body.max_completion_tokens} contradict each other; use one",
            "max_completion_tokens",
        )
    if body.stream_options is not None and not body.stream:
        raise FieldError("stream_options needs stream=true", "stream_options")


class _Chat:
    """Writes answers to a conversation.

    Args:
        id: of the answer.
        body: what was asked.
    """

    def __init__(self, site: Site, id: str, body: ChatRequest) -> None:
        self._site, self._body, self._id = site, body, id
        self._created = int(time.time())
        self._model = site.service.card.name
        self._chunk = ChatChunk(id=id, created=self._created, model=self._model, choices=[])
        self._with_usage = bool(body.stream_options and body.stream_options.include_usage)
        self._begun: set[int] = set()
        self._encoder = msgspec.json.Encoder()

    def chunk(self, position: int, answer: Answer, deltas: Sequence[Delta]) -> bytes:
        """Returns the events of one step."""
        return b"".join(event for delta in deltas for event in self._pieces(answer, delta))

    def last(self, answers: Sequence[Answer]) -> bytes:
        """Returns the event of the usage, if it was asked for."""
        return self._frame([], usage_of(answers)) if self._with_usage else b""

    def whole(self, answers: Sequence[Answer], done: Sequence[Sequence[Completion]]) -> bytes:
        """Returns all answers."""
        body = ChatBody(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=[self._choice(at, answers[0], one) for at, one in enumerate(done[0])],
            usage=usage_of(answers),
        )
        self._add_prompt(body, answers[0])
        return self._encoder.encode(body)

    def _choice(self, index: int, answer: Answer, completion: Completion) -> ChatChoice:
        return ChatChoice(
            index=index,
            message=AssistantMessage(content=completion.text),
            logprobs=self._logprobs(completion),
            finish_reason=completion.finish_reason,
            seed=answer.seed,
            token_ids=completion.token_ids if self._body.return_token_ids else msgspec.UNSET,
        )

    def _pieces(self, answer: Answer, delta: Delta) -> list[bytes]:
        """Returns the role, where it is the first delta; the text; and, apart from it, the end."""
        index, events = delta.sample_index, []
        if index not in self._begun:
            role = ChunkChoice(index=index, delta=MessageDelta("assistant", ""))
            events.append(self._first(answer, role))
            self._begun.add(index)
        told = self._body.logprobs or self._body.return_token_ids
        if delta.text or (told and delta.token_ids):
            text = ChunkChoice(
                index=index,
                delta=MessageDelta(content=delta.text),
                logprobs=self._logprobs(delta),
                token_ids=delta.token_ids if self._body.return_token_ids else msgspec.UNSET,
            )
            events.append(self._told(text))
        if delta.finish_reason is not None:
            end = ChunkChoice(
                index=index,
                delta=MessageDelta(),
                finish_reason=delta.finish_reason,
                seed=answer.seed,
            )
            events.append(self._told(end))
        return events

    def _first(self, answer: Answer, role: ChunkChoice) -> bytes:
        """Returns the first event of a sample; that of the first one tells of the prompt."""
        if self._begun:
            return self._told(role)
        self._add_prompt(self._chunk, answer)
        event = self._told(role)
        self._chunk.prompt_token_ids = self._chunk.prompt_logprobs = msgspec.UNSET
        return event

    def _add_prompt(self, body: ChatBody | ChatChunk, answer: Answer) -> None:
        if self._body.return_token_ids:
            body.prompt_token_ids = answer.request.prompt
        if self._body.prompt_logprobs is not None:
            body.prompt_logprobs = prompt_logprobs(self._site.names, answer.prompt_logprobs)

    def _logprobs(self, part: Completion | Delta) -> ChatLogprobs | None:
        if not self._body.logprobs:
            return None
        return chat_logprobs(self._site.names, part.logprobs or ())

    def _told(self, choice: ChunkChoice) -> bytes:
        return self._frame([choice], None if self._with_usage else msgspec.UNSET)

    def _frame(self, choices: list[ChunkChoice], usage: Any) -> bytes:
        self._chunk.choices, self._chunk.usage = choices, usage
        return frame(self._encoder.encode(self._chunk))
