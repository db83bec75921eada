"""The one contraction of activations with weights."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from jaxserve.config import Quantization
from jaxserve.layers.param import Axes, Joined, Orientation, Parameter, Weight, WeightGroup
from jaxserve.pallas_kernels import KernelSet
from jaxserve.pallas_kernels.int8_matmul import Mode
from jaxserve.partitioning.collectives import Bundle, Comm
from jaxserve.partitioning.layout import Stage


class Product(NamedTuple):
    """What one member of a group gives.

    Attributes:
        x: [T, *outputs].
        bias: [*outputs], or None.
        bundle: the product of several members that it is a part of, or None.
    """

    x: Array
    bias: Array | None
    bundle: Bundle | None = None


def linear(
    x: Array, weight: Weight, comm: Comm, kernels: KernelSet, adapters: None = None
) -> Array:
    """Returns x[T, *inputs] mapped to [T, *outputs], in x's dtype and without the bias.

    On a mesh x lies as the weight's inputs do, and what comes out are terms of a sum; see
    `partitioning.layout`.

    Args:
        adapters: reserved for low-rank adapters; must be None.
    """
    if adapters is not None:
        raise ValueError("adapters are not supported; pass adapters=None")
    values = comm.weight(weight.values[...], _named(weight.stored))
    scales = weight.scales
    if scales is not None:
        scales = comm.scales(scales[...], _named(weight.outputs))
    return product(x, weight, values, scales, kernels, x.dtype, weight.quantize)


def linear_from(x: Array, source: Stage, weight: Weight, comm: Comm, kernels: KernelSet) -> Array:
    """Returns x[T, *inputs], which lies at `source`, mapped as `linear` does."""
    values = comm.weight(weight.values[...], _named(weight.stored))
    scales = weight.scales
    if scales is not None:
        scales = comm.scales(scales[...], _named(weight.outputs))

    def part(piece: Array, own: Array, dtype: DTypeLike) -> Array:
        return product(piece, weight, own, scales, kernels, dtype, weight.quantize)

    dim = 0 if weight.orientation is Orientation.IN_OUT else len(weight.outputs)
    return comm.contract(x, source, values, dim, part)


def product(
    x: Array,
    weight: Weight,
    values: Array,
    scales: Array | None,
    kernels: KernelSet,
    dtype: DTypeLike,
    quantize: Quantization | None,
) -> Array:
    """Returns x[T, *inputs] mapped by the part of a weight that this device uses.

    Args:
        values, scales: that part.
        dtype: of the result.
        quantize: what is rounded, if the weight is quantised.
    """
    count, orientation = len(weight.inputs), weight.orientation.value
    if scales is None:
        return kernels.matmul(x, values, count, orientation, dtype)
    return kernels.int8_matmul(
        x, values, scales, count, orientation, dtype, mode=mode_for(quantize)
    )


def mode_for(quantize: Quantization | None) -> Mode:
    """Returns how activations meet a weight of int8."""
    return Mode.W8A8 if quantize is Quantization.W8A8 else Mode.W8A16


def rows_of(table: Weight, index: Array, comm: Comm) -> Array:
    """Returns the rows of a table at index int32[T], as the residual stream [T, embed]."""
    scales = None if table.scales is None else table.scales[...]
    return comm.lookup(table.values[...], index, scales, jnp.dtype(table.dtype))


def linear_group(x: Array, group: WeightGroup, comm: Comm, kernels: KernelSet) -> list[Product]:
    """Returns x[T, *inputs] mapped by every member, in order."""
    found: dict[str, Product] = {}
    for name, one in group.separate.items():
        found[name] = Product(linear(x, one, comm, kernels), _value(one.bias))
    if group.fused is not None and group.joined is not None:
        found |= _products(x, group.fused, group.joined, comm, kernels)
    return [found[name] for name, _ in group.members]


def _products(
    x: Array, fused: Weight, joined: Joined, comm: Comm, kernels: KernelSet
) -> dict[str, Product]:
    """Returns what the members of a fused weight give."""
    rest = tuple(tuple(axis.size for axis in axes[1:]) for _, axes in joined.members)
    bundle = Bundle(linear(x, fused, comm, kernels), joined.widths, rest)
    biases: list[Array | None] = [None] * len(rest)
    if (bias := _value(fused.bias)) is not None:
        biases = [own[0] for own in bundle.split(bias[None])]
    parts = zip(joined.members, bundle.split(bundle.x), biases, strict=True)
    return {name: Product(y, bias, bundle) for (name, _), y, bias in parts}


def _named(axes: Axes) -> list[tuple[str, int]]:
    return [(axis.name, axis.size) for axis in axes]


def _value(bias: Parameter | None) -> Array | None:
    return None if bias is None else bias[...]
