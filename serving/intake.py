"""Takes what a user asks for and makes it a `Request`: tokens, with everything decided.

    intake = Intake.of(config, tokenizer, defaults)
    intake.request("def add(", SamplingParams(max_tokens=8))
    intake.request(intake.chat([{"role": "user", "content": "Hello"}]), SamplingParams(), None)

It imports no JAX, so that a process that only talks to users stays light.
"""

from __future__ import annotations

import secrets
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral
from typing import Any, Self

import msgspec

from jaxserve.checkpoint.generation_config import GenerationDefaults
from jaxserve.config import ModelConfig
from jaxserve.errors import ContextLengthError, TokenizerError, UsageError
from jaxserve.serving.request import MAX_BAD_WORD_TOKENS, Request, SamplingParams
from jaxserve.tokenizer import Tokenizer

Prompt = str | Sequence[int]

DEFAULT_MAX_TOKENS = 128
"""Length of a completion when neither the request nor the model names one."""

LONGEST_TEXT = 1 << 24
"""Characters that no prompt exceeds, however long the model's tokens."""


@dataclass(frozen=True)
class Intake:
    """Checks prompts and parameters against a model. Safe to share between threads.

    Attributes:
        vocab_size: all token ids are below.
        max_context_tokens: longest prompt and completion together.
        tokenizer: None leaves token ids as the only way in.
        defaults: what the model's authors want where a request says nothing.
        eos_token_ids: tokens that end a completion.
    """

    vocab_size: int
    max_context_tokens: int
    tokenizer: Tokenizer | None = None
    defaults: GenerationDefaults = field(default_factory=GenerationDefaults)
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        tokenizer: Tokenizer | None,
        defaults: GenerationDefaults,
    ) -> Self:
        """Returns the intake of a model; without end tokens in `defaults` the tokenizer's end."""
        known = () if tokenizer is None else tokenizer.eos_token_ids
        ends = defaults.eos_token_ids or known
        return cls(config.vocab_size, config.max_context_tokens, tokenizer, defaults, ends)

    def request(
        self,
        prompt: Prompt,
        asked: SamplingParams,
        default_max_tokens: int | None = DEFAULT_MAX_TOKENS,
        *,
        id: str | None = None,
        **fields: Any,
    ) -> Request:
        """Returns a request with every parameter decided.

        Args:
            prompt: text, or token ids.
            asked: what the user asks for; the model's defaults fill it up.
            default_max_tokens: where neither names a length; None is all that the context leaves.
            id: None draws one.
            fields: others of `Request`.

        Raises:
            UsageError: the prompt is empty or malformed, a parameter is out of range, or all
                allowed tokens are banned.
            ContextLengthError: prompt and max_tokens exceed the model's context.
            TokenizerError: the model has no tokenizer, and there is text.
        """
        ids = self.encode(prompt)
        params = asked.resolved(sampling_defaults(self.defaults))
        self.check_ids([*params.logit_bias, *params.stop_token_ids, *params.allowed_token_ids])
        if params.stop and self.tokenizer is None:
            raise UsageError("stop strings need a tokenizer; use stop_token_ids")
        room = self._room(ids, asked)
        wanted = params.max_tokens
        if wanted is None and self.defaults.max_length is not None:
            wanted = max(1, self.defaults.max_length - len(ids))
        seed = params.seed
        if seed is None:
            seed = 0 if params.greedy else secrets.randbits(63)
        max_tokens = min(wanted or default_max_tokens or room, room)
        params = msgspec.structs.replace(params, seed=seed, max_tokens=max_tokens)
        if (params.min_tokens or 0) > max_tokens:
            raise UsageError(
                f"min_tokens={params.min_tokens} exceeds max_tokens={max_tokens}, which is "
                "the default or what the context leaves; set max_tokens or lower min_tokens"
            )
        eos = () if params.ignore_eos else self.eos_token_ids
        stop_ids = tuple(sorted({*eos, *params.stop_token_ids}))
        bad_word_ids = self._bad_words(params.bad_words)
        _check_allowed(params, stop_ids, bad_word_ids)
        return Request(
            id=uuid.uuid4().hex if id is None else id,
            prompt=tuple(ids),
            params=params,
            stop_ids=stop_ids,
            bad_word_ids=bad_word_ids,
            **fields,
        )

    def encode(self, prompt: Prompt) -> list[int]:
        """Returns the token ids of a prompt: of its text, or as they are.

        Raises:
            UsageError: it is empty, or neither text nor token ids of the vocabulary.
            ContextLengthError: the text is longer than any that fits the context.
            TokenizerError: it is text, and the model has no tokenizer.
        """
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise TokenizerError(
                    "this checkpoint has no tokenizer; pass the prompt as a list of token ids"
                )
            if len(prompt) > self.max_text_chars:
                raise ContextLengthError(
                    f"a prompt of {len(prompt)} characters cannot fit the context of "
                    f"{self.max_context_tokens} tokens; shorten it to at most "
                    f"{self.max_text_chars} characters"
                )
            ids = self.tokenizer.encode(prompt)
        else:
            ids = [int(i) for i in prompt if isinstance(i, Integral)]
            if len(ids) != len(prompt):
                raise UsageError(
                    f"a prompt is text or a list of token ids (integers), not {prompt!r:.80}"
                )
            self.check_ids(ids)
        if not ids:
            raise UsageError("the prompt is empty; give at least one token of text")
        return ids

    def chat(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> list[int]:
        """Returns the token ids of a conversation's prompt, by the model's chat template.

        Args:
            messages: mappings with `role` and `content`, oldest first.
            variables: what else the template reads.

        Raises:
            TokenizerError: there is no tokenizer or template, or it refuses the messages.
            UsageError: the messages are malformed.
            ContextLengthError: their text is longer than any that fits the context.
        """
        if self.tokenizer is None:
            raise TokenizerError("this checkpoint has no tokenizer; chat needs one")
        if isinstance(messages, Mapping) or not all(isinstance(m, Mapping) for m in messages):
            raise UsageError(
                'messages must be a list of mappings, as in [{"role": "user", "content": "..."}]'
            )
        size = sum(len(c) for m in messages if isinstance(c := m.get("content"), str))
        if size > self.max_text_chars:
            raise ContextLengthError(
                f"messages of {size} characters cannot fit the context of "
                f"{self.max_context_tokens} tokens; shorten them to at most "
                f"{self.max_text_chars} characters"
            )
        return self.tokenizer.chat(messages, **variables)

    def check_ids(self, ids: Sequence[int]) -> None:
        """Checks that token ids lie in the vocabulary.

        Raises:
            UsageError: one does not.
        """
        outside = [i for i in ids if not 0 <= i < self.vocab_size]
        if outside:
            raise UsageError(
                f"token id {outside[0]} is outside the vocabulary of {self.vocab_size}; "
                f"use 0 to {self.vocab_size - 1}"
            )

    @cached_property
    def max_text_chars(self) -> int:
        """Returns how many characters a text may have before its tokens are counted at all.

        No more than the context holds of the longest tokens.
        """
        if self.tokenizer is None:
            return LONGEST_TEXT
        tokens = map(self.tokenizer.token, range(self.tokenizer.vocab_size))
        longest = max((len(token) for token in tokens if token), default=1)
        # Normalisation may shorten a text; four to one is more than any that we know.
        return min(4 * longest * self.max_context_tokens, LONGEST_TEXT)

    def _room(self, ids: Sequence[int], asked: SamplingParams) -> int:
        """Returns the tokens that the context leaves to a completion."""
        room = self.max_context_tokens - len(ids)
        if room < 1:
            raise ContextLengthError(
                f"a prompt of {len(ids)} tokens leaves no room in the context of "
                f"{self.max_context_tokens} tokens; shorten it to at most "
                f"{self.max_context_tokens - 1}"
            )
        if (asked.max_tokens or 1) > room:
            raise ContextLengthError(
                f"a prompt of {len(ids)} tokens and max_tokens={asked.max_tokens} exceed the "
                f"context of {self.max_context_tokens} tokens; shorten the prompt or use "
                f"max_tokens up to {room}"
            )
        return room

    def _bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Returns the token forms of words: at the start of a text and after a space."""
        if words and self.tokenizer is None:
            raise TokenizerError("bad_words need a tokenizer, and this checkpoint has none")
        forms: dict[tuple[int, ...], None] = {}
        for word in words:
            assert self.tokenizer is not None
            for text in (word, f" {word.lstrip()}"):
                ids = tuple(self.tokenizer.encode(text, add_special_tokens=False))
                if len(ids) > MAX_BAD_WORD_TOKENS:
                    raise UsageError(
                        f"bad_words: {word!r} has {len(ids)} tokens; at most {MAX_BAD_WORD_TOKENS} "
                        "are supported"
                    )
                if ids:
                    forms[ids] = None
        return tuple(forms)


def _check_allowed(
    params: SamplingParams, stop_ids: Sequence[int], bad_word_ids: Sequence[tuple[int, ...]]
) -> None:
    """Checks that the first token of a completion can be one of those that are allowed."""
    if not params.allowed_token_ids:
        return
    banned = {word[0] for word in bad_word_ids if len(word) == 1}
    left = set(params.allowed_token_ids) - banned
    if not left:
        raise UsageError(
            f"allowed_token_ids={params.allowed_token_ids!r:.80} are all banned by bad_words; "
            "allow another token or take a word out"
        )
    if params.min_tokens and left <= set(stop_ids):
        raise UsageError(
            f"allowed_token_ids={params.allowed_token_ids!r:.80} leave only stop tokens, which "
            f"min_tokens={params.min_tokens} forbids; allow another token or use min_tokens=0"
        )


def sampling_defaults(defaults: GenerationDefaults) -> dict[str, Any]:
    """Returns the values of `SamplingParams` fields that a generation_config.json states."""
    values = {
        "temperature": 0.0 if defaults.greedy else defaults.temperature,
        "top_k": defaults.top_k,
        "top_p": defaults.top_p,
        "min_p": defaults.min_p,
        "repetition_penalty": defaults.repetition_penalty,
        "max_tokens": defaults.max_new_tokens,
        "min_tokens": defaults.min_new_tokens,
    }
    return {name: value for name, value in values.items() if value is not None}
