"""The one contraction of activations with weights."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from jaxserve.layers.param import Weight, WeightGroup, size_of
from jaxserve.pallas_kernels import KernelSet
from jaxserve.partitioning.collectives import Comm


def linear(
    x: Array, weight: Weight, comm: Comm, kernels: KernelSet, adapters: None = None
) -> Array:
    """Returns x[T, *inputs] mapped to [T, *outputs], in x's dtype.

    The communication is `[T, inputs.sharded] -> gather -> contract -> {partial sums} ->
    reduce-scatter -> [T, outputs.sharded]`; which of the two happens is the layout's choice.

    Args:
        adapters: reserved for low-rank adapters; must be None.
    """
    if adapters is not None:
        raise ValueError("adapters are not supported; pass adapters=None")
    inputs = tuple(a.name for a in weight.inputs)
    outputs = tuple(a.name for a in weight.outputs)
    x = comm.all_gather(x, inputs)
    y = kernels.matmul(x, weight.values[...], len(inputs), weight.orientation.value, x.dtype)
    y = comm.reduce_scatter(y, inputs, outputs)
    return y if weight.bias is None else y + jnp.broadcast_to(weight.bias[...], y.shape)


def linear_group(x: Array, group: WeightGroup, comm: Comm, kernels: KernelSet) -> list[Array]:
    """Returns x[T, *inputs] mapped by every member: one [T, *outputs] each, in order."""
    if group.fused is None:
        return [linear(x, group.separate[name], comm, kernels) for name, _ in group.members]
    y = linear(x, group.fused, comm, kernels)
    ends = [size_of(axes) for _, axes in group.members]
    starts = [sum(ends[:i]) for i in range(len(ends))]
    return [
        jnp.reshape(y[:, start : start + length], (y.shape[0], *(a.size for a in axes)))
        for start, length, (_, axes) in zip(starts, ends, group.members, strict=True)
    ]
