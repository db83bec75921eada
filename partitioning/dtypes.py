"""Bytes of stored weights and cache, scales included.

    WEIGHTS["int4"].bytes(4096)           # of 4096 elements: 2048 and 32 scales in bfloat16

What the runtime stores today is `config.dtype_bytes`; a planner looks further. No JAX.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from jaxserve.errors import UsageError


@dataclass(frozen=True)
class Stored:
    """How numbers are stored.

    Attributes:
        name: as options and layouts name it.
        bits: of an element.
        group: elements that share a scale; 0 has none, -1 one for each output feature or token.
        scale_bytes: of a scale.
    """

    name: str
    bits: int
    group: int = 0
    scale_bytes: int = 0

    def per_element(self, inputs: int) -> float:
        """Returns bytes of an element, scales included.

        Args:
            inputs: elements that one output feature, or one token and head, has.
        """
        size = self.bits / 8
        if self.group:
            size += self.scale_bytes / (inputs if self.group < 0 else self.group)
        return size

    @property
    def table(self) -> Stored:
        """Returns how embedding and output head are stored beside: rounded to bytes, not less."""
        return self if self.bits >= 8 else WEIGHTS["bfloat16"]

    def kept(self, elements: float, inputs: int, outputs: int) -> float:
        """Returns bytes of a device's part of a weight.

        Scales of output features lie whole on every device; those of groups are cut too.

        Args:
            elements: of the part.
            inputs, outputs: features of the whole weight.
        """
        if self.group < 0:
            return elements * self.bits / 8 + self.scale_bytes * outputs
        return elements * self.per_element(inputs)


@dataclass(frozen=True)
class Several:
    """Ways to store, asked at once: answers are float64[D, 1], one for each."""

    each: tuple[Stored, ...]

    @property
    def name(self) -> str:
        """Returns their names."""
        return ", ".join(one.name for one in self.each)

    @cached_property
    def bits(self) -> Any:
        """Returns the bits of an element."""
        return _column(one.bits for one in self.each)

    @cached_property
    def _fixed(self) -> Any:
        """Returns bytes of an element, but for scales of features or tokens."""
        return _column(one.per_element(1) if one.group >= 0 else one.bits / 8 for one in self.each)

    @cached_property
    def _scales(self) -> Any:
        """Returns bytes of a scale of a feature or token."""
        return _column(one.scale_bytes if one.group < 0 else 0 for one in self.each)

    @cached_property
    def table(self) -> Several:
        """Returns how embedding and output head are stored beside."""
        return Several(tuple(one.table for one in self.each))

    def per_element(self, inputs: int) -> Any:
        """Returns bytes of an element; see `Stored.per_element`."""
        return self._fixed + self._scales / inputs

    def kept(self, elements: float, inputs: int, outputs: int) -> Any:
        """Returns bytes of a device's part; see `Stored.kept`."""
        return elements * self._fixed + self._scales * outputs


def _column(values: Iterable[float]) -> Any:
    return np.array(list(values), np.float64)[:, None]


WEIGHTS = {
    one.name: one
    for one in (
        Stored("float32", 32),
        Stored("bfloat16", 16),
        Stored("float16", 16),
        Stored("int8", 8, -1, 4),
        Stored("float8_e4m3fn", 8, -1, 4),
        Stored("int4", 4, 128, 2),
    )
}
"""Dtypes of weights. int8 and fp8 have a scale for each output feature, int4 for 128 inputs."""

KV = {
    one.name: one
    for one in (
        Stored("float32", 32),
        Stored("bfloat16", 16),
        Stored("float16", 16),
        Stored("int8", 8, -1, 4),
        Stored("float8_e4m3fn", 8, -1, 4),
        Stored("int4", 4, -1, 4),
    )
}
"""Dtypes of keys and values. Those below 16 bits have a scale for each token and head."""

_SHORT = {"bf16": "bfloat16", "f32": "float32", "fp8": "float8_e4m3fn", "f16": "float16"}


def stored(name: str, kind: str) -> Stored:
    """Returns how weights or keys and values are stored.

    Args:
        name: "bfloat16", "int8", ..., or short: "bf16", "fp8".
        kind: "weights" or "kv".

    Raises:
        UsageError: the name is not known.
    """
    table = WEIGHTS if kind == "weights" else KV
    name = _SHORT.get(name, name)
    if name not in table:
        raise UsageError(f"{kind}={name!r} is not known; use one of {', '.join(table)}")
    return table[name]
