"""The one contraction of activations with weights."""

from __future__ import annotations

from jax import Array

from jaxserve.layers.param import Parameter, Weight, WeightGroup, size_of
from jaxserve.pallas_kernels import KernelSet
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
    values = comm.weight(weight.values[...], [(a.name, a.size) for a in weight.stored])
    return kernels.matmul(x, values, len(weight.inputs), weight.orientation.value, x.dtype)


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


def _value(bias: Parameter | None) -> Array | None:
    return None if bias is None else bias[...]
