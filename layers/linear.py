"""The one contraction of activations with weights."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from jaxserve.config import Quantization
from jaxserve.layers.param import Axes, Parameter, Weight, WeightGroup, size_of
from jaxserve.pallas_kernels import KernelSet
from jaxserve.pallas_kernels.int8_matmul import Mode
from jaxserve.partitioning.collectives import Comm


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
    mode = Mode.W8A8 if quantize is Quantization.W8A8 else Mode.W8A16
    return kernels.int8_matmul(x, values, scales, count, orientation, dtype, mode=mode)


def rows_of(table: Weight, index: Array, comm: Comm) -> Array:
    """Returns the rows of a table at index int32[T], as the residual stream [T, embed]."""
    scales = None if table.scales is None else table.scales[...]
    return comm.lookup(table.values[...], index, scales, jnp.dtype(table.dtype))


def linear_group(
    x: Array, group: WeightGroup, comm: Comm, kernels: KernelSet
) -> list[tuple[Array, Array | None]]:
    """Returns x[T, *inputs] mapped by every member, with its bias: [T, *outputs] and [*outputs]."""
    if group.fused is None:
        each = [group.separate[name] for name, _ in group.members]
        return [(linear(x, one, comm, kernels), _value(one.bias)) for one in each]
    y, bias = linear(x, group.fused, comm, kernels), _value(group.fused.bias)
    start, found = 0, []
    for _, axes in group.members:
        part = slice(start, start := start + size_of(axes))
        shape = tuple(axis.size for axis in axes)
        own = None if bias is None else bias[part].reshape(shape)
        found.append((y[:, part].reshape(y.shape[0], *shape), own))
    return found


def _named(axes: Axes) -> list[tuple[str, int]]:
    return [(axis.name, axis.size) for axis in axes]


def _value(bias: Parameter | None) -> Array | None:
    return None if bias is None else bias[...]
