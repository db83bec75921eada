"""Where keys lie: positions, pages and columns of a page table."""

from __future__ import annotations

from enum import StrEnum

import jax.numpy as jnp
from jax import Array, lax


class Extra(StrEnum):
    """A result of attention besides the output."""

    LSE = "lse"
    KEY_MASS = "key_mass"


def column(page: Array, width: int, pinned_pages: int) -> Array:
    """Returns int32, the column of logical pages in a table of `width` columns.

    The first `pinned_pages` keep their columns for good; the others take turns.
    """
    turning = pinned_pages + lax.rem(page - pinned_pages, width - pinned_pages)
    return jnp.where(page < pinned_pages, page, turning)


def stored_positions(kv_len: Array, width: int, page_size: int, pinned_pages: int) -> Array:
    """Returns int32[B, width * page_size], the position kept in every place of the tables.

    It is -1 where nothing of the sequence is kept. A column that pages take in turns holds the
    newest of them.

    Args:
        kv_len: int32[B], tokens of each sequence.
    """
    columns = jnp.arange(width, dtype=jnp.int32)[None, :]
    newest = ((kv_len - 1) // page_size)[:, None]
    behind = (newest - columns) % (width - pinned_pages)
    page = jnp.where(columns < pinned_pages, columns, newest - behind)
    page = jnp.where((columns >= pinned_pages) & (page < pinned_pages), -1, page)
    offset = jnp.arange(page_size, dtype=jnp.int32)
    positions = page[:, :, None] * page_size + offset[None, None, :]
    positions = positions.reshape(kv_len.shape[0], width * page_size)
    return jnp.where((positions >= 0) & (positions < kv_len[:, None]), positions, -1)


def write_places(
    page_table: Array,
    row_of_token: Array,
    positions: Array,
    num_pages: int,
    page_size: int,
    pinned_pages: int,
) -> tuple[Array, Array]:
    """Returns (page, offset), both int32[T]: where tokens go; padding goes past the last page."""
    columns = column(positions // page_size, page_table.shape[1], pinned_pages)
    page = page_table[row_of_token, columns]
    return jnp.where(positions >= 0, page, num_pages), positions % page_size


def row_of_tokens(q_start: Array, num_tokens: int) -> Array:
    """Returns int32[T], the row that each packed token belongs to."""
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    row = jnp.searchsorted(q_start, token, side="right", method="compare_all").astype(jnp.int32) - 1
    return jnp.clip(row, 0, q_start.shape[0] - 2)
