"""From the fields of a request to `SamplingParams` and a `Request`."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import Sequence
from typing import Any

from jaxserve.errors import ContextLengthError, ModelNotFoundError, TokenizerError, UsageError
from jaxserve.serving.http.call import Call
from jaxserve.serving.http.errors import FieldError
from jaxserve.serving.http.schemas import Generation, Message
from jaxserve.serving.intake import Intake
from jaxserve.serving.request import Request, SamplingParams
from jaxserve.serving.server_options import ServerOptions

_INLINE_CHARS = 4096
"""Texts up to this long are tokenised at once: a thread would take longer."""

_COPIED = (
    "n",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "seed",
    "min_tokens",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "prompt_logprobs",
)


def sampling_params(body: Generation, options: ServerOptions, **decided: Any) -> SamplingParams:
    """Returns the parameters that a body asks for.

    Args:
        decided: fields that the endpoint decides itself; None leaves one open.

    Raises:
        FieldError: a value is out of range, or over the limit of this server.
    """
    fields = {name: getattr(body, name) for name in _COPIED} | decided
    fields = {name: value for name, value in fields.items() if value is not None}
    limits = {
        "n": options.max_n,
        "logprobs": options.max_logprobs,
        "prompt_logprobs": options.max_logprobs,
    }
    for name, most in limits.items():
        if fields.get(name, 0) > most:
            raise FieldError(f"{name}={fields[name]}: this server allows up to {most}", name)
    try:
        return SamplingParams(**fields)
    except UsageError as error:
        named = re.match(r"(\w+)\b", str(error))
        known = named is not None and named[1] in SamplingParams.__struct_fields__
        raise FieldError(str(error), named[1] if named is not None and known else None) from None


class Prompts:
    """Makes requests of prompts, off the event loop where that takes long.

    Args:
        intake: of the model.
        options: limits of this server.
        call: who asks.
        body: what is asked.
    """

    def __init__(
        self, intake: Intake, options: ServerOptions, call: Call, body: Generation
    ) -> None:
        self._intake, self._options, self._call, self._body = intake, options, call, body

    async def requests(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: SamplingParams,
        default_max_tokens: int | None,
    ) -> list[Request]:
        """Returns one request for each prompt."""
        return await aside(sum(map(len, prompts)), self._all, prompts, params, default_max_tokens)

    async def chat(self, messages: Sequence[Message], params: SamplingParams) -> Request:
        """Returns the request for the next turn of a conversation."""
        turns = plain_messages(messages)
        size = sum(len(turn.get("content", "")) for turn in turns)
        return await aside(size, self._chat, turns, params)

    def _all(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: SamplingParams,
        default_max_tokens: int | None,
    ) -> list[Request]:
        return [self._request(prompt, params, default_max_tokens) for prompt in prompts]

    def _chat(self, turns: Sequence[dict[str, Any]], params: SamplingParams) -> Request:
        return self._request(template(self._intake, turns), params, None)

    def _request(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        default_max_tokens: int | None,
    ) -> Request:
        keep = self._body.truncate_prompt_tokens
        ids = self._intake.encode(prompt)
        if keep is not None:
            ids = ids[-keep:]
        most = self._options.max_prompt_tokens
        if most is not None and len(ids) > most:
            raise ContextLengthError(
                f"the prompt has {len(ids)} tokens; this server takes prompts of up to {most}"
            )
        return self._intake.request(
            ids,
            params,
            default_max_tokens,
            id=f"{self._call.request_id}-{uuid.uuid4().hex[:12]}",
            priority=self._body.priority or 0,
            client=self._call.client,
            salt=self._call.salt,
        )


async def aside(size: int, work: Any, *args: Any) -> Any:
    """Returns what `work` gives for `args`, in a thread where `size` characters are many."""
    return work(*args) if size <= _INLINE_CHARS else await asyncio.to_thread(work, *args)


def template(intake: Intake, turns: Sequence[dict[str, Any]], **variables: Any) -> list[int]:
    """Returns the tokens of a conversation.

    Raises:
        FieldError: the template refuses the messages, or there is none.
    """
    try:
        return intake.chat(turns, **variables)
    except TokenizerError as error:
        origin = "" if intake.tokenizer is None else intake.tokenizer.origin
        # Where the model lies is nobody's business.
        text = str(error).replace(origin, "this model") if origin else str(error)
        raise FieldError(text, "messages") from None


def plain_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Returns messages as templates read them: text parts joined by line breaks."""
    return [_plain(message) for message in messages]


def _plain(message: Message) -> dict[str, Any]:
    content = message.content
    if isinstance(content, list):
        content = "\n".join(part.text for part in content)
    turn: dict[str, Any] = {"role": message.role, "content": content or ""}
    return turn if message.name is None else turn | {"name": message.name}


def check_model(asked: str | None, served: str) -> None:
    """Checks that a request is for the model that is served here.

    Raises:
        ModelNotFoundError: it names another.
    """
    if asked is not None and asked != served:
        raise ModelNotFoundError(f"the model {asked!r:.80} is not served here; use {served!r}")
