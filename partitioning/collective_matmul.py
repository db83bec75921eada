"""Products whose communication goes on beside them, piece by piece.

    y = all_gather_matmul(x, w, "z", Ring.ONE_WAY)       # [T, E.z] and w[E, F] -> [T, F]
    x = matmul_reduce_scatter(y, w, "z", Ring.ONE_WAY)   # [T, F] and w[F, E] -> [T, E.z] summed

The plain form gathers, then multiplies, or multiplies, then scatters. The others take a ring of
devices: the first rotates pieces of the activations, the second pieces of the sum. Inside
`shard_map`.

Source: Wang et al. 2023, "Overlap communication with dependent computation via decomposition";
Pope et al. 2022, section 3.5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import Array, lax

from jaxserve.partitioning.layout import Ring

__all__ = ["Ring", "all_gather_matmul", "folded", "gathered_product", "matmul_reduce_scatter"]


def all_gather_matmul(
    x: Array, w: Array, axis: str, ring: Ring, order: Sequence[int] | None = None
) -> Array:
    """Returns x[T, E.axis] gathered times w[E, F], as [T, F] in x's dtype.

    Args:
        order: devices along the axis as they follow each other around the ring; without it, by
            index. On a line of devices every second one and back keeps neighbours near.
    """
    if ring is Ring.PLAIN:
        return _product(lax.all_gather(x, axis, axis=1, tiled=True), w).astype(x.dtype)

    if w.shape[0] != (count := lax.axis_size(axis)) * x.shape[1]:
        raise ValueError(f"{w.shape[0]} inputs are not {x.shape[1]} on each of {axis}={count}")

    def terms(piece: Array, first: Array) -> Array:
        return _product(piece, lax.dynamic_slice_in_dim(w, first, piece.shape[1], 0))

    return gathered_product(x, terms, axis, ring, order).astype(x.dtype)


def gathered_product(
    x: Array,
    terms: Callable[[Array, Array], Array],
    axis: str,
    ring: Ring,
    order: Sequence[int] | None = None,
) -> Array:
    """Returns what all pieces x[T, E.axis, ...] add, as they come around.

    Args:
        terms: from features of x, and the number of the first of them in the whole, to what they
            add, in float32.
        ring: any but `Ring.PLAIN`.
        order: see `all_gather_matmul`.
    """
    way = _Way(axis, order)
    size = x.shape[1]

    def product(piece: Array, hops: int, first: int = 0) -> Array:
        """Returns what the piece of the device so many hops back adds."""
        return terms(piece, way.device(-hops) * size + first)

    total = product(x, 0)
    if ring is Ring.BIDIRECTIONAL:
        half = size // 2
        up, down = x[:, :half], x[:, half:]
        for hop in range(1, way.count):
            up, down = way.pass_on(up, 1), way.pass_on(down, -1)
            total = total + product(up, hop) + product(down, -hop, half)
        return total
    back = way.count // 2 if ring is Ring.LOW_LATENCY else way.count - 1
    up = down = x
    for hop in range(1, back + 1):
        up = way.pass_on(up, 1)
        total = total + product(up, hop)
        if hop < way.count - back:
            down = way.pass_on(down, -1)
            total = total + product(down, -hop)
    return total


def matmul_reduce_scatter(
    x: Array, w: Array, axis: str, ring: Ring, order: Sequence[int] | None = None
) -> Array:
    """Returns x[T, F] times w[F, E], summed over the axis and cut, as [T, E.axis] in x's dtype.

    Sums travel in x's dtype.

    Args:
        order: see `all_gather_matmul`.
    """
    if ring is Ring.PLAIN:
        y = _product(x, w).astype(x.dtype)
        return lax.psum_scatter(y, axis, scatter_dimension=1, tiled=True)
    way = _Way(axis, order)
    if w.shape[1] % way.count:
        raise ValueError(f"{w.shape[1]} outputs do not divide over {axis}={way.count}")
    size = w.shape[1] // way.count

    def product(hops: int, first: int = 0, width: int = size) -> Array:
        """Returns this device's terms for the device so many hops ahead."""
        columns = way.device(hops) * size + first
        return _product(x, lax.dynamic_slice_in_dim(w, columns, width, 1))

    def arriving(hops: int, step: int, first: int = 0, width: int = size) -> Array:
        """Returns the sum of the terms of the devices up to `hops` back, come hop by hop."""
        terms = jnp.zeros((x.shape[0], width), x.dtype)
        for left in range(hops, 0, -1):
            terms = (terms + product(step * left, first, width)).astype(x.dtype)
            terms = way.pass_on(terms, step)
        return terms

    own = product(0)
    if ring is Ring.BIDIRECTIONAL:
        half, far = size // 2, way.count - 1
        others = [arriving(far, 1, 0, half), arriving(far, -1, half, size - half)]
        return (own + jnp.concatenate(others, axis=1)).astype(x.dtype)
    back = way.count // 2 if ring is Ring.LOW_LATENCY else way.count - 1
    total = own + arriving(back, 1)
    if ahead := way.count - 1 - back:
        total = total + arriving(ahead, -1)
    return total.astype(x.dtype)


class _Way:
    """A ring of the devices along a mesh axis."""

    def __init__(self, axis: str, order: Sequence[int] | None) -> None:
        self.axis = axis
        self.count: int = lax.axis_size(axis)
        self.order = list(order or range(self.count))
        if sorted(self.order) != list(range(self.count)):
            raise ValueError(f"order={self.order} does not name {self.count} devices once each")

    def device(self, hops: int) -> Array:
        """Returns int32[], the device so many hops ahead of this one."""
        place = jnp.asarray([self.order.index(i) for i in range(self.count)], jnp.int32)
        at = (place[lax.axis_index(self.axis)] + hops) % self.count
        return jnp.asarray(self.order, jnp.int32)[at]

    def pass_on(self, x: Array, step: int) -> Array:
        """Returns what the device one step back held."""
        pairs = [
            (device, self.order[(place + step) % self.count])
            for place, device in enumerate(self.order)
        ]
        return lax.ppermute(x, self.axis, pairs)


def folded(count: int) -> tuple[int, ...]:
    """Returns a ring on a line of devices: up over every second one, and back over the others.

    No hop is longer than two devices, which a TPU without wrap-around sends beside other work.
    """
    return (*range(0, count, 2), *reversed(range(1, count, 2)))


def _product(x: Array, w: Array) -> Array:
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return lax.dot_general(
        x, w, (((1,), (0,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
