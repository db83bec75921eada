"""The tokenizer of a checkpoint: text to token ids, token ids to text, chats to prompts.

tokenizer = Tokenizer.from_dir("path/to/checkpoint")
ids = tokenizer.encode("Hello")
tokenizer.decode(ids)                                   # "Hello"
tokenizer.chat([{"role": "user", "content": "Hello"}])  # the ids of a whole prompt
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from jaxserve.errors import TokenizerError, UsageError
from jaxserve.slow_tokenizer import OTHER_FILES, SENTENCEPIECE_FILES, load_slow
from jaxserve.text_stream import TextStream
from jaxserve.tokenizer_backend import Backend, load_fast
from jaxserve.tokenizer_config import (
    CONFIG_FILE,
    DEFAULT_TEMPLATE,
    TEMPLATE_FILE,
    TEMPLATE_JSON_FILE,
    TokenizerConfig,
)

if TYPE_CHECKING:
    from jaxserve.chat_template import ChatTemplate

FAST_FILE = "tokenizer.json"
_MAX_ID = 2**32 - 1


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer and the special tokens, options and chat templates that came with it.

    Immutable and safe to share between threads.

    Args:
        backend: the engine.
        config: what the files beside the tokenizer say.
        origin: where it comes from, for error messages.
    """

    backend: Backend = field(repr=False)
    config: TokenizerConfig = field(repr=False)
    origin: str = "this tokenizer"

    @staticmethod
    def from_dir(path: str | os.PathLike[str]) -> Tokenizer:
        """Returns the tokenizer of a checkpoint directory.

        Args:
            path: a directory with tokenizer.json, or with older tokenizer files that transformers
                reads.

        Raises:
            TokenizerError: there is no tokenizer, a file is broken, or reading it needs a package
                that is not installed.
        """
        directory = Path(path)
        if not directory.is_dir():
            raise TokenizerError(f"{directory} is not a directory; pass a checkpoint directory")
        config = TokenizerConfig.read(directory)
        if (directory / FAST_FILE).is_file():
            backend: Backend = load_fast(directory / FAST_FILE, config)
        elif any((directory / name).is_file() for name in (*SENTENCEPIECE_FILES, *OTHER_FILES)):
            backend, config = load_slow(directory, config)
        else:
            looked_for = ", ".join((FAST_FILE, *SENTENCEPIECE_FILES, *OTHER_FILES))
            raise TokenizerError(
                f"{directory} has no tokenizer: looked for {looked_for}; "
                "add one of them, or pass token ids instead of text"
            )
        return Tokenizer(backend, config, str(directory))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Returns the token ids of `text`.

        Args:
            text: any text; special tokens written in it become their ids.
            add_special_tokens: whether to add what the tokenizer puts around a text, such as BOS.

        Raises:
            UsageError: `text` is not text that UTF-8 can express.
        """
        try:
            ids = self.backend.encode(text, add_special_tokens)
        except (TypeError, UnicodeEncodeError) as error:
            raise UsageError(f"{text!r:.80} is not text: {_why_not_text(text)}") from error
        return self._framed(ids) if add_special_tokens else ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Returns the text of token ids; bytes that are not UTF-8 become U+FFFD.

        Args:
            ids: token ids; those that the vocabulary does not have add nothing.
            skip_special_tokens: whether to leave out special tokens.

        Raises:
            UsageError: an id is not an unsigned 32-bit integer.
        """
        try:
            return self.backend.decode(ids, skip_special_tokens)
        except (OverflowError, TypeError) as error:
            raise UsageError(
                f"ids={ids!r:.80} are not all integers in 0..{_MAX_ID}; pass token ids"
            ) from error

    def token(self, token_id: int) -> str | None:
        """Returns the token with this id as the vocabulary writes it, or None if it has none."""
        if not 0 <= token_id <= _MAX_ID:
            raise UsageError(f"token id {token_id} is not in 0..{_MAX_ID}; pass a token id")
        return self.backend.token(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        """Returns the bytes that a token adds in the middle of a text, empty for an unknown id.

        They need not be UTF-8: a character may lie across tokens.
        """
        token = self.token(token_id)
        return b"" if token is None else self._pieces.token_bytes(token)

    def text_stream(self) -> TextStream | None:
        """Returns a fresh stream that decodes tokens exactly, or None where none is known."""
        return self.backend.text_stream()

    def is_special(self, token_id: int) -> bool:
        """Returns whether `skip_special_tokens` leaves this token out."""
        return token_id in self._special_ids

    @cached_property
    def vocab_size(self) -> int:
        """Returns the number that all token ids are below, added tokens included."""
        return self.backend.vocab_size()

    @cached_property
    def bos_token_id(self) -> int | None:
        """Returns the id of the token that begins a text, if there is one."""
        return self._named_id("bos_token")

    @cached_property
    def eos_token_id(self) -> int | None:
        """Returns the id of the token that ends a text, if there is one."""
        return self._named_id("eos_token")

    @cached_property
    def pad_token_id(self) -> int | None:
        """Returns the id of the padding token, if there is one."""
        return self._named_id("pad_token")

    @cached_property
    def unk_token_id(self) -> int | None:
        """Returns the id of the token for unknown text, if there is one."""
        return self._named_id("unk_token")

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Returns the ids at which this tokenizer says a text ends; a model may name more."""
        return () if self.eos_token_id is None else (self.eos_token_id,)

    @cached_property
    def add_bos_token(self) -> bool:
        """Returns whether `encode` begins with the BOS token."""
        stated = self.config.add_bos_token
        return self._adds[0] if stated is None else stated and self.bos_token_id is not None

    @cached_property
    def add_eos_token(self) -> bool:
        """Returns whether `encode` ends with the EOS token."""
        stated = self.config.add_eos_token
        return self._adds[1] if stated is None else stated and self.eos_token_id is not None

    @property
    def has_chat_template(self) -> bool:
        """Returns whether `apply_chat_template` and `chat` can be used."""
        return bool(self.config.chat_templates)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        template: str | None = None,
        **variables: Any,
    ) -> str:
        """Returns the prompt that the checkpoint's chat template makes of a conversation.

        Args:
            messages: mappings with `role` and `content`, oldest first.
            add_generation_prompt: whether the prompt ends where the assistant's answer begins.
            template: which one, where the checkpoint has several; without it `tool_use` where
                `tools` are given and there is one of that name, else `default`.
            variables: what else the template reads, such as `tools` or `enable_thinking`.

        Raises:
            TokenizerError: there is no (such) template, or it refuses the messages or fails.
            UsageError: the messages are malformed.
        """
        chosen = self._template(template, has_tools=bool(variables.get("tools")))
        return chosen.render(
            messages, add_generation_prompt, **{**self.config.special_tokens, **variables}
        )

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        template: str | None = None,
        **variables: Any,
    ) -> list[int]:
        """Returns the token ids of a conversation's prompt; arguments as `apply_chat_template`.

        The template writes BOS and its like itself, so none are added.
        """
        prompt = self.apply_chat_template(
            messages, add_generation_prompt, template=template, **variables
        )
        return self.encode(prompt, add_special_tokens=False)

    @cached_property
    def _adds(self) -> tuple[bool, bool]:
        """Returns whether the backend itself puts BOS before and EOS after a text."""
        frame = self.backend.encode("", True)
        bos = self.bos_token_id is not None and frame[:1] == [self.bos_token_id]
        rest = frame[1:] if bos else frame
        return bos, self.eos_token_id is not None and rest[-1:] == [self.eos_token_id]

    def _framed(self, ids: list[int]) -> list[int]:
        """Returns `ids`, encoded by the backend, with the BOS and EOS that the options state."""
        bos, eos = self._adds
        if bos != self.add_bos_token:
            ids = ids[1:] if bos else [cast("int", self.bos_token_id), *ids]
        if eos != self.add_eos_token:
            ids = ids[:-1] if eos else [*ids, cast("int", self.eos_token_id)]
        return ids

    def _template(self, name: str | None, has_tools: bool) -> ChatTemplate:
        if not self._templates:
            raise TokenizerError(
                f"{self.origin} has no chat template: looked for {TEMPLATE_FILE}, "
                f"{TEMPLATE_JSON_FILE} and chat_template in {CONFIG_FILE}; "
                "add one, or send the prompt as text"
            )
        if name is None:
            name = "tool_use" if has_tools and "tool_use" in self._templates else DEFAULT_TEMPLATE
        if name not in self._templates:
            raise TokenizerError(
                f"{self.origin} has no chat template {name!r}; "
                f"choose template from {sorted(self._templates)}"
            )
        return self._templates[name]

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return self.backend.special_ids()

    @cached_property
    def _templates(self) -> Mapping[str, ChatTemplate]:
        from jaxserve.chat_template import ChatTemplate  # jinja2 only for those who chat

        return {
            name: ChatTemplate(source, origin=f"chat template {name!r} of {self.origin}")
            for name, source in (self.config.chat_templates or {}).items()
        }

    @cached_property
    def _pieces(self) -> TextStream:
        sentencepiece = {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
            ],
        }
        stream = self.text_stream() or TextStream.from_spec(sentencepiece)
        assert stream is not None
        return stream

    def _named_id(self, name: str) -> int | None:
        token = self.config.special_tokens.get(name)
        return None if token is None else self.backend.token_id(token)


def _why_not_text(text: object) -> str:
    """Returns what is wrong with a text that cannot be encoded."""
    if not isinstance(text, str):
        return f"it is a {type(text).__name__}; pass a string"
    for position, char in enumerate(text):
        if "\ud800" <= char <= "\udfff":
            return f"character {position} is a lone surrogate (U+{ord(char):04X}); remove it"
    return "it has no UTF-8 form"
