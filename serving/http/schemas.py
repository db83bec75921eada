"""The bodies of requests in the form of OpenAI's interface, with our additions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from jaxserve.serving.request import (
    MAX_ALLOWED_TOKENS,
    MAX_BAD_WORDS,
    MAX_BIASED_TOKENS,
    MAX_LOGPROBS,
    MAX_N,
    MAX_STOP_TOKENS,
    MAX_STOPS,
)

MAX_MESSAGES = 4096

MAX_PRIORITY = 1000

_INT64 = {"minimum": -(2**63), "maximum": 2**63 - 1}

Tokens = list[Annotated[int, Meta(ge=0, lt=2**31)]]
Top = Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)]


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """What a stream tells beside the text."""

    include_usage: bool | None = None


class Generation(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Fields of completions and of chat completions."""

    model: str | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_N, description="completions of each prompt")] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2, description="0 is greedy")] | None = None
    top_k: Annotated[int, Meta(ge=0, description="0 keeps all tokens")] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=1e-6, le=1e6)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    logit_bias: (
        Annotated[dict[int, float], Meta(max_length=MAX_BIASED_TOKENS, description="by token id")]
        | None
    ) = None
    allowed_token_ids: Annotated[Tokens, Meta(max_length=MAX_ALLOWED_TOKENS)] | None = None
    bad_words: Annotated[list[str], Meta(max_length=MAX_BAD_WORDS)] | None = None
    seed: Annotated[int, Meta(extra_json_schema=_INT64)] | None = None
    max_tokens: Annotated[int, Meta(ge=0)] | None = None
    min_tokens: Annotated[int, Meta(ge=0)] | None = None
    stop: str | Annotated[list[str], Meta(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[Tokens, Meta(max_length=MAX_STOP_TOKENS)] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: Top | None = None
    priority: (
        Annotated[
            int, Meta(ge=-MAX_PRIORITY, le=MAX_PRIORITY, description="lower numbers go first")
        ]
        | None
    ) = None
    truncate_prompt_tokens: (
        Annotated[int, Meta(ge=1, description="only so many of the last tokens are kept")] | None
    ) = None
    return_token_ids: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, Meta(max_length=256, description="a label, for the log")] | None = None


class CompletionRequest(Generation, kw_only=True, forbid_unknown_fields=True):
    """A request for the continuation of prompts."""

    prompt: (
        str
        | Annotated[
            list[str | int | list[int]],
            Meta(
                min_length=1,
                description="strings, or token ids of one prompt, or lists of token ids",
            ),
        ]
    )
    echo: bool | None = None
    logprobs: Annotated[Top, Meta(description="likeliest tokens listed for each")] | None = None


class ContentPart(msgspec.Struct, forbid_unknown_fields=True):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class Message(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A turn of a conversation. Fields that are always null are those of newer interfaces."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    refusal: None = None
    tool_calls: Annotated[list[Any], Meta(max_length=0)] | None = None
    tool_call_id: None = None
    function_call: None = None
    audio: None = None
    annotations: Annotated[list[Any], Meta(max_length=0)] | None = None


class ChatRequest(Generation, kw_only=True, forbid_unknown_fields=True):
    """A request for the assistant's next turn."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)]
    logprobs: bool | None = None
    top_logprobs: Top | None = None
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None


class TokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A text or a conversation whose tokens are asked for."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Tokens whose text is asked for."""

    model: str | None = None
    tokens: Tokens
    skip_special_tokens: bool = False


_TEXT: tuple[Any, ...] = ({"type": "text"},)

_REFUSED_EVERYWHERE: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "response_format": _TEXT,
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "json_schema": (),
    "regex": (),
    "grammar": (),
    "use_beam_search": (False,),
    "beam_width": (1,),
    "length_penalty": (1, 1.0),
    "lora_name": (),
}

REFUSED_IN_COMPLETIONS: dict[str, tuple[Any, ...]] = {**_REFUSED_EVERYWHERE, "suffix": ("",)}
"""Known fields that are not supported, and the values of each that ask for nothing."""

REFUSED_IN_CHAT: dict[str, tuple[Any, ...]] = {
    **_REFUSED_EVERYWHERE,
    "tools": ([],),
    "tool_choice": ("none",),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none",),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "store": (False,),
    "metadata": ({},),
    "service_tier": ("auto", "default"),
    "prompt_cache_key": (),
    "safety_identifier": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "echo": (False,),
}
"""The same for chats."""
