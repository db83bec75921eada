"""Ragged matmul through XLA: its own ragged dot, and on CPU dots of blocks of rows.

XLA on CPU turns a ragged dot into one over all groups, for which it copies every weight in every
step, and whose bits depend on the number of rows. A block has rows of one group and the same
size always, so a row's bits depend on nothing beside it, and groups without rows are not read.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from jaxserve.pallas_kernels.int8_matmul import Mode
from jaxserve.pallas_kernels.int8_matmul.reference import scaled_rows
from jaxserve.pallas_kernels.int8_matmul.xla import digits_for, digits_of, together

BLOCK_ROWS = 16

_DIMENSIONS = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (2,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[0],
)


def ragged_matmul(
    x: Array,
    w: Array,
    sizes: Array,
    dtype: DTypeLike,
    *,
    scales: Array | None = None,
    mode: Mode = Mode.W8A16,
) -> Array:
    """Returns [M, N] in `dtype`; see `reference.ragged_matmul`."""
    rows = jnp.arange(x.shape[0], dtype=jnp.int32)
    if scales is None:
        on_cpu, elsewhere = partial(in_blocks, dtype=dtype), partial(_whole, dtype=dtype)
    else:
        on_cpu, elsewhere = partial(_digits, mode=mode), partial(_cast, mode=mode)
    y = lax.platform_dependent(x, w, sizes, cpu=on_cpu, default=elsewhere)
    if scales is not None:
        y = (y * scales[_group_of(rows, jnp.cumsum(sizes))]).astype(dtype)
    return jnp.where((rows < jnp.sum(sizes))[:, None], y, jnp.zeros_like(y))


def _whole(x: Array, w: Array, sizes: Array, dtype: DTypeLike) -> Array:
    return lax.ragged_dot_general(
        x, w, sizes, _DIMENSIONS, precision=_precision(x), preferred_element_type=dtype
    )


def _cast(x: Array, w: Array, sizes: Array, mode: Mode) -> Array:
    """Returns float32[M, N] of a weight of int8 that is cast; bfloat16 holds rounded rows."""
    if mode is Mode.W8A16:
        return _whole(x, w.astype(x.dtype), sizes, jnp.dtype("float32"))
    rows, factor = scaled_rows(x.astype(jnp.float32), 1)
    rows = jnp.round(rows).astype(jnp.bfloat16)
    return _whole(rows, w.astype(jnp.bfloat16), sizes, jnp.dtype("float32")) * factor[:, None]


def _digits(x: Array, w: Array, sizes: Array, mode: Mode) -> Array:
    """Returns float32[M, N] of a weight of int8 with rows in digits; see `int8_matmul.xla`."""
    digits, factor = digits_of(x, 1 if mode is Mode.W8A8 else digits_for(x))
    rows = jnp.stack(digits, axis=1)

    def product(some: Array, own: Array) -> Array:
        sums = lax.dot_general(
            some.reshape(-1, some.shape[2]), own, (((1,), (1,)), ((), ())),
            preferred_element_type=jnp.int32,
        )  # fmt: skip
        return together(jnp.moveaxis(sums.reshape(*some.shape[:2], -1), 1, 0))

    return _in_blocks(rows, w, sizes, product) * factor[:, None]


def in_blocks(x: Array, w: Array, sizes: Array, dtype: DTypeLike) -> Array:
    """Returns [M, N] in `dtype`, rows of no group undefined."""

    def product(some: Array, own: Array) -> Array:
        return lax.dot_general(
            some, own, (((1,), (1,)), ((), ())), precision=_precision(x),
            preferred_element_type=dtype,
        )  # fmt: skip

    return _in_blocks(x, w, sizes, product)


def _in_blocks(x: Array, w: Array, sizes: Array, product: Callable[[Array, Array], Array]) -> Array:
    """Returns [M, N], the products of blocks of x[M, ...] with the weights of their groups."""
    num_rows, num_groups = x.shape[0], w.shape[0]
    blocks = -(-sizes // BLOCK_ROWS)
    last, ends = jnp.cumsum(blocks), jnp.cumsum(sizes)
    first, starts = last - blocks, ends - sizes
    # Each group may end with a block that is not full.
    number = jnp.arange(num_rows // BLOCK_ROWS + min(num_groups, num_rows), dtype=jnp.int32)
    group = _group_of(number, last)
    row = starts[group] + (number - first[group]) * BLOCK_ROWS
    padded = jnp.pad(x, ((0, BLOCK_ROWS), *[(0, 0)] * (x.ndim - 1)))
    result = jax.eval_shape(product, padded[:BLOCK_ROWS], w[0])

    def block(_: None, at: tuple[Array, Array, Array]) -> tuple[None, Array]:
        number, group, row = at

        def some() -> Array:
            return product(
                lax.dynamic_slice_in_dim(padded, row, BLOCK_ROWS),
                lax.dynamic_index_in_dim(w, group, keepdims=False),
            )

        def nothing() -> Array:
            return jnp.zeros(result.shape, result.dtype)

        return None, lax.cond(number < last[-1], some, nothing)

    _, found = lax.scan(block, None, (number, group, row))
    rows = jnp.arange(num_rows, dtype=jnp.int32)
    group = _group_of(rows, ends)
    place = first[group] * BLOCK_ROWS + rows - starts[group]
    return jnp.take(found.reshape(-1, w.shape[1]), place, axis=0, mode="clip")


def _group_of(index: Array, ends: Array) -> Array:
    """Returns int32[...], the group of each index, of groups that end before `ends`."""
    before = jnp.sum(ends[None, :] <= index[:, None], axis=1, dtype=jnp.int32)
    return jnp.minimum(before, ends.shape[0] - 1)


def _precision(x: Array) -> lax.Precision | None:
    return lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
