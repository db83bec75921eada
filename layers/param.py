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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxserve.config import AttentionSpec, BlockKind, KvDtype, LayerSpec, Quantization
from jaxserve.partitioning.padding import Padding


class Runs(NamedTuple):
    """Where an axis holds something: `number` runs, `stride` apart, each `real` long.

    The rest is zeros, so that the axis divides over a mesh: MLP features have one run, query
    heads one for each group.
    """

    number: int
    real: int
    stride: int


class Joined(NamedTuple):
    """Outputs of several weights in one axis, flattened.

    Attributes:
        members: name -> outputs, in order.
        shares: into how many pieces they are cut; in each piece those of all members follow each
            other.
    """

    members: tuple[tuple[str, Axes], ...]
    shares: int

    @property
    def widths(self) -> tuple[int, ...]:
        """Returns the features of a piece, by member."""
        return tuple(size_of(axes) // self.shares for _, axes in self.members)


class Axis(NamedTuple):
    """A logical axis: a word such as "embed", its size, and what lies in it where.

    Attributes:
        runs: where it is not padded, if it is.
        joined: the outputs that it is made of, if they are several weights'.
    """

    name: str
    size: int
    runs: Runs | None = None
    joined: Joined | None = None

    @property
    def real(self) -> int:
        """Returns the size without padding."""
        if self.joined is not None:
            return sum(_real_size_of(axes) for _, axes in self.joined.members)
        return self.size if self.runs is None else self.runs.number * self.runs.real

    @property
    def padded(self) -> bool:
        """Returns whether some of it is padding."""
        return self.real < self.size

    def spans(self) -> list[tuple[int, int, int]]:
        """Returns (start, start without padding, length) of each run."""
        if self.runs is None:
            return [(0, 0, self.size)]
        number, real, stride = self.runs
        return [(i * stride, i * real, real) for i in range(number)]


Axes = tuple[Axis, ...]


class Orientation(StrEnum):
    """Which side of a stored weight comes first."""

    OUT_IN = "out_in"
    IN_OUT = "in_out"


class Init(StrEnum):
    """Distribution a fresh parameter is drawn from."""

    FAN_IN = "fan_in"
    EMBED = "embed"
    SCALES = "scales"
    ZEROS = "zeros"
    ONES = "ones"


class Parameter(nnx.Param):
    """An nnx parameter that knows its logical axes and its initialiser.

    `axes` names every dimension; `logical` has the axes themselves, without that of the layers.
    """


class Weight(nnx.Module):
    """A linear map from `inputs` to `outputs`, stored as one array.

    Attributes:
        values: [*outputs, *inputs] or [*inputs, *outputs], by `orientation`.
        stored: axes of the values.
        scales: float32[*outputs] of a quantised weight, whose values are int8; else None.
        dtype: of what it gives and, unless it is quantised, of its values.
        quantize: what is rounded where it is used.
        bias: [*outputs], or None.
    """

    def __init__(
        self, declare: Declare, inputs: Axes, outputs: Axes, bias: bool, init: Init
    ) -> None:
        self.inputs = inputs
        self.outputs = outputs
        self.orientation = orientation = declare.orientation
        out_first = orientation is Orientation.OUT_IN
        self.stored = outputs + inputs if out_first else inputs + outputs
        self.dtype = declare.dtype
        self.quantize = quantize = declare.quantize
        fan_in = _real_size_of(inputs)
        self.values = declare.parameter(self.stored, init, fan_in, quantize and "int8")
        # Every device holds all of them; where "embed" lies beside another axis, it would be cut.
        whole = tuple(a._replace(name="channels") if a.name == "embed" else a for a in outputs)
        self.scales = (
            None if quantize is None else declare.parameter(whole, Init.SCALES, fan_in, "float32")
        )
        self.bias = declare.parameter(outputs, Init.ZEROS) if bias else None


class WeightGroup(nnx.Module):
    """Linear maps with a common input: `members` in order, stored apart or as one weight.

    On a mesh a fused weight is cut as its members are: every device has its own part of each, and
    what is scattered later lies as it will be. Members that are cut otherwise stay apart.

    Attributes:
        members: name -> output axes, in the order in which outputs are returned.
        joined: how some of them lie in one weight, or None.
        fused: that weight, or None.
        separate: name -> Weight of the others.
    """

    def __init__(
        self, declare: Declare, inputs: Axes, bias: bool, members: Mapping[str, Axes]
    ) -> None:
        self.inputs = inputs
        self.members = tuple(members.items())
        self.joined = declare.joined(self.members)
        fused, apart = None, dict(members)
        if (joined := self.joined) is not None:
            size = joined.shares * sum(joined.widths)
            fused = declare.weight(inputs, (Axis("fused", size, joined=joined),), bias)
            apart = {n: axes for n, axes in members.items() if n not in dict(joined.members)}
        self.fused = fused
        self.separate = nnx.Dict(
            {name: declare.weight(inputs, axes, bias) for name, axes in apart.items()}
        )


@dataclass(frozen=True, slots=True)
class Declare:
    """How a backend stores weights.

    Attributes:
        dtype: element type of weights and activations.
        orientation: which side of a weight comes first. XLA on CPU reads bfloat16 about twice
            as fast with outputs first; and only so do a row's bits not depend on how many rows
            there are, in float32 too.
        fuse: weights with a common input lie in one array (fewer, larger operations), on a mesh
            those that it cuts alike.
        stack: layers that repeat lie in one array per parameter, and one program serves them all;
            otherwise each has its own, and the compiler sees every layer.
        copies: length of that array, while a repeated layer is declared.
        padding: sizes that divide over a mesh; None keeps the model's own.
        quantize: weights are int8 with a scale per output channel; vectors stay in `dtype`.
        kv_dtype: keys and values are rounded when they are kept; None keeps them in `dtype`.
    """

    dtype: str = "float32"
    orientation: Orientation = Orientation.IN_OUT
    fuse: bool = False
    stack: bool = False
    copies: int | None = None
    padding: Padding | None = None
    quantize: Quantization | None = None
    kv_dtype: KvDtype | None = None

    @property
    def cache_dtype(self) -> str:
        """Returns the dtype that keys and values are kept in."""
        return self.dtype if self.kv_dtype is None else self.kv_dtype.value

    @classmethod
    def best(cls, platform: str, dtype: str) -> Declare:
        """Returns how one device of `platform` ("cpu", "gpu", "tpu") stores weights best."""
        # Hopper multiplies one-byte operands whose contraction is innermost, and no others.
        on_tpu = platform == "tpu"
        return cls(dtype, Orientation.IN_OUT if on_tpu else Orientation.OUT_IN, fuse=True)

    def joined(self, members: tuple[tuple[str, Axes], ...]) -> Joined | None:
        """Returns which of some weights with a common input lie in one array, and how."""
        if not self.fuse:
            return None
        if self.padding is None:
            return Joined(members, 1)
        names = {axes[0].name for _, axes in members} & {"ffn", "heads"}
        shares = math.lcm(*(self.padding.shares(name) for name in names))
        fitting = tuple((n, axes) for n, axes in members if axes[0].size % shares == 0)
        return Joined(fitting, shares) if len(fitting) > 1 else None

    def joint(self, layer: LayerSpec) -> bool:
        """Returns whether attention and MLP have their first projections in one array.

        On a mesh, where their results then share a scatter without being put together.
        """
        if not self.fuse or self.padding is None:
            return False
        alike = self.padding.shares("heads") == self.padding.shares("ffn")
        shared = layer.block is BlockKind.PARALLEL and not layer.mlp_norm
        same = layer.attention.qkv_bias == layer.mlp.bias and layer.mlp.experts is None
        return shared and alike and same

    def ffn(self, size: int) -> Axis:
        """Returns the axis of an MLP's features."""
        return _padded("ffn", size, size if self.padding is None else self.padding.ffn(size))

    def vocab(self, size: int) -> Axis:
        """Returns the axis of the vocabulary."""
        return _padded("vocab", size, size if self.padding is None else self.padding.vocab(size))

    def heads(self, spec: AttentionSpec) -> tuple[Axis, Axis]:
        """Returns the axes of the heads of queries, and of those of keys and values."""
        run, kv_heads = self.attention(spec), spec.num_kv_heads
        if run == spec:
            return Axis("heads", spec.num_heads), Axis("kv_heads", kv_heads)
        keys = _padded("kv_heads", kv_heads, run.num_kv_heads)
        group, stride = (s.num_heads // s.num_kv_heads for s in (spec, run))
        if group == stride:
            return _padded("heads", spec.num_heads, run.num_heads), keys
        return Axis("heads", run.num_heads, Runs(kv_heads, group, stride)), keys

    def attention(self, spec: AttentionSpec) -> AttentionSpec:
        """Returns the attention that is computed, its heads padded."""
        return spec if self.padding is None else self.padding.attention(spec)

    def weight(
        self, inputs: Axes, outputs: Axes, bias: bool = False, init: Init = Init.FAN_IN
    ) -> Weight:
        """Returns a declared linear map."""
        return Weight(self, inputs, outputs, bias, init)

    def group(self, inputs: Axes, bias: bool = False, **members: Axes) -> WeightGroup:
        """Returns declared linear maps with a common input."""
        return WeightGroup(self, inputs, bias, members)

    def vector(self, axis: Axis, init: Init) -> Parameter:
        """Returns a declared vector, such as a norm's scale."""
        return self.parameter((axis,), init)

    def table(self, rows: Axis, columns: Axis) -> Weight:
        """Returns a declared lookup table [rows, columns], which is a map of columns to rows."""
        out_first = replace(self, orientation=Orientation.OUT_IN)
        return Weight(out_first, (columns,), (rows,), bias=False, init=Init.EMBED)

    def parameter(
        self, axes: Axes, init: Init, fan_in: int = 1, dtype: str | None = None
    ) -> Parameter:
        """Returns a parameter with shape, dtype, axes and initialiser, and no values.

        Args:
            dtype: None is that of the declaration.
        """
        logical = axes
        if self.copies is not None:
            axes = (Axis("layers", self.copies), *axes)
        value = jax.ShapeDtypeStruct(tuple(a.size for a in axes), jnp.dtype(dtype or self.dtype))
        names = tuple(a.name for a in axes)
        return Parameter(value, axes=names, logical=logical, init=init, fan_in=fan_in)


def size_of(axes: Axes) -> int:
    """Returns the number of features that `axes` span."""
    return math.prod(a.size for a in axes)


def _real_size_of(axes: Axes) -> int:
    return math.prod(a.real for a in axes)


def _padded(name: str, real: int, size: int) -> Axis:
    """Returns an axis with `size - real` zeros at its end."""
    return Axis(name, size) if size == real else Axis(name, size, Runs(1, real, size))


def padded(values: Array, axes: Axes) -> Array:
    """Returns values, of the axes' sizes without padding, with zeros where the axes have them.

    Args:
        axes: of the last dimensions; those before stay as they are.
    """
    first = values.ndim - len(axes)
    for dim, axis in enumerate(axes, first):
        if axis.joined is not None and (axis.padded or axis.joined.shares > 1):
            values = _as_stored(values, dim, axis.joined)
        if axis.runs is None:
            continue
        number, real, stride = axis.runs
        shape = values.shape
        split = values.reshape(*shape[:dim], number, real, *shape[dim + 1 :])
        pad = [(0, 0)] * split.ndim
        pad[dim + 1] = (0, stride - real)
        joined = jnp.pad(split, pad).reshape(*shape[:dim], number * stride, *shape[dim + 1 :])
        pad = [(0, 0)] * joined.ndim
        pad[dim] = (0, axis.size - number * stride)
        values = jnp.pad(joined, pad)
    return values


def interleaved(parts: Sequence[Array], shares: int) -> Array:
    """Returns [..., features] of several arrays in one: in each share, a share of each."""
    cut = [part.reshape(*part.shape[:-1], shares, -1) for part in parts]
    return jnp.concatenate(cut, axis=-1).reshape(*parts[0].shape[:-1], -1)


def _as_stored(values: Array, dim: int, joined: Joined) -> Array:
    """Returns values as they are stored, given the members' outputs end to end in `dim`."""
    values = jnp.moveaxis(values, dim, -1)
    start, pieces = 0, []
    for _, axes in joined.members:
        end = start + _real_size_of(axes)
        own = values[..., start:end].reshape(*values.shape[:-1], *(axis.real for axis in axes))
        pieces.append(padded(own, axes).reshape(*values.shape[:-1], -1))
        start = end
    return jnp.moveaxis(interleaved(pieces, joined.shares), -1, dim)


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
