"""Attention over pages on TPU: the arrays of a call are laid out for the kernel in `mosaic`.

A page holds [K, page_size, lanes]: key and value of a token lie beside each other, up to 64
features in one row of 128 lanes, more in whole rows of lanes each. So one copy brings all that a
page has, and heads of 64 features take no more memory than they need.

Rows with one token are items of one query; longer rows are cut into runs of queries. On a chip
whose two cores are one device, each core takes half of every item's keys, and the halves are put
together by their denominators. Off the TPU the kernel is interpreted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxserve.config import AttentionSpec, CacheSpec
from jaxserve.errors import UnsupportedError
from jaxserve.pallas_kernels.attention.scores import alibi_slopes
from jaxserve.pallas_kernels.paged_attention import items as work
from jaxserve.pallas_kernels.paged_attention.mosaic import (
    LANES,
    SUBLANES,
    Build,
    Operands,
    attend,
    key_lanes,
    pages_of,
    row_lanes,
    shared_lanes,
    value_lane,
)
from jaxserve.pallas_kernels.paged_attention.places import (
    Extra,
    column,
    row_of_tokens,
    write_places,
)
from jaxserve.pallas_kernels.paged_attention.rounding import finite, rounded
from jaxserve.pallas_kernels.paged_attention.tiles import Tile, heads_of, tile_for
from jaxserve.pallas_kernels.paged_attention.writing import Places, token_rows, write

SMEM_TABLE = 1 << 17
"""Page numbers of one kernel call; scalar memory holds 2**18 numbers. More rows take more calls."""

FEW_QUERIES = 8
"""Up to so many tokens, every row is one item."""


class Pages(NamedTuple):
    """Keys and values [P, K, page_size, lanes].

    Attributes:
        scales: float32[P, 2 K page_size], by head those of the keys, then those of the values;
            None where they have none. Flat, so that a short page takes no row of lanes a head.
    """

    rows: Array
    scales: Array | None = None


@dataclass(frozen=True)
class _Static:
    """What a call is compiled for."""

    spec: AttentionSpec
    page_size: int
    pinned_pages: int
    sink_tokens: int
    max_query: int | None
    lse: bool
    tile: Tile
    interpret: Any
    trips: int | None = None


class _Scales(NamedTuple):
    """Factors of what pages hold.

    Attributes:
        token: as in `Pages`.
        page: float32[P, 2 K], given with the call.
    """

    token: Array | None
    page: Array | None

    @classmethod
    def of(cls, pages: Pages, given: tuple[Array, Array] | None) -> _Scales:
        """Returns those that pages have and those of a call."""
        return cls(pages.scales, None if given is None else jnp.concatenate(given, axis=1))

    @property
    def some(self) -> bool:
        """Returns whether there are any."""
        return self.token is not None or self.page is not None


class _Arrays(NamedTuple):
    """Operands as they are given; see `reference.paged_attention`."""

    q: Array
    q_sink: Array | None
    slopes: Array | None
    mask: Array | None
    scales: _Scales
    pages: Array
    table: Array
    q_start: Array
    kv_len: Array
    q_pos: Array
    fresh: Array | None = None


def init_pages(num_pages: int, page_size: int, spec: CacheSpec) -> Pages:
    """Returns empty pages; see `reference.init_pages`.

    Raises:
        UnsupportedError: a page is no whole number of rows of registers.
    """
    if page_size % SUBLANES:
        raise UnsupportedError(
            f"page_size={page_size} is no multiple of {SUBLANES}; use 16, 32, 64, 128 or 256"
        )
    _, heads, head = spec.token_shape
    rows = jnp.zeros((num_pages, heads, page_size, row_lanes(head)), spec.dtype)
    if not spec.scaled:
        return Pages(rows)
    return Pages(rows, jnp.zeros((num_pages, 2 * heads * page_size), jnp.float32))


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
    interpret: Any = None,
) -> Pages:
    """Returns the pages with k and v[T, K, H] at their places; see `reference.write_pages`."""
    page, offset = write_places(
        page_table, row_of_token, positions, pages.rows.shape[0], page_size, pinned_pages
    )
    new, scales = _new_rows(pages, k, v, page, offset, page_size)
    given = pages.rows, new, Places(jnp.where(positions >= 0, page, -1), offset)
    rows = page_table.shape[0]
    return Pages(_written(rows, interpret, *given), scales)


def _written(rows: int, interpret: Any, *given: Any) -> Array:
    """Returns what `write` does, interpreted where no TPU is."""
    if interpret is not None:
        return write(rows, interpret, *given)
    return lax.platform_dependent(
        *given, tpu=partial(write, rows, False), default=partial(write, rows, True)
    )


def _new_rows(
    pages: Pages, k: Array, v: Array, page: Array, offset: Array, page_size: int
) -> tuple[Array, Array | None]:
    """Returns ([T, K, lanes] as pages hold k and v[T, K, H], the pool's scales with theirs)."""
    if pages.scales is None:
        return token_rows(k, v, pages.rows.dtype), None
    parts = [rounded(x, pages.rows.dtype) for x in (k, finite(v))]
    fresh = jnp.concatenate([scales for _, scales in parts], axis=1)
    place = jnp.arange(fresh.shape[1], dtype=jnp.int32) * page_size
    at = page[:, None], place[None, :] + offset[:, None]
    scales = pages.scales.at[at].set(fresh, mode="drop")
    return token_rows(parts[0][0], parts[1][0], pages.rows.dtype), scales


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
    tile: Tile | None = None,
    interpret: Any = None,
) -> Array | tuple[Array, ...]:
    """Returns softmax(scale q k + bias) v as [T, N, H]; see `reference.paged_attention`.

    Args:
        tile: sizes of the kernel's blocks; None takes those that `tiles` knows.
        interpret: False compiles, True or `InterpretParams` interpret; None compiles on TPU.

    Raises:
        UnsupportedError: an output is asked for that only the reference has.
    """
    refused = [name for name in outputs if name is not Extra.LSE]
    if refused:
        raise UnsupportedError(
            f"backend='tpu' has no outputs={', '.join(refused)} in paged_attention; use 'reference'"
        )
    windowed = spec.window is not None
    sink_tokens = sink_tokens if windowed else 0
    if mask is not None and mask.shape[1] == 0:
        mask = None
    if spec.alibi is None:
        slopes = None
    elif slopes is None:
        slopes = jnp.asarray(alibi_slopes(spec.num_heads))
    arrays = _Arrays(
        q, q_sink if sink_tokens else None, slopes, mask, _Scales.of(pages, scales), pages.rows,
        page_table, q_start, kv_len, q_pos,
    )  # fmt: skip
    need_lse = bool(outputs) or sink_logits is not None
    tile = tile or _tile(spec, page_size, page_table, pages, q)
    static = _Static(
        spec, page_size, pinned_pages, sink_tokens, max_query, need_lse, tile, interpret
    )
    out, lse, _ = _on_platform(static, arrays)
    if sink_logits is not None:
        logits = sink_logits.astype(jnp.float32)[None, :]
        whole = jnp.logaddexp(lse, logits)
        out = (out.astype(jnp.float32) * jnp.exp(lse - whole)[..., None]).astype(out.dtype)
        lse = whole
    return (out, *(lse for _ in outputs)) if outputs else out


def _tile(spec: AttentionSpec, page_size: int, table: Array, pages: Pages, q: Array) -> Tile:
    return tile_for(spec, page_size, table.shape[1], pages.rows.dtype, q_dtype=q.dtype)


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
    tile: Tile | None = None,
    interpret: Any = None,
) -> tuple[Array, Pages]:
    """Returns (attention [T, N, H], the pages with k and v[T, K, H]), the pages updated in place.

    A row with one token stores it while it attends: its last page is in the core's memory anyway.
    Tokens of longer rows are stored first, and so are the scales of all.
    """
    page, offset = write_places(
        page_table, row_of_token, q_pos, pages.rows.shape[0], page_size, pinned_pages
    )
    rows, token_scales = _new_rows(pages, k, v, page, offset, page_size)
    if max_query != 1:
        alone = (q_start[1:] - q_start[:-1])[row_of_token] == 1
        if max_query is not None and max_query <= FEW_QUERIES:
            alone = jnp.zeros_like(alone)
        places = Places(jnp.where(alone | (q_pos < 0), -1, page), offset)
        pages = Pages(_written(page_table.shape[0], interpret, pages.rows, rows, places))
        if max_query is not None and max_query <= FEW_QUERIES:
            rows = None
    pages = pages._replace(scales=token_scales)
    sink_tokens = sink_tokens if spec.window is not None else 0
    if spec.alibi is None:
        slopes = None
    elif slopes is None:
        slopes = jnp.asarray(alibi_slopes(spec.num_heads))
    arrays = _Arrays(
        q, q_sink if sink_tokens else None, slopes, None, _Scales.of(pages, None), pages.rows,
        page_table, q_start, kv_len, q_pos, rows,
    )  # fmt: skip
    tile = tile or _tile(spec, page_size, page_table, pages, q)
    static = _Static(spec, page_size, pinned_pages, sink_tokens, max_query, False, tile, interpret)
    out, _, after = _on_platform(static, arrays)
    return out, Pages(after, token_scales)


def _on_platform(static: _Static, arrays: _Arrays) -> Any:
    """Returns (out, lse, pages) of the compiled kernel on TPU, of the interpreted one elsewhere."""
    if static.interpret is not None:
        return _attention(static, arrays)
    return lax.platform_dependent(
        arrays,
        tpu=partial(_attention, replace(static, interpret=False)),
        default=partial(_attention, replace(static, interpret=True)),
    )


@partial(jax.jit, static_argnums=0)
def _attention(static: _Static, given: _Arrays) -> tuple[Array, Array, Array]:
    """Returns (out [T, N, H], lse float32[T, N], pages); traced once for layers that are alike."""
    tokens, rows, width = given.q.shape[0], *given.table.shape
    if width > SMEM_TABLE:
        raise UnsupportedError(
            f"a page table of {width} columns exceeds {SMEM_TABLE}; use larger pages"
        )
    step = max(1, min(rows, SMEM_TABLE // width))
    out = jnp.zeros_like(given.q)
    lse = jnp.full(out.shape[:2], -jnp.inf, jnp.float32)
    row = row_of_tokens(given.q_start, tokens)
    pages = given.pages
    for start in range(0, rows, step):
        end = min(start + step, rows)
        some = given._replace(
            pages=pages,
            table=given.table[start:end],
            q_start=given.q_start[start : end + 1],
            kv_len=given.kv_len[start:end],
            fresh=given.fresh,
        )
        found_out, found_lse, pages = _some_rows(static, some, row - start)
        if step == rows:
            return found_out, found_lse, pages
        here = (row >= start) & (row < end)
        out = jnp.where(here[:, None, None], found_out, out)
        lse = jnp.where(here[:, None], found_lse, lse)
    return out, lse, pages


def _some_rows(static: _Static, given: _Arrays, row: Array) -> tuple[Array, Array, Array]:
    """Returns (out, lse, pages) of the rows whose page table is given; of others anything."""
    tokens, rows = given.q.shape[0], given.table.shape[0]
    row = jnp.clip(row, 0, rows - 1)
    count = given.q_start[1:] - given.q_start[:-1]
    inside = (jnp.arange(tokens) >= given.q_start[row]) & (
        jnp.arange(tokens) < given.q_start[row + 1]
    )
    runs_out, queries, least = None, static.tile.queries, 2
    number = tokens // queries + min(rows, tokens // 2)
    few = static.max_query is not None and static.max_query <= FEW_QUERIES
    if few:
        queries, least, number = FEW_QUERIES, 1, rows
    pages = given.pages
    if number and static.max_query != 1:
        runs = work.long_runs(given.q_start, given.q_pos, queries, number, least)
        found = _run_items(static, given, runs, queries)
        ends = work.run_ends(given.q_start, queries, least)
        before = jnp.where(row > 0, ends[row - 1], 0)
        within = jnp.arange(tokens, dtype=jnp.int32) - given.q_start[row]
        at = (before + lax.div(within, queries)) * queries + lax.rem(within, queries)
        at = jnp.clip(at, 0, number * queries - 1)
        runs_out = (
            found[0].reshape(-1, *given.q.shape[1:])[at],
            found[1].reshape(-1, given.q.shape[1])[at],
        )
    if few and static.max_query != 1 and runs_out is not None:
        out, lse = runs_out
    else:
        runs = work.single_runs(given.q_start, given.q_pos)
        one_out, one_lse, pages = _run_items(static, given, runs, 1)
        out, lse = one_out[row, 0], one_lse[row, 0]
        if runs_out is not None:
            single = count[row] == 1
            out = jnp.where(single[:, None, None], out, runs_out[0])
            lse = jnp.where(single[:, None], lse, runs_out[1])
    blank = ~inside | (given.q_pos < 0)
    out = jnp.where(blank[:, None, None], 0, out).astype(given.q.dtype)
    return out, jnp.where(blank[:, None], -jnp.inf, lse), pages


def _run_items(
    static: _Static, given: _Arrays, runs: work.Runs, queries: int
) -> tuple[Array, Array, Array]:
    """Returns (out [I, Q, N, H], lse float32[I, Q, N], pages) of runs of queries."""
    build = _build(static, given, runs, queries)
    reach = work.Reach(
        build.block,
        static.spec.window,
        build.sink_tokens,
        build.newest,
        static.tile.cores,
        build.written,
    )
    base = jnp.zeros_like(given.kv_len)
    if static.spec.window is not None:
        newest = lax.div(given.kv_len - 1, static.page_size)
        base = lax.div(jnp.maximum(newest - build.width + 1, 0), build.pages_per_block)
    table = work.items(runs, given.kv_len, base, reach)
    table = work.linked(table, build.cores)
    found, pages = [], given.pages
    for first in range(0, static.spec.num_kv_heads, build.spec.num_kv_heads):
        some = given._replace(pages=pages)
        out, lse, pages = _run_heads(
            static, some, runs, replace(build, first_head=first), base, table
        )
        found.append((out, lse))
    out, lse = (
        x[0] if len(x) == 1 else jnp.concatenate(x, axis=2) for x in zip(*found, strict=True)
    )
    if build.cores > 1:
        out, lse = merged(
            out.reshape(build.cores, -1, *out.shape[1:]),
            lse.reshape(build.cores, -1, *lse.shape[1:]),
        )
    return out, lse, pages


def _run_heads(
    static: _Static, given: _Arrays, runs: work.Runs, build: Build, base: Array, table: Array
) -> tuple[Array, Array, Array]:
    """Returns (out [cores I, Q, N, H], lse float32[cores I, Q, N], pages) of a build's heads."""
    first, heads = build.first_head, build.spec.num_kv_heads
    own = slice(first * build.group, (first + heads) * build.group)
    several = build.queries > 1
    q_sink, slopes, fresh = given.q_sink, given.slopes, given.fresh

    def queries(x: Array) -> Array:
        return _shared(static, _by_head(x[:, own][runs.token], build))

    operands = Operands(
        items=table.reshape(-1),
        first=work.first_items(table, build.cores),
        table=given.table.reshape(-1),
        q=queries(given.q),
        q_sink=None if q_sink is None else queries(q_sink),
        q_pos=_shared(static, runs.q_pos[..., None]) if several else None,
        slopes=None if slopes is None else _slopes(slopes[own], build),
        mask=None if given.mask is None else _shared(static, _mask(given.mask, runs)),
        scales=_scales(given, base, build) if given.scales.some else None,
        fresh=None
        if fresh is None or several
        else _fresh(static, fresh[:, first : first + heads], runs),
        pages=given.pages,
    )
    out, lse, pages = attend(build, operands, static.interpret)
    out, lse = _by_token(out, lse, build)
    if lse is None:
        lse = jnp.zeros(out.shape[:3], jnp.float32)
    return out, lse, pages


def merged(out: Array, lse: Array) -> tuple[Array, Array]:
    """Returns attention over all keys from that over S disjoint sets of them, exactly.

    Args:
        out: float32[S, ..., H], each normalised over its own keys.
        lse: float32[S, ...], -inf where a set holds no key that is seen.
    """
    top = jnp.max(lse, axis=0)
    weights = jnp.exp(lse - jnp.where(jnp.isfinite(top), top, 0.0)[None])
    total = jnp.sum(weights, axis=0)
    some = jnp.where(total > 0, total, 1.0)
    whole = jnp.sum(out * weights[..., None], axis=0) / some[..., None]
    return whole, jnp.where(total > 0, jnp.log(some) + top, -jnp.inf)


def _build(static: _Static, given: _Arrays, runs: work.Runs, queries: int) -> Build:
    tile, split = static.tile, static.tile.cores > 1
    keys = tile.decode_keys if queries == 1 else tile.prefill_keys
    heads = static.spec.num_kv_heads
    apart = 0 < tile.key_heads < heads
    return Build(
        spec=heads_of(static.spec, tile.key_heads) if apart else static.spec,
        queries=queries,
        page_size=static.page_size,
        pages_per_block=pages_of(keys, static.page_size),
        width=given.table.shape[1],
        pinned_pages=static.pinned_pages,
        sink_tokens=static.sink_tokens,
        newest=0 if given.mask is None else given.mask.shape[1],
        sink_queries=given.q_sink is not None,
        scaled=given.scales.some,
        lse=static.lse or split,
        written=given.fresh is not None and queries == 1,
        items=len(runs.row),
        cores=tile.cores,
        out_dtype="float32" if split or static.lse else str(given.q.dtype),
        trips=static.trips,
        small=static.interpret is True,
        page_heads=heads if apart else 0,
    )


def _shared(static: _Static, x: Array) -> Array:
    """Returns operands of every item, where each core has its own share of the same ones."""
    return jnp.concatenate([x] * static.tile.cores) if static.tile.cores > 1 else x


def _fresh(static: _Static, fresh: Array, runs: work.Runs) -> Array:
    """Returns [I, K, 1, lanes], what each item of one token stores."""
    return _shared(static, fresh[runs.token[:, 0], :, None])


def _by_head(q: Array, build: Build) -> Array:
    """Returns [I, K, rows, lanes] for q[I, Q, N, H]: heads of a group after each other."""
    count, queries, num_heads, head = q.shape
    heads = build.spec.num_kv_heads
    q = q.reshape(count, queries, heads, num_heads // heads, head).transpose(0, 2, 3, 1, 4)
    q = q.reshape(count, heads, -1, head)
    spare = build.rows - q.shape[2], key_lanes(head) - head
    return jnp.pad(q, ((0, 0), (0, 0), (0, spare[0]), (0, spare[1])))


def _by_token(out: Array, lse: Array | None, build: Build) -> tuple[Array, Array | None]:
    """Returns (out [I, Q, N, H], lse [I, Q, N]) from what the kernel returns."""
    spec, count = build.spec, out.shape[0]
    used = build.group * build.queries
    start = value_lane(spec.head_dim) if shared_lanes(spec.head_dim) else 0
    shape = count, spec.num_kv_heads, build.group, build.queries
    out = out[:, :, :used, start : start + spec.head_dim].reshape(*shape, spec.head_dim)
    out = out.transpose(0, 3, 1, 2, 4).reshape(count, build.queries, spec.num_heads, -1)
    if lse is None:
        return out, None
    lse = lse[:, :, :used].reshape(shape).transpose(0, 3, 1, 2)
    return out, lse.reshape(count, build.queries, spec.num_heads)


def _slopes(slopes: Array, build: Build) -> Array:
    """Returns float32[K, rows, 1], the slope of every row of queries."""
    alibi = build.spec.alibi
    assert alibi is not None
    if alibi.bfloat16:
        slopes = lax.reduce_precision(slopes, exponent_bits=8, mantissa_bits=7)
    rows = jnp.repeat(slopes.reshape(build.spec.num_kv_heads, build.group), build.queries, axis=1)
    spare = build.rows - rows.shape[1]
    return jnp.pad(rows, ((0, 0), (0, spare)))[..., None]


def _mask(mask: Array, runs: work.Runs) -> Array:
    """Returns float32[I, Q, lanes] of mask bool[T, M]."""
    rows = mask[runs.token].astype(jnp.float32)
    return jnp.pad(rows, ((0, 0), (0, 0), (0, -rows.shape[2] % LANES)))


def _scales(given: _Arrays, base: Array, build: Build) -> Array:
    """Returns float32[B, blocks, 2 K, block], the scales of a block: keys' before values'.

    They are gathered here because a row of lanes of the kernel holds 128 keys, and pages of fewer
    would have to be put together in it.
    """
    rows, width = given.table.shape
    sinks = build.sink_blocks
    blocks = -(-width // build.pages_per_block) + (2 + sinks if build.spec.window else 0)
    place = jnp.arange(blocks, dtype=jnp.int32)[None, :]
    block = jnp.where(place < sinks, place, base[:, None] + place - sinks)
    page = block[:, :, None] * build.pages_per_block
    page = page + jnp.arange(build.pages_per_block, dtype=jnp.int32)[None, None, :]
    if build.spec.window is not None:
        page = column(page, width, build.pinned_pages)
    page = jnp.clip(page, 0, width - 1).reshape(rows, -1)
    page = jnp.take_along_axis(given.table, page, axis=1)
    heads, first = build.spec.num_kv_heads, build.first_head
    both = jnp.ones((1, 1, 1, 2, heads, 1), jnp.float32)
    every = 2, build.page_heads or heads
    for scales in given.scales:
        if scales is not None:
            found = scales[page].reshape(rows, blocks, build.pages_per_block, *every, -1)
            both = both * found[..., first : first + heads, :]
    kinds = 2 * heads
    both = both.reshape(*both.shape[:3], kinds, -1)
    shape = *both.shape[:4], build.page_size
    both = jnp.broadcast_to(both, shape).transpose(0, 1, 3, 2, 4)
    both = both.reshape(rows, blocks, kinds, build.block)
    return jnp.pad(both, ((0, 0), (0, 0), (0, -kinds % SUBLANES), (0, 0)))
