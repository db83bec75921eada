"""What a server knows of a model from its files, without weights and without JAX.

files = ModelFiles.find("tiny")
files.intake("tiny"), files.card("tiny")
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from jaxserve.checkpoint import inspect
from jaxserve.checkpoint.info import CheckpointInfo
from jaxserve.checkpoint.locate import locate
from jaxserve.checkpoint.remote import is_address
from jaxserve.config import KvDtype, Quantization
from jaxserve.errors import UsageError
from jaxserve.serving.intake import Intake
from jaxserve.serving.service import ModelCard
from jaxserve.slow_tokenizer import OTHER_FILES, SENTENCEPIECE_FILES
from jaxserve.tokenizer import FAST_FILE, Tokenizer

DTYPES = ("bfloat16", "float32")
TOKENIZER_FILES = (FAST_FILE, *SENTENCEPIECE_FILES, *OTHER_FILES)


@dataclass(frozen=True)
class ModelFiles:
    """A checkpoint directory.

    Attributes:
        info: what is in it.
        dtype: in which the model runs.
    """

    info: CheckpointInfo
    dtype: str

    @classmethod
    def find(cls, model: str | Path, dtype: str | None = None) -> Self:
        """Returns the files of a model.

        Args:
            model: "tiny" or "tiny-draft" (shipped), a checkpoint directory, its address in an
                object store, or a hub name.
            dtype: None takes the checkpoint's, if models run in it.

        Raises:
            CheckpointError: files are missing or damaged.
            UnsupportedError: the architecture is not supported.
            UsageError: models do not run in the dtype.
        """
        info = inspect(locate(model))
        return cls(info, run_dtype(dtype, info.dtype))

    def tokenizer(self, origin: str | None = None) -> Tokenizer | None:
        """Returns the tokenizer, or None if there is none.

        Args:
            origin: how error messages call it; None takes the path.
        """
        if not has_tokenizer(self.info.path):
            return None
        found = Tokenizer.from_dir(self.info.path)
        return found if origin is None else replace(found, origin=origin)

    def intake(self, name: str) -> Intake:
        """Returns what makes requests; its errors name no paths."""
        return Intake.of(self.info.config, self.tokenizer(f"model {name}"), self.info.generation)

    def card(self, name: str) -> ModelCard:
        """Returns what a server tells of the model under a name."""
        config = self.info.config
        return ModelCard(
            name=name,
            created=int(time.time()),
            architecture=self.info.family,
            dtype=self.dtype,
            max_context_tokens=config.max_context_tokens,
            vocab_size=config.vocab_size,
            num_parameters=self.info.num_parameters,
        )


def name_of(model: str) -> str:
    """Returns what a model is called: without the folders it lies in."""
    if is_address(model):
        return model.rstrip("/").rpartition("/")[2]
    return Path(model).name if Path(model).is_dir() else model


def has_tokenizer(path: Path) -> bool:
    """Returns whether a checkpoint directory holds files of a tokenizer."""
    return any((path / name).exists() for name in TOKENIZER_FILES)


def quantization(asked: str | None, info: CheckpointInfo) -> Quantization | None:
    """Returns what is rounded to int8: what was asked for, or what the checkpoint was made for.

    Raises:
        UsageError: there is no such choice.
    """
    chosen = info.quantize if asked is None else asked
    if chosen is None:
        return None
    if chosen not in list(Quantization):
        raise UsageError(f"quantize={chosen!r} is not supported; use {' or '.join(Quantization)}")
    return Quantization(chosen)


def kv_rounding(asked: str | None) -> KvDtype | None:
    """Returns the type that keys and values are rounded to; None keeps that of activations.

    Raises:
        UsageError: there is no such choice.
    """
    return None if asked is None else KvDtype.named(asked)


def run_dtype(asked: str | None, stored: str) -> str:
    """Returns the dtype to run in: the one asked for, or that of the checkpoint if we run it.

    Raises:
        UsageError: models do not run in the dtype asked for.
    """
    if asked is None:
        return stored if stored in DTYPES else "bfloat16"
    if asked not in DTYPES:
        raise UsageError(f"dtype={asked!r} is not supported; use {' or '.join(DTYPES)}")
    return asked
