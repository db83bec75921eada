"""Keys and values of new tokens go into their pages, in place.

A page is changed in pieces of one row of registers, so that a token costs no whole page. An item
is a piece that some tokens of this step go to; items after the last repeat it.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxserve.pallas_kernels.paged_attention.mosaic import (
    SUBLANES,
    chosen,
    row_lanes,
    value_lane,
)
from jaxserve.pallas_kernels.paged_attention.rounding import finite


class Places(NamedTuple):
    """Page and place in it of each token, int32[T]; the page is -1 where nothing is stored."""

    page: Array
    offset: Array


def token_rows(k: Array, v: Array, dtype: Any) -> Array:
    """Returns [T, K, lanes], key and value of each token as a page holds them."""
    head = k.shape[2]
    lanes, start = row_lanes(head), value_lane(head)
    v = finite(v.astype(dtype))
    key = jnp.pad(k.astype(dtype), ((0, 0), (0, 0), (0, start - head)))
    return jnp.concatenate([key, jnp.pad(v, ((0, 0), (0, 0), (0, lanes - start - head)))], axis=2)


@partial(jax.jit, static_argnums=(0, 1))
def write(rows: int, interpret: Any, pages: Array, new: Array, places: Places) -> Array:
    """Returns pages[P, K, page_size, lanes] with new[T, K, lanes] at their places.

    Args:
        rows: sequences at most; the tokens of one come in order.
        interpret: see `pallas_call`.
    """
    _, heads, page_size, lanes = pages.shape
    # Whole tiles of the memory where a page has them.
    piece = SUBLANES * 4 // pages.dtype.itemsize
    piece = piece if page_size % piece == 0 else page_size
    tokens = new.shape[0]
    count = min(tokens, tokens // piece + 2 * rows)
    page, part, token = _items(places, piece, page_size // piece, count)
    fresh = new[jnp.maximum(token, 0)].swapaxes(1, 2)
    here = (token >= 0).astype(jnp.int32)[..., None]

    def place(i: Any, page: Any, part: Any) -> tuple[Any, ...]:
        return page[i], 0, part[i], 0

    held = pl.BlockSpec((None, heads, piece, lanes), place)
    return pl.pallas_call(
        _kernel,
        out_shape=jax.ShapeDtypeStruct(pages.shape, pages.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(count,),
            in_specs=[
                pl.BlockSpec((None, piece, 1), lambda i, *_: (i, 0, 0)),
                pl.BlockSpec((None, heads, piece, lanes), lambda i, *_: (i, 0, 0, 0)),
                held,
            ],
            out_specs=held,
        ),
        input_output_aliases={4: 0},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=interpret,
        name="write_pages",
    )(page, part, here, fresh, pages)


def _kernel(page: Any, part: Any, here: Any, new: Any, old: Any, out: Any) -> None:
    out[...] = chosen((here[...] > 0)[None], new[...], old[...])


def _items(places: Places, piece: int, parts: int, count: int) -> tuple[Array, Array, Array]:
    """Returns (page, part of it) int32[I] and int32[I, piece], the token that goes to a place."""
    tokens = places.page.shape[0]
    number = jnp.arange(tokens, dtype=jnp.int32)
    real = places.page >= 0
    key = places.page * parts + lax.div(places.offset, piece)
    latest = lax.cummax(jnp.where(real, number, -1))
    before = jnp.concatenate([jnp.full(1, -1, jnp.int32), latest[:-1]])
    opens = real & ((before < 0) | (key[before] != key))
    item = jnp.cumsum(opens, dtype=jnp.int32) - 1
    at = jnp.where(real, item, count)
    first = jnp.zeros(count, jnp.int32).at[at].set(key, mode="drop")
    token = jnp.full((count, piece), -1, jnp.int32)
    token = token.at[at, lax.rem(places.offset, piece)].set(number, mode="drop")
    last = jnp.clip(jnp.arange(count, dtype=jnp.int32), 0, jnp.maximum(item[-1], 0))
    return lax.div(first[last], parts), lax.rem(first[last], parts), token[last]
