"""Ragged matmul through XLA: its own ragged dot, and on CPU dots of blocks of rows.

XLA on CPU turns a ragged dot into one over all groups, for which it copies every weight in every
step, and whose bits depend on the number of rows. A block has rows of one group and the same
size always, so a row's bits depend on nothing beside it, and groups without rows are not read.
"""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

BLOCK_ROWS = 16

_DIMENSIONS = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (2,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[0],
)


def ragged_matmul(x: Array, w: Array, sizes: Array, dtype: DTypeLike) -> Array:
    """Returns [M, N] in `dtype`; see `reference.ragged_matmul`."""
    y = lax.platform_dependent(
        x, w, sizes, cpu=partial(in_blocks, dtype=dtype), default=partial(_whole, dtype=dtype)
    )
    grouped = jnp.arange(x.shape[0], dtype=jnp.int32) < jnp.sum(sizes)
    return jnp.where(grouped[:, None], y, jnp.zeros_like(y))


def _whole(x: Array, w: Array, sizes: Array, dtype: DTypeLike) -> Array:
    return lax.ragged_dot_general(
        x, w, sizes, _DIMENSIONS, precision=_precision(x), preferred_element_type=dtype
    )


def in_blocks(x: Array, w: Array, sizes: Array, dtype: DTypeLike) -> Array:
    """Returns [M, N] in `dtype`, rows of no group undefined."""
    num_rows, num_groups = x.shape[0], w.shape[0]
    blocks = -(-sizes // BLOCK_ROWS)
    last, ends = jnp.cumsum(blocks), jnp.cumsum(sizes)
    first, starts = last - blocks, ends - sizes
    # Each group may end with a block that is not full.
    number = jnp.arange(num_rows // BLOCK_ROWS + min(num_groups, num_rows), dtype=jnp.int32)
    group = _group_of(number, last)
    row = starts[group] + (number - first[group]) * BLOCK_ROWS
    padded = jnp.pad(x, ((0, BLOCK_ROWS), (0, 0)))

    def block(_: None, at: tuple[Array, Array, Array]) -> tuple[None, Array]:
        number, group, row = at

        def dot() -> Array:
            return lax.dot_general(
                lax.dynamic_slice_in_dim(padded, row, BLOCK_ROWS),
                lax.dynamic_index_in_dim(w, group, keepdims=False),
                (((1,), (1,)), ((), ())),
                precision=_precision(x),
                preferred_element_type=dtype,
            )

        def nothing() -> Array:
            return jnp.zeros((BLOCK_ROWS, w.shape[1]), dtype)

        return None, lax.cond(number < last[-1], dot, nothing)

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
