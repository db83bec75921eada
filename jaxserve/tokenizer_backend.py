"""The engines that map text to token ids and back, behind one interface."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import tokenizers

from jaxserve.errors import TokenizerError
from jaxserve.text_stream import TextStream, decoder_spec
from jaxserve.tokenizer_config import TokenizerConfig


class Backend(Protocol):
    """What `Tokenizer` asks of an engine."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Returns the token ids of `text`."""
        ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Returns the text of token ids; ids without a token add nothing."""
        ...

    def token(self, token_id: int) -> str | None:
        """Returns the token with this id as the vocabulary writes it, or None."""
        ...

    def token_id(self, token: str) -> int | None:
        """Returns the id of a token of the vocabulary, or None."""
        ...

    def text_stream(self) -> TextStream | None:
        """Returns a fresh stream that decodes as `decode` does, or None where there is none."""
        ...

    def vocab_size(self) -> int:
        """Returns the number that all token ids are below; slow, call it once."""
        ...

    def special_ids(self) -> frozenset[int]:
        """Returns the ids that `skip_special_tokens` leaves out; slow, call it once."""
        ...


@dataclass(frozen=True)
class FastBackend:
    """The `tokenizers` library.

    Args:
        library: the tokenizer; it belongs to this object, nobody changes it any more.
    """

    library: tokenizers.Tokenizer

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Returns the token ids of `text`."""
        return self.library.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Returns the text of token ids."""
        return self.library.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token(self, token_id: int) -> str | None:
        """Returns the token with this id, or None."""
        return self.library.id_to_token(token_id)

    def token_id(self, token: str) -> int | None:
        """Returns the id of a token, or None."""
        return self.library.token_to_id(token)

    def text_stream(self) -> TextStream | None:
        """Returns a fresh stream that decodes as `decode` does, or None where there is none."""
        return TextStream.from_spec(self._decoder_spec)

    def vocab_size(self) -> int:
        """Returns the number that all token ids are below; slow, call it once."""
        return 1 + max(self.library.get_vocab(with_added_tokens=True).values(), default=-1)

    def special_ids(self) -> frozenset[int]:
        """Returns the ids that `skip_special_tokens` leaves out; slow, call it once."""
        added = self.library.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)

    @cached_property
    def _decoder_spec(self) -> Mapping[str, Any] | None:
        return decoder_spec(self.library.decoder)


def load_fast(file: Path, config: TokenizerConfig) -> FastBackend:
    """Returns the tokenizer of a tokenizer.json, with the tokens that `config` adds to it.

    Raises:
        TokenizerError: the file is broken, or a token cannot have the number that it should.
    """
    try:
        library = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise TokenizerError(
            f"{file} is not a tokenizer that tokenizers {tokenizers.__version__} can read: "
            f"{error}; download it again, or upgrade tokenizers"
        ) from error
    library.no_truncation()  # a file may carry the limits of the training run that wrote it
    library.no_padding()
    return FastBackend(with_tokens(library, config, str(file)))


def with_tokens(
    library: tokenizers.Tokenizer, config: TokenizerConfig, origin: str
) -> tokenizers.Tokenizer:
    """Returns `library` after giving it the added and special tokens of `config`.

    Args:
        library: changed in place.
        origin: where it comes from, for the error message.

    Raises:
        TokenizerError: a token cannot have the number that `config` states.
    """
    # The library can make a token special, but not take it back.
    special = {t.content for t in library.get_added_tokens_decoder().values() if t.special}
    _add_tokens(
        library,
        [
            tokenizers.AddedToken(
                entry.content,
                single_word=entry.single_word,
                lstrip=entry.lstrip,
                rstrip=entry.rstrip,
                normalized=entry.normalized,
                special=entry.special or entry.content in special,
            )
            for entry in config.added_tokens
        ],
    )
    for entry in config.added_tokens:
        found = library.token_to_id(entry.content)
        if found != entry.id and library.id_to_token(entry.id) != entry.content:
            raise TokenizerError(
                f"added_tokens_decoder gives {entry.content!r} the id {entry.id}, but {origin} "
                f"gives it {found}; the two files are not of the same checkpoint"
            )
    known = {token.content: token for token in library.get_added_tokens_decoder().values()}
    names = dict.fromkeys([*config.special_tokens.values(), *config.extra_special_tokens])
    _add_tokens(library, [_as_special(known.get(name), name) for name in names])
    library.encode_special_tokens = config.split_special_tokens
    return library


def _add_tokens(library: tokenizers.Tokenizer, tokens: list[tokenizers.AddedToken]) -> None:
    """Adds tokens, or changes the flags of those that are there; none that is the same already."""
    present = {_flags(token) for token in library.get_added_tokens_decoder().values()}
    missing = [token for token in tokens if _flags(token) not in present]
    if missing:
        library.add_tokens(missing)  # pyright: ignore[reportUnknownMemberType]


def _as_special(token: tokenizers.AddedToken | None, content: str) -> tokenizers.AddedToken:
    if token is None:
        return tokenizers.AddedToken(content, special=True, normalized=False)
    return tokenizers.AddedToken(
        content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=True,
    )


def _flags(token: tokenizers.AddedToken) -> tuple[str, bool, bool, bool, bool, bool]:
    return (
        token.content,
        token.single_word,
        token.lstrip,
        token.rstrip,
        token.normalized,
        token.special,
    )
