"""Tokenizers without a tokenizer.json, through the transformers library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import tokenizers

from jaxserve.errors import TokenizerError
from jaxserve.text_stream import TextStream
from jaxserve.tokenizer_backend import Backend, FastBackend, with_tokens
from jaxserve.tokenizer_config import TokenizerConfig

SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
OTHER_FILES = ("vocab.json", "vocab.txt", "tiktoken.model", "tekken.json")


@dataclass(frozen=True)
class SlowBackend:
    """A tokenizer of transformers that is written in Python.

    Args:
        library: the `PreTrainedTokenizer`; it belongs to this object.
    """

    library: Any

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Returns the token ids of `text`."""
        return list(self.library.encode(text, add_special_tokens=add_special_tokens))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Returns the text of token ids; ids without a token add nothing."""
        known = [token_id for token_id in ids if self.token(token_id) is not None]
        return self.library.decode(
            known, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )

    def token(self, token_id: int) -> str | None:
        """Returns the token with this id, or None."""
        return self._tokens.get(token_id)

    def token_id(self, token: str) -> int | None:
        """Returns the id of a token, or None."""
        return self.library.get_vocab().get(token)

    def text_stream(self) -> TextStream | None:
        """Returns None: what the Python code does to tokens cannot be read from it."""
        return None

    def vocab_size(self) -> int:
        """Returns the number that all token ids are below."""
        return 1 + max(self._tokens, default=-1)

    def special_ids(self) -> frozenset[int]:
        """Returns the ids that `skip_special_tokens` leaves out."""
        return frozenset(self.library.all_special_ids)

    @cached_property
    def _tokens(self) -> Mapping[int, str]:
        return {token_id: token for token, token_id in self.library.get_vocab().items()}


def load_slow(directory: Path, config: TokenizerConfig) -> tuple[Backend, TokenizerConfig]:
    """Returns the tokenizer of a directory without tokenizer.json, and its special tokens.

    transformers turns most of these into the form of the `tokenizers` library, which is then used.
    Code that comes with the checkpoint is never run, and nothing is downloaded.

    Args:
        config: what the directory's other files say; the names of special tokens that only the
            tokenizer's class knows are added to the returned one.

    Raises:
        TokenizerError: transformers or sentencepiece is not installed, or cannot read the files.
    """
    if any((directory / name).is_file() for name in SENTENCEPIECE_FILES):
        _require("sentencepiece", directory)
    library = _auto_tokenizer(directory)
    known: dict[str, str] = {name: str(text) for name, text in library.special_tokens_map.items()}
    config = replace(config, special_tokens={**known, **config.special_tokens})
    fast = getattr(library, "backend_tokenizer", None)
    if isinstance(fast, tokenizers.Tokenizer):
        fast.no_truncation()
        fast.no_padding()
        return FastBackend(with_tokens(fast, config, str(directory))), config
    return SlowBackend(library), config


def _auto_tokenizer(directory: Path) -> Any:
    """Returns the tokenizer that transformers makes of a directory."""
    _require("transformers", directory)
    from transformers import AutoTokenizer  # over a second: only for those who need it

    auto_tokenizer: Any = AutoTokenizer  # its types are unknown
    try:
        return auto_tokenizer.from_pretrained(
            str(directory), trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # each tokenizer class has its own ways to fail
        raise TokenizerError(
            f"transformers cannot load the tokenizer of {directory}: {error}; convert it to a "
            "tokenizer.json (save_pretrained of a fast tokenizer) on a machine where it loads"
        ) from error


def _require(package: str, directory: Path) -> None:
    if find_spec(package) is None:
        raise TokenizerError(
            f"{directory} has no tokenizer.json, and reading its older tokenizer files needs "
            f"{package}, which is not installed; pip install {package}, or add a tokenizer.json"
        )
