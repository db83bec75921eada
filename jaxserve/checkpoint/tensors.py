"""What a checkpoint says of its tensors, before any is read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

# Element types that weights can be loaded from.
LOADABLE = ("float32", "bfloat16", "float16")

Index = tuple[slice, ...]


class Reader(Protocol):
    """The logical weights of an open checkpoint, outputs first, one array each."""

    @property
    def parallel(self) -> int:
        """Returns how many parameters are best read at once."""
        ...

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Returns the shape of a weight, or None where the checkpoint has none of that name."""
        ...

    def where(self, name: str) -> str:
        """Returns the place of a weight, for messages."""
        ...

    def read(self, name: str, index: Index) -> np.ndarray:
        """Returns a slice of a weight in the dtype of the checkpoint; not to be written to."""
        ...


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a checkpoint.

    Attributes:
        name: the checkpoint's own name for it.
        file: where it lies.
        dtype: element type, in NumPy's spelling ("bfloat16").
        shape: its dimensions.
        nbytes: its size.
        offset: first byte within `file`; None where the file is not a plain run of bytes.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int | None = None

    @property
    def size(self) -> int:
        """Returns the number of elements."""
        return math.prod(self.shape)


def listed(names: list[str], most: int = 5) -> str:
    """Returns the first names for an error message, with a count of the others."""
    shown = ", ".join(repr(name) for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
