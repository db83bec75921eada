"""Attention over pages on Hopper: the arrays of a call are laid out for `gpu_kernel`.

A page holds [K, page_size, H] of keys and as much of values, each head's keys in one piece, so that
the copying hardware brings them as wgmma wants them. Heads take the memory they need.

Rows with one token are items of one query, whose keys are shared out to enough blocks of threads
to fill the chip; their results are merged by the logarithms of their denominators. Longer rows are
cut into runs of queries that fill 128 rows with all heads of a group. New tokens are stored by
XLA, in place, before anything is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxserve.config import AttentionSpec, CacheSpec
from jaxserve.errors import UnsupportedError
from jaxserve.pallas_kernels.attention.scores import alibi_slopes
from jaxserve.pallas_kernels.hopper import ROWS, on_platform
from jaxserve.pallas_kernels.paged_attention import items as work
from jaxserve.pallas_kernels.paged_attention import reference
from jaxserve.pallas_kernels.paged_attention.gpu_kernel import Build, Operands, attend
from jaxserve.pallas_kernels.paged_attention.gpu_tiles import Tile, queries_of, tile_for
from jaxserve.pallas_kernels.paged_attention.places import Extra, row_of_tokens, write_places
from jaxserve.pallas_kernels.paged_attention.rounding import finite, rounded
from jaxserve.pallas_kernels.paged_attention.tpu import merged

copy_pages = reference.copy_pages

FEATURES = 16
"""Heads are whole multiples of it: a row of keys is copied in pieces of 16 bytes."""


class Pages(NamedTuple):
    """Keys and values, both [P, K, page_size, H].

    Attributes:
        scales: of keys and of values, both float32[P, K, page_size]; None where they have none.
    """

    keys: Array
    values: Array
    scales: tuple[Array, Array] | None = None


@dataclass(frozen=True)
class _Static:
    """What a call is compiled for."""

    spec: AttentionSpec
    page_size: int
    pinned_pages: int
    sink_tokens: int
    max_query: int | None
    tile: Tile


class _Arrays(NamedTuple):
    """Operands as they are given; see `reference.paged_attention`."""

    q: Array
    q_sink: Array | None
    slopes: Array | None
    pages: Pages
    table: Array
    q_start: Array
    kv_len: Array
    q_pos: Array


def init_pages(num_pages: int, page_size: int, spec: CacheSpec) -> Pages:
    """Returns empty pages; see `reference.init_pages`.

    Raises:
        UnsupportedError: a page or a head cannot be copied as the kernel does it.
    """
    _, heads, head = spec.token_shape
    if page_size not in (16, 32, 64, 128, 256):
        raise UnsupportedError(f"page_size={page_size} is not 16, 32, 64, 128 or 256; use one")
    if head % FEATURES or (head > 128 and head != 256):
        raise UnsupportedError(
            f"head_dim={head} is neither 256 nor a multiple of {FEATURES} up to 128, which "
            "backend='gpu' needs; use 'xla'"
        )
    shape = num_pages, heads, page_size, head
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
    """Returns the pages with k and v[T, K, H] at their places; see `reference.write_pages`."""
    page, offset = write_places(
        page_table, row_of_token, positions, pages.keys.shape[0], page_size, pinned_pages
    )
    keys, values, scales = pages
    new: tuple[Any, ...] = k.astype(keys.dtype), finite(v.astype(values.dtype))
    if scales is not None:
        parts = rounded(k, keys.dtype), rounded(finite(v), values.dtype)
        new = parts[0][0], parts[1][0], (parts[0][1], parts[1][1])
    at = page, slice(None), offset
    return jax.tree.map(lambda old, x: old.at[at].set(x, mode="drop"), pages, Pages(*new))


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
    tile: Tile | None = None,
    interpret: Any = None,
) -> Array | tuple[Array, ...]:
    """Returns softmax(scale q k + bias) v as [T, N, H]; see `reference.paged_attention`.

    Args:
        scales: here these multiply the whole pool's in every call.
        tile: sizes of the kernel's blocks; None takes those that `gpu_tiles` knows.
        interpret: False compiles, `InterpretGPUParams` interpret; None compiles on CUDA.

    Raises:
        UnsupportedError: an output, a mask or a dtype is asked for that the kernel does not have.
    """
    _check(q, pages, mask, outputs)
    if scales is not None:
        pages = _scaled(pages, scales)
    sink_tokens = sink_tokens if spec.window is not None else 0
    if spec.alibi is None:
        slopes = None
    elif slopes is None:
        slopes = jnp.asarray(alibi_slopes(spec.num_heads))
    arrays = _Arrays(
        q, q_sink if sink_tokens else None, slopes, pages, page_table, q_start, kv_len, q_pos
    )
    tile = tile or tile_for(
        spec, page_size, page_table.shape[1], page_table.shape[0],
        pages.keys.dtype.itemsize, pages.keys.dtype != q.dtype,
    )  # fmt: skip
    static = _Static(spec, page_size, pinned_pages, sink_tokens, max_query, tile)
    out, lse = on_platform(partial(_attention, static), interpret, arrays)
    if sink_logits is not None:
        whole = jnp.logaddexp(lse, sink_logits.astype(jnp.float32)[None, :])
        out = out * jnp.exp(lse - whole)[..., None]
        lse = whole
    out = out.astype(q.dtype)
    return (out, *(lse for _ in outputs)) if outputs else out


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
    **options: Any,
) -> tuple[Array, Pages]:
    """Returns (attention [T, N, H], the pages with k and v[T, K, H]), the pages updated in place.

    See `paged_attention` for the options.
    """
    places = {"page_size": page_size, "pinned_pages": pinned_pages}
    pages = write_pages(pages, k, v, page_table, row_of_token, q_pos, **places)
    out = paged_attention(q, pages, page_table, q_start, kv_len, q_pos, spec, **places, **options)
    assert isinstance(out, jax.Array)
    return out, pages


def _check(q: Array, pages: Pages, mask: Array | None, outputs: Sequence[Extra]) -> None:
    refused = [f"outputs={name}" for name in outputs if name is not Extra.LSE]
    if mask is not None and mask.shape[1]:
        refused.append("mask")
    if refused:
        raise UnsupportedError(
            f"backend='gpu' has no {', '.join(refused)} in paged_attention; use 'reference'"
        )
    if q.dtype not in (jnp.bfloat16, jnp.float16) or (
        pages.keys.dtype.itemsize > 1 and pages.keys.dtype != q.dtype
    ):
        raise UnsupportedError(
            f"backend='gpu' attends with bfloat16 or float16, and pages of the same, int8 or fp8, "
            f"not with {q.dtype} and pages of {pages.keys.dtype}; use dtype='bfloat16', or 'xla'"
        )


def _scaled(pages: Pages, by_page: tuple[Array, Array]) -> Pages:
    """Returns pages whose tokens' scales hold those of their pages, float32[P, K], too."""
    shape = pages.keys.shape[:3]
    tokens = pages.scales or (jnp.ones(shape, jnp.float32),) * 2
    both = [t * p[:, :, None] for t, p in zip(tokens, by_page, strict=True)]
    return pages._replace(scales=(both[0], both[1]))


@partial(jax.jit, static_argnums=(0, 1))
def _attention(static: _Static, interpret: Any, given: _Arrays) -> tuple[Array, Array]:
    """Returns (out float32[T, N, H], lse float32[T, N])."""
    tokens, rows = given.q.shape[0], given.table.shape[0]
    row = row_of_tokens(given.q_start, tokens)
    within = jnp.arange(tokens, dtype=jnp.int32) - given.q_start[row]
    count = given.q_start[1:] - given.q_start[:-1]
    out = jnp.zeros(given.q.shape, jnp.float32)
    lse = jnp.full(out.shape[:2], -jnp.inf, jnp.float32)
    queries = queries_of(static.spec, static.tile)
    number = tokens // queries + min(rows, tokens // 2)
    if number and static.max_query != 1:
        runs = work.long_runs(given.q_start, given.q_pos, queries, number, 2)
        found = _run_items(static, interpret, given, runs, queries)
        ends = work.run_ends(given.q_start, queries, 2)
        before = jnp.where(row > 0, ends[row - 1], 0)
        at = (before + lax.div(within, queries)) * queries + lax.rem(within, queries)
        at = jnp.clip(at, 0, number * queries - 1)
        out = found[0].reshape(-1, *out.shape[1:])[at]
        lse = found[1].reshape(-1, out.shape[1])[at]
    runs = work.single_runs(given.q_start, given.q_pos)
    one_out, one_lse = _run_items(static, interpret, given, runs, 1)
    single = count[row] == 1
    out = jnp.where(single[:, None, None], one_out[row, 0], out)
    lse = jnp.where(single[:, None], one_lse[row, 0], lse)
    blank = (within < 0) | (within >= count[row]) | (given.q_pos < 0)
    out = jnp.where(blank[:, None, None], 0.0, out)
    return out, jnp.where(blank[:, None], -jnp.inf, lse)


def _run_items(
    static: _Static, interpret: Any, given: _Arrays, runs: work.Runs, queries: int
) -> tuple[Array, Array]:
    """Returns (out float32[I, Q, N, H], lse float32[I, Q, N]) of runs of queries."""
    build = _build(static, given, queries)
    reach = work.Reach(build.tile.keys, static.spec.window, static.sink_tokens, 0, build.splits)
    table = work.items(runs, given.kv_len, jnp.zeros_like(given.kv_len), reach)
    group = static.spec.num_heads // static.spec.num_kv_heads
    operands = Operands(
        items=table,
        table=given.table,
        q_pos=_rows64(jnp.tile(runs.q_pos, (1, group)), build, -1),
        slopes=None if given.slopes is None else _slopes(given.slopes, build, queries),
        q=_by_head(given.q[runs.token], build),
        q_sink=None if given.q_sink is None else _by_head(given.q_sink[runs.token], build),
        keys=given.pages.keys,
        values=given.pages.values,
        scales=given.pages.scales,
    )
    out, lse = attend(build, operands, interpret)
    if build.splits > 1:
        out, lse = merged(out, _unpadded(lse, build))
    else:
        out, lse = out[0], _unpadded(lse[0], build)
    return _by_token(out.astype(jnp.float32), lse, build, queries)


def _build(static: _Static, given: _Arrays, queries: int) -> Build:
    spec, tile = static.spec, static.tile
    rows = spec.num_heads // spec.num_kv_heads * queries
    narrow = given.pages.keys.dtype != given.q.dtype
    splits = tile.splits if queries == 1 else 1
    sinks = -(-static.sink_tokens // tile.keys)
    return Build(
        spec=spec,
        tile=tile,
        rows=rows,
        # Pages of one byte change their type in one group's hands.
        groups=1 if narrow or rows <= ROWS else tile.groups,
        splits=splits,
        page_size=static.page_size,
        width=given.table.shape[1],
        pinned_pages=static.pinned_pages,
        sink_tokens=static.sink_tokens,
        sink_blocks=sinks,
        out_dtype="float32" if splits > 1 else str(given.q.dtype),
    )


def _by_head(q: Array, build: Build) -> Array:
    """Returns [I, K, rows, H] for q[I, Q, N, H]: heads of a group after each other."""
    count, queries, num_heads, head = q.shape
    heads = build.spec.num_kv_heads
    q = q.reshape(count, queries, heads, num_heads // heads, head).transpose(0, 2, 3, 1, 4)
    q = q.reshape(count, heads, -1, head)
    return jnp.pad(q, ((0, 0), (0, 0), (0, build.all_rows - q.shape[2]), (0, 0)))


def _by_token(out: Array, lse: Array, build: Build, queries: int) -> tuple[Array, Array]:
    """Returns (out [I, Q, N, H], lse [I, Q, N]) for [I, K, rows, H] and [I, K, rows]."""
    spec, count = build.spec, out.shape[0]
    shape = count, spec.num_kv_heads, build.rows // queries, queries
    out = out[:, :, : build.rows].reshape(*shape, spec.head_dim).transpose(0, 3, 1, 2, 4)
    lse = lse[:, :, : build.rows].reshape(shape).transpose(0, 3, 1, 2)
    size = count, queries, spec.num_heads
    return out.reshape(*size, spec.head_dim), lse.reshape(size)


def _rows64(x: Array, build: Build, value: Any) -> Array:
    """Returns x[..., rows] up to whole rows of 64."""
    size = build.blocks * build.groups * ROWS
    pad = [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])]
    return jnp.pad(x, pad, constant_values=value)


def _unpadded(lse: Array, build: Build) -> Array:
    """Returns the rows of lse that `attend`'s result has."""
    return lse[..., : build.all_rows]


def _slopes(slopes: Array, build: Build, queries: int) -> Array:
    """Returns float32[K, rows of 64], the slope of every row."""
    alibi = build.spec.alibi
    assert alibi is not None
    if alibi.bfloat16:
        slopes = lax.reduce_precision(slopes, exponent_bits=8, mantissa_bits=7)
    rows = jnp.repeat(slopes.reshape(build.spec.num_kv_heads, -1), queries, axis=1)
    return _rows64(rows, build, 0)
