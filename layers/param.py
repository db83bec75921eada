"""Weights: declared once; shapes, shardings, loading and cost all read the declaration.

    declare = Declare(dtype="bfloat16", orientation=Orientation.OUT_IN, fuse=True)
    qkv = declare.group(inputs=(Axis("embed", 256),),
                        q=(Axis("heads", 8), Axis("head", 32)),
                        k=(Axis("kv_heads", 2), Axis("head", 32)),
                        v=(Axis("kv_heads", 2), Axis("head", 32)))
    q, k, v = linear_group(x, qkv, comm, kernels)        # x: [T, embed]

A declaration is logical: it names inputs and outputs. How an array is stored (which side
comes first, which weights lie in one array) is the backend's choice, made in `Declare`.
Values are abstract here; parameters live outside, in a plain tree of the same paths.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx


class Axis(NamedTuple):
    """A logical axis: a word such as "embed", and its size."""

    name: str
    size: int


Axes = tuple[Axis, ...]


class Orientation(StrEnum):
    """Which side of a stored weight comes first."""

    OUT_IN = "out_in"
    IN_OUT = "in_out"


class Init(StrEnum):
    """Distribution a fresh parameter is drawn from."""

    FAN_IN = "fan_in"
    EMBED = "embed"
    ZEROS = "zeros"
    ONES = "ones"


class Parameter(nnx.Param):
    """An nnx parameter that knows its logical axes (`axes`) and initialiser (`init`)."""


class Weight(nnx.Module):
    """A linear map from `inputs` to `outputs`, stored as one array.

    Attributes:
        values: [*outputs, *inputs] or [*inputs, *outputs], by `orientation`.
        stored: axes of the values.
        scales: None; per-output-channel scales of a quantised weight.
        bias: [*outputs], or None.
    """

    def __init__(self, declare: Declare, inputs: Axes, outputs: Axes, bias: bool) -> None:
        self.inputs = inputs
        self.outputs = outputs
        self.orientation = orientation = declare.orientation
        out_first = orientation is Orientation.OUT_IN
        self.stored = outputs + inputs if out_first else inputs + outputs
        self.values = declare.parameter(self.stored, Init.FAN_IN, fan_in=size_of(inputs))
        self.scales: Parameter | None = None
        self.bias = declare.parameter(outputs, Init.ZEROS) if bias else None


class WeightGroup(nnx.Module):
    """Linear maps with a common input: `members` in order, stored apart or as one weight.

    Attributes:
        members: name -> output axes, in the order in which outputs are returned.
        fused: one Weight whose outputs are all members' outputs end to end, or None.
        separate: name -> Weight where not fused, else empty.
    """

    def __init__(
        self, declare: Declare, inputs: Axes, bias: bool, members: Mapping[str, Axes]
    ) -> None:
        self.inputs = inputs
        self.members = tuple(members.items())
        if declare.fuse:
            total = sum(size_of(axes) for axes in members.values())
            self.fused = declare.weight(inputs, (Axis("fused", total),), bias)
            self.separate = nnx.Dict({})
        else:
            self.fused = None
            self.separate = nnx.Dict(
                {name: declare.weight(inputs, axes, bias) for name, axes in members.items()}
            )


@dataclass(frozen=True, slots=True)
class Declare:
    """How a backend stores weights.

    Attributes:
        dtype: element type of weights and activations.
        orientation: which side of a weight comes first. XLA on CPU reads bfloat16 about twice
            as fast with outputs first; and only so do a row's bits not depend on how many rows
            there are, in float32 too.
        fuse: weights with a common input lie in one array (fewer, larger operations).
        stack: layers that repeat lie in one array per parameter, and one program serves them all;
            otherwise each has its own, and the compiler sees every layer.
        copies: length of that array, while a repeated layer is declared.
    """

    dtype: str = "float32"
    orientation: Orientation = Orientation.IN_OUT
    fuse: bool = False
    stack: bool = False
    copies: int | None = None

    @classmethod
    def best(cls, platform: str, dtype: str) -> Declare:
        """Returns how one device of `platform` ("cpu", "gpu", "tpu") stores weights best."""
        on_cpu = platform == "cpu"
        return cls(dtype, Orientation.OUT_IN if on_cpu else Orientation.IN_OUT, fuse=True)

    def weight(self, inputs: Axes, outputs: Axes, bias: bool = False) -> Weight:
        """Returns a declared linear map."""
        return Weight(self, inputs, outputs, bias)

    def group(self, inputs: Axes, bias: bool = False, **members: Axes) -> WeightGroup:
        """Returns declared linear maps with a common input."""
        return WeightGroup(self, inputs, bias, members)

    def vector(self, axis: Axis, init: Init) -> Parameter:
        """Returns a declared vector, such as a norm's scale."""
        return self.parameter((axis,), init)

    def table(self, rows: Axis, columns: Axis) -> Parameter:
        """Returns a declared lookup table [rows, columns]."""
        return self.parameter((rows, columns), Init.EMBED)

    def parameter(self, axes: Axes, init: Init, fan_in: int = 1) -> Parameter:
        """Returns a parameter with shape, dtype, axes and initialiser, and no values."""
        if self.copies is not None:
            axes = (Axis("layers", self.copies), *axes)
        value = jax.ShapeDtypeStruct(tuple(a.size for a in axes), jnp.dtype(self.dtype))
        return Parameter(value, axes=tuple(a.name for a in axes), init=init, fan_in=fan_in)


def size_of(axes: Axes) -> int:
    """Returns the number of features that `axes` span."""
    return math.prod(a.size for a in axes)


def named_parameters(module: nnx.Module) -> Iterator[tuple[tuple[str | int, ...], Parameter]]:
    """Yields (path, parameter) of every declared parameter, in a fixed order."""
    for path, leaf in nnx.to_flat_state(nnx.state(module)):
        assert isinstance(leaf, Parameter)
        yield cast(tuple[str | int, ...], path), leaf


def tree_of(flat: Iterable[tuple[tuple[str | int, ...], Any]]) -> dict[Any, Any]:
    """Returns nested dicts with every leaf at its path."""
    tree: dict[Any, Any] = {}
    for path, leaf in flat:
        branch = tree
        for key in path[:-1]:
            branch = branch.setdefault(key, {})
        branch[path[-1]] = leaf
    return tree
