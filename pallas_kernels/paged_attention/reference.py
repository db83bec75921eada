"""Definition of attention over pages: float32, every page of a table gathered for every token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxserve.config import AttentionSpec, CacheSpec
from jaxserve.pallas_kernels.attention.scores import alibi_bias, capped
from jaxserve.pallas_kernels.paged_attention.places import (
    Extra,
    row_of_tokens,
    stored_positions,
    write_places,
)
from jaxserve.pallas_kernels.paged_attention.rounding import finite, rounded


class Pages(NamedTuple):
    """Keys and values, both [P, page_size, K, H].

    Attributes:
        scales: of keys and of values, both float32[P, page_size, K]; None where they have none.
    """

    keys: Array
    values: Array
    scales: tuple[Array, Array] | None = None


def init_pages(num_pages: int, page_size: int, spec: CacheSpec) -> Pages:
    """Returns empty pages."""
    _, heads, head = spec.token_shape
    shape = num_pages, page_size, heads, head
    pages = Pages(jnp.zeros(shape, spec.dtype), jnp.zeros(shape, spec.dtype))
    if not spec.scaled:
        return pages
    scales = jnp.zeros(shape[:3], jnp.float32)
    return pages._replace(scales=(scales, jnp.zeros_like(scales)))


def write_pages(
    pages: Pages,
    k: Array,
    v: Array,
    page_table: Array,
    row_of_token: Array,
    positions: Array,
    *,
    page_size: int,
    pinned_pages: int = 0,
) -> Pages:
    """Returns the pages with k and v[T, K, H] at their places, rounded to the pages' dtype.

    Values that are not finite become zeros; see `rounding`.

    Args:
        page_table: int32[B, W].
        row_of_token: int32[T], row of the table that a token belongs to.
        positions: int32[T] in its sequence; -1 marks padding, which is dropped.
        pinned_pages: see `places.column`.
    """
    at = write_places(
        page_table, row_of_token, positions, pages.keys.shape[0], page_size, pinned_pages
    )
    keys, values, scales = pages
    new: tuple[Any, ...] = k.astype(keys.dtype), finite(v.astype(values.dtype))
    if scales is not None:
        parts = rounded(k, keys.dtype), rounded(finite(v), values.dtype)
        new = parts[0][0], parts[1][0], (parts[0][1], parts[1][1])
    return jax.tree.map(lambda old, x: old.at[at].set(x, mode="drop"), pages, Pages(*new))


def write_and_attend(
    q: Array,
    k: Array,
    v: Array,
    pages: Pages,
    page_table: Array,
    row_of_token: Array,
    q_start: Array,
    kv_len: Array,
    q_pos: Array,
    spec: AttentionSpec,
    *,
    page_size: int,
    pinned_pages: int = 0,
    sink_tokens: int = 0,
    q_sink: Array | None = None,
    slopes: Array | None = None,
    max_query: int | None = None,
) -> tuple[Array, Pages]:
    """Returns (attention [T, N, H], the pages with k and v[T, K, H]); see both functions.

    A backend may store a token while it attends.
    """
    places: dict[str, Any] = {"page_size": page_size, "pinned_pages": pinned_pages}
    pages = write_pages(pages, k, v, page_table, row_of_token, q_pos, **places)
    out = paged_attention(
        q, pages, page_table, q_start, kv_len, q_pos, spec,
        sink_tokens=sink_tokens, q_sink=q_sink, slopes=slopes, max_query=max_query, **places,
    )  # fmt: skip
    assert isinstance(out, jax.Array)
    return out, pages


def copy_pages(pages: Pages, source: Array, destination: Array) -> Pages:
    """Returns the pages with pages int32[C] copied, all read before any is written."""
    return jax.tree.map(lambda x: x.at[destination].set(x[source]), pages)


def paged_attention(
    q: Array,
    pages: Pages,
    page_table: Array,
    q_start: Array,
    kv_len: Array,
    q_pos: Array,
    spec: AttentionSpec,
    *,
    page_size: int,
    pinned_pages: int = 0,
    sink_tokens: int = 0,
    q_sink: Array | None = None,
    slopes: Array | None = None,
    sink_logits: Array | None = None,
    mask: Array | None = None,
    scales: tuple[Array, Array] | None = None,
    outputs: Sequence[Extra] = (),
    max_query: int | None = None,
) -> Array | tuple[Array, ...]:
    """Returns softmax(scale q k + bias) v as [T, N, H] in q's dtype, then the `outputs` asked for.

    A key is seen by the queries of its own sequence that do not come before it and in whose window
    it lies. A query that sees no key, like padding, gives zeros. `lse` is float32[T, N], the log
    of the softmax denominator; `key_mass` is float32[B, K, W * page_size], the attention that the
    step's queries pay to each place of a table, summed over the queries and heads that share it.

    Args:
        q: [T, N, H], packed tokens of B sequences.
        pages: of this layer, the new tokens already written.
        page_table: int32[B, W].
        q_start: int32[B + 1], first token of each sequence; it may have none.
        kv_len: int32[B], tokens of each sequence, the new ones included.
        q_pos: int32[T]; -1 marks padding.
        page_size: tokens of a page.
        pinned_pages: see `places.column`.
        sink_tokens: with a window, keys before this position stay visible.
        q_sink: [T, N, H], queries for the sink keys where not `q`: turned to the position that a
            query has when positions are counted inside the cache.
        slopes: float32[N], see `alibi_bias`.
        sink_logits: float32[N], one more logit in the denominator, without a value.
        mask: bool[T, M], which of the sequence's newest M keys a query sees, in place of the
            order of positions.
        scales: float32[P, K] for keys and for values, factors of all that a page holds, besides
            the scales of its tokens.
        outputs: further results, in this order.
        max_query: no sequence has more tokens than this (a hint; it changes no result).
    """
    tokens, num_heads, _ = q.shape
    group = num_heads // spec.num_kv_heads
    row = row_of_tokens(q_start, tokens)
    by_token, by_page = pages.scales or (None, None), scales or (None, None)
    keys = _gathered(pages.keys, page_table, by_token[0], by_page[0])
    values = _gathered(pages.values, page_table, by_token[1], by_page[1])
    width = page_table.shape[1]
    k_pos = stored_positions(kv_len, width, page_size, pinned_pages)
    seen = _seen(q_pos, k_pos[row], spec.window, sink_tokens)
    if mask is not None:
        seen = _masked(seen, mask, q_pos, k_pos[row], kv_len[row])
    wide_k = jnp.repeat(keys, group, axis=2)[row]
    wide_v = jnp.repeat(values, group, axis=2)[row]
    scores = _products(q, wide_k)
    if q_sink is not None:
        sinks = (k_pos[row] < sink_tokens)[:, None, :]
        scores = jnp.where(sinks, _products(q_sink, wide_k), scores)
    scores = capped(scores * spec.score_scale, spec)
    if spec.alibi is not None:
        scores = scores + alibi_bias(spec.alibi, num_heads, k_pos, slopes)[row]
    scores = jnp.where(seen[:, None, :], scores, -jnp.inf)
    if sink_logits is not None:
        extra = jnp.broadcast_to(sink_logits.astype(jnp.float32)[None, :, None], (*q.shape[:2], 1))
        scores = jnp.concatenate([scores, extra], axis=-1)
    top = jnp.max(scores, axis=-1, keepdims=True)
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = (weights / jnp.where(total > 0, total, 1.0))[..., : k_pos.shape[1]]
    exact = lax.Precision.HIGHEST
    out = jnp.einsum("TNS,TSNH->TNH", weights, wide_v, precision=exact).astype(q.dtype)
    if not outputs:
        return out
    mass = jnp.zeros((kv_len.shape[0], num_heads, k_pos.shape[1])).at[row].add(weights)
    extras = {
        Extra.LSE: (jnp.log(total) + top)[..., 0],
        Extra.KEY_MASS: mass.reshape(-1, spec.num_kv_heads, group, k_pos.shape[1]).sum(axis=2),
    }
    return out, *(extras[name] for name in outputs)


def _gathered(x: Array, page_table: Array, by_token: Array | None, by_page: Array | None) -> Array:
    """Returns float32[B, W * page_size, K, H], the pages of every table."""
    wide = x.astype(jnp.float32)
    if by_token is not None:
        wide = wide * by_token[..., None]
    if by_page is not None:
        wide = wide * by_page[:, None, :, None]
    return wide[page_table].reshape(page_table.shape[0], -1, *x.shape[2:])


def _products(q: Array, k: Array) -> Array:
    """Returns float32[T, N, S] for q[T, N, H] and k[T, S, N, H]."""
    exact = lax.Precision.HIGHEST
    return jnp.einsum("TNH,TSNH->TNS", q.astype(jnp.float32), k, precision=exact)


def _seen(q_pos: Array, k_pos: Array, window: int | None, sink_tokens: int) -> Array:
    """Returns bool[T, S]: which places a query sees."""
    distance = q_pos[:, None] - k_pos
    seen = (k_pos >= 0) & (distance >= 0)
    return seen if window is None else seen & ((distance < window) | (k_pos < sink_tokens))


def _masked(seen: Array, mask: Array, q_pos: Array, k_pos: Array, kv_len: Array) -> Array:
    """Returns bool[T, S]: `seen`, but for the newest M keys what the mask says."""
    size = mask.shape[1]
    index = k_pos - (kv_len[:, None] - size)
    allowed = jnp.take_along_axis(mask, jnp.clip(index, 0, size - 1), axis=1)
    allowed = allowed & (k_pos >= 0) & (q_pos[:, None] >= 0)
    return jnp.where(index >= 0, allowed, seen)
