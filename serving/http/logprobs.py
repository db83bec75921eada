"""Log-probabilities as OpenAI's interface writes them."""

from __future__ import annotations

import codecs
import math
from collections.abc import Sequence

import msgspec

from jaxserve.serving.request import TokenLogprob
from jaxserve.tokenizer import Tokenizer

LOWEST = -9999.0
"""Stands for minus infinity, which JSON does not have."""


class TopLogprob(msgspec.Struct):
    """A likely token in a chat."""

    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(msgspec.Struct):
    """A chosen token in a chat."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    """Log-probabilities of an answer in a chat."""

    content: list[ChatLogprob]


class CompletionLogprobs(msgspec.Struct):
    """Log-probabilities of a completion, one entry per token in each list."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(msgspec.Struct):
    """One of the tokens that were likely at a place in the prompt."""

    logprob: float
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]


def finite(logprob: float) -> float:
    """Returns a log-probability that JSON can express."""
    return logprob if math.isfinite(logprob) else LOWEST


class TokenNames:
    """What tokens are called; distinct tokens have distinct names as far as their bytes differ.

    Args:
        tokenizer: None leaves the ids as names.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, tuple[str, bytes]] = {}

    def bytes(self, token_id: int) -> bytes:
        """Returns the bytes that a token stands for."""
        return self._look_up(token_id)[1]

    def name(self, token_id: int) -> str:
        """Returns a token's text, or its bytes in writing where they are not whole characters."""
        return self._look_up(token_id)[0]

    def _look_up(self, token_id: int) -> tuple[str, bytes]:
        """Returns name and bytes; there are no more of them than tokens."""
        if (known := self._known.get(token_id)) is None:
            raw = b"" if self._tokenizer is None else self._tokenizer.token_bytes(token_id)
            known = self._known[token_id] = (_name(token_id, raw), raw)
        return known


def _name(token_id: int, raw: bytes) -> str:
    if not raw:
        return f"token_id:{token_id}"
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class CompletionTokens:
    """Turns the log-probabilities of one completion into lists, as they come.

    It keeps count of the characters before each token. Its single writer is the stream's.
    """

    def __init__(self, names: TokenNames) -> None:
        self._names = names
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def add(self, entries: Sequence[tuple[int, TokenLogprob | None]]) -> CompletionLogprobs:
        """Returns the entries of more tokens: of each its id and log-probability, if it has one."""
        names = self._names
        lists = CompletionLogprobs([], [], [], [])
        for token_id, entry in entries:
            lists.tokens.append(names.name(token_id))
            lists.text_offset.append(self._offset)
            self._offset += len(self._decoder.decode(names.bytes(token_id)))
            lists.token_logprobs.append(None if entry is None else finite(entry.logprob))
            lists.top_logprobs.append(None if entry is None else self._top(entry))
        return lists

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        """Returns the likeliest tokens, and the chosen one in any case."""
        top: dict[str, float] = {}
        for token_id, logprob in (*entry.top, (entry.token_id, entry.logprob)):
            top.setdefault(self._names.name(token_id), finite(logprob))
        return top


def chat_logprobs(names: TokenNames, entries: Sequence[TokenLogprob]) -> ChatLogprobs:
    """Returns the log-probabilities of tokens in a chat."""
    return ChatLogprobs(
        [
            ChatLogprob(
                names.name(entry.token_id),
                finite(entry.logprob),
                list(names.bytes(entry.token_id)),
                [
                    TopLogprob(names.name(token), finite(logprob), list(names.bytes(token)))
                    for token, logprob in entry.top
                ],
            )
            for entry in entries
        ]
    )


def prompt_logprobs(
    names: TokenNames, entries: Sequence[TokenLogprob | None] | None
) -> PromptLogprobs | None:
    """Returns, for each token of a prompt, the likely tokens by id; the prompt's own is first."""
    if entries is None:
        return None
    return [
        None
        if entry is None
        else {
            str(token): PromptLogprob(finite(logprob), names.name(token))
            for token, logprob in ((entry.token_id, entry.logprob), *entry.top)
        }
        for entry in entries
    ]
