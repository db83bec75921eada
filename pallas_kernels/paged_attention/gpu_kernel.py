"""The attention kernel of Hopper: one block of threads for an item, a key head and a share of keys.

One group of threads copies blocks of keys and values, page by page, into slots that go round. The
others multiply: 64 rows each, which are the query heads of a group and the tokens of an item. Rows
beyond those hold anything and are dropped; no row meets another.

Softmax is kept in base two. Weights go from registers to the second product; pages of one byte
become the queries' type on their way from one part of shared memory to another, and their scales
multiply scores and weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from jaxserve.config import AttentionSpec
from jaxserve.pallas_kernels.hopper import ROWS, swizzled
from jaxserve.pallas_kernels.paged_attention.gpu_tiles import Tile, chunk_of
from jaxserve.pallas_kernels.paged_attention.items import Item

plgpu: Any = mosaic_gpu  # whose types do not know its own references

LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class Build:
    """What a kernel is compiled for.

    Attributes:
        rows: of an item and key head that mean something.
        groups: groups of threads that multiply.
        splits: shares of every item's keys.
        sink_blocks: blocks that are read before a window's first.
    """

    spec: AttentionSpec
    tile: Tile
    rows: int
    groups: int
    splits: int
    page_size: int
    width: int
    pinned_pages: int
    sink_tokens: int
    sink_blocks: int
    out_dtype: str

    @property
    def blocks(self) -> int:
        """Returns the blocks of threads that share an item's rows."""
        return -(-self.rows // (self.groups * ROWS))

    @property
    def stored(self) -> int:
        """Returns the rows that a group of threads reads and stores."""
        return ROWS if self.blocks * self.groups > 1 else -(-self.rows // 8) * 8

    @property
    def all_rows(self) -> int:
        """Returns the rows of `Operands.q`."""
        return self.blocks * self.groups * self.stored

    @property
    def copy_keys(self) -> int:
        """Returns the keys of one copy."""
        return min(self.page_size, self.tile.keys)


class Operands(NamedTuple):
    """Arrays of a call.

    Attributes:
        items: int32[splits * I, Item.SIZE].
        table: int32[B, W].
        q_pos: int32[I, blocks * groups * 64], position of each row, -1 where there is none.
        slopes: float32[K, blocks * groups * 64].
        q, q_sink: [I, K, rows, H].
        keys, values: [P, K, page_size, H].
        scales: float32[P, K, page_size], of keys and of values.
    """

    items: Array
    table: Array
    q_pos: Array
    slopes: Array | None
    q: Array
    q_sink: Array | None
    keys: Array
    values: Array
    scales: tuple[Array, Array] | None


class _Slots(NamedTuple):
    """Places in shared memory; `full` counts the copies into a slot, `free` those done with it."""

    q: Any
    q_sink: Any
    keys: Any
    values: Any
    scales: Any
    wide: Any
    weights: Any
    out: Any
    lse: Any
    arrived: Any
    full: Any
    free: Any


class _Sums(NamedTuple):
    """Softmax over the keys so far: maximum, total, weighted values in chunks of features."""

    top: Any
    total: Any
    out: tuple[Any, ...]


def attend(build: Build, operands: Operands, interpret: Any) -> tuple[Array, Array]:
    """Returns (out [splits, I, K, rows, H], lse float32[splits, I, K, rows of 64])."""
    count, heads, _, head = operands.q.shape
    all_lse = build.blocks * build.groups * ROWS
    out = jax.ShapeDtypeStruct((build.splits, count, heads, build.all_rows, head), build.out_dtype)
    lse = jax.ShapeDtypeStruct((build.splits, count, heads, all_lse), jnp.float32)
    given, tree = jax.tree.flatten(operands)
    return plgpu.kernel(
        partial(_kernel, build, tree, len(given)),
        out_type=(out, lse),
        grid=(build.blocks, heads, count, build.splits),
        grid_names=("block", "head", "item", "share"),
        num_threads=build.groups + 1,
        thread_name="group",
        scratch_types=_scratch(build, operands, bool(interpret)),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret or None,
    )(*given)


def _scratch(build: Build, operands: Operands, interpret: bool) -> _Slots:
    tile, head, wide = build.tile, build.spec.head_dim, operands.q.dtype
    narrow = operands.keys.dtype
    scaled = operands.scales is not None

    def rows(*shape: int, dtype: Any = wide) -> Any:
        # Chunks of features are whole swizzles.
        return plgpu.SMEM(shape, dtype, transforms=swizzled(chunk_of(shape[-1]), dtype))

    queries = build.groups, ROWS, head
    kept = plgpu.SMEM((tile.stages, tile.keys), jnp.float32)
    copies = tile.keys // build.copy_keys * (2 if scaled else 1)
    full = plgpu.Barrier(num_arrivals=copies, num_barriers=tile.stages)
    return _Slots(
        q=rows(*queries),
        q_sink=None if operands.q_sink is None else rows(*queries),
        keys=rows(tile.stages, tile.keys, head, dtype=narrow),
        values=rows(tile.stages, tile.keys, head, dtype=narrow),
        scales=(kept, kept) if scaled else None,
        wide=rows(tile.keys, head) if narrow != wide else None,
        # The interpreter has no wgmma whose left operand lies in registers.
        weights=rows(build.groups, ROWS, tile.keys) if interpret else None,
        out=rows(build.groups, ROWS, chunk_of(head), dtype=jnp.dtype(build.out_dtype)),
        lse=plgpu.SMEM((build.groups, ROWS), jnp.float32),
        arrived=plgpu.Barrier(
            num_arrivals=1 if operands.q_sink is None else 2, num_barriers=build.groups
        ),
        full=(full, full),
        free=plgpu.Barrier(num_arrivals=build.groups, num_barriers=tile.stages),
    )


def _kernel(build: Build, tree: Any, count: int, *refs: Any) -> None:
    given: Operands = jax.tree.unflatten(tree, refs[:count])
    out, lse, *rest = refs[count:]
    slots = rest[0] if len(rest) == 1 else _Slots(*rest)
    group, item = lax.axis_index("group"), lax.axis_index("item")
    place = lax.axis_index("share") * given.q.shape[0] + item
    first, low, high = (given.items[place, i] for i in (Item.FIRST, Item.LOW, Item.HIGH))

    @pl.when(group == build.groups)
    def _copy() -> None:
        _registers(build, 40)
        row, length = (given.items[place, i] for i in (Item.ROW, Item.KV_LEN))

        def turn(t: Any, none: None) -> None:
            slot = lax.rem(t - low, build.tile.stages)

            @pl.when(t - low >= build.tile.stages)
            def _() -> None:
                plgpu.barrier_wait(slots.free.at[slot])

            block = _block(build, first, t)
            _copy_block(build, given, slots, (row, length), block, slot)

        def drain(t: Any, none: None) -> None:
            plgpu.barrier_wait(slots.free.at[lax.rem(t - low, build.tile.stages)])

        lax.fori_loop(low, high, turn, None)
        lax.fori_loop(jnp.maximum(high - build.tile.stages, low), high, drain, None)

    @pl.when(group < build.groups)
    def _attend() -> None:
        _registers(build, 232)
        sums = _reduced(build, given, slots, place, (first, low, high))
        _store(build, slots, sums, out, lse)


def _registers(build: Build, n: int) -> None:
    """Gives a group of threads its share, where three groups would have 168 each."""
    if build.groups > 1:
        plgpu.set_max_registers(n, action="decrease" if n < 128 else "increase")


def _block(build: Build, first: Any, turn: Any) -> Any:
    """Returns the number of the block that is read in a turn: those of sinks come first."""
    if not build.sink_blocks:
        return first + turn
    return jnp.where(turn < build.sink_blocks, turn, first + turn - build.sink_blocks)


def _copy_block(
    build: Build, given: Operands, slots: _Slots, sequence: tuple[Any, Any], block: Any, slot: Any
) -> None:
    """Starts the copies of a block's keys, values and scales.

    A block may reach past a sequence's last page, and reads that one again: its keys are masked.

    Args:
        sequence: row of the table, and tokens.
    """
    row, length = sequence
    last = lax.div(jnp.maximum(length - 1, 0), build.page_size)
    head, size = lax.axis_index("head"), build.copy_keys
    for part in range(build.tile.keys // size):
        start = block * build.tile.keys + part * size
        number = lax.div(start, build.page_size)
        offset = pl.multiple_of(start - number * build.page_size, size)
        page = given.table[row, _column(build, jnp.minimum(number, last))]
        here, there = pl.ds(offset, size), pl.ds(part * size, size)
        for source, kept, full in zip(
            (given.keys, given.values), (slots.keys, slots.values), slots.full, strict=True
        ):
            plgpu.copy_gmem_to_smem(
                source.at[page, head, here], kept.at[slot, there], full.at[slot]
            )
        if given.scales is not None:
            for source, kept, full in zip(given.scales, slots.scales, slots.full, strict=True):
                plgpu.copy_gmem_to_smem(
                    source.at[page, head, here], kept.at[slot, there], full.at[slot]
                )


def _column(build: Build, page: Any) -> Any:
    """Returns where a sequence's page stands in its table; see `places.column`."""
    turning = build.width - build.pinned_pages
    if build.spec.window is None or turning == 0:
        return page
    later = build.pinned_pages + lax.rem(jnp.maximum(page - build.pinned_pages, 0), turning)
    return jnp.where(page < build.pinned_pages, page, later)


def _reduced(
    build: Build, given: Operands, slots: _Slots, place: Any, turns: tuple[Any, Any, Any]
) -> _Sums:
    """Returns softmax over an item's share of keys, for the rows of this group."""
    group, item, head = (lax.axis_index(name) for name in ("group", "item", "head"))
    first, low, high = turns
    clear, edge = given.items[place, Item.CLEAR], given.items[place, Item.EDGE]
    number = lax.axis_index("block") * build.groups + group
    mine = pl.ds(number * build.stored, build.stored)
    for source, kept in ((given.q, slots.q), (given.q_sink, slots.q_sink)):
        if source is not None:
            plgpu.copy_gmem_to_smem(
                source.at[item, head, mine],
                kept.at[group, pl.ds(0, build.stored)],
                slots.arrived.at[group],
            )
    by_row = plgpu.Layout.WGMMA.reduce(1)
    all_mine = pl.ds(number * ROWS, ROWS)
    q_pos = plgpu.load(given.q_pos.at[item, all_mine], layout=by_row, optimized=False)
    slopes = None
    if given.slopes is not None:
        slopes = plgpu.load(given.slopes.at[head, all_mine], layout=by_row, optimized=False)
    plgpu.barrier_wait(slots.arrived.at[group])

    def turn(t: Any, sums: _Sums) -> _Sums:
        slot = lax.rem(t - low, build.tile.stages)
        start = _block(build, first, t) * build.tile.keys
        scores = _scores(build, slots, slot, start, slopes)
        masked = (t < clear) | (t >= edge)
        scores = lax.cond(masked, partial(_masked, build, q_pos, start), lambda s: s, scores)
        return _added(build, slots, slot, sums, scores)

    def full(shape: tuple[int, ...], value: float, layout: Any) -> Any:
        return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

    features = build.spec.head_dim
    empty = _Sums(
        full((ROWS,), -jnp.inf, by_row),
        full((ROWS,), 0.0, by_row),
        tuple(
            full((ROWS, chunk_of(features)), 0.0, plgpu.Layout.WGMMA)
            for c in range(0, features, chunk_of(features))
        ),
    )
    return lax.fori_loop(low, high, turn, empty)


def _scores(build: Build, slots: _Slots, slot: Any, start: Any, slopes: Any) -> Any:
    """Returns float32[64, keys], scores in base two, nothing masked."""
    spec, group = build.spec, lax.axis_index("group")
    shape = ROWS, build.tile.keys
    plgpu.barrier_wait(slots.full[0].at[slot])
    keys = _as_queries(slots, slots.keys.at[slot])

    def product(q: Any) -> Any:
        def run(acc: Any) -> Any:
            plgpu.wgmma(acc, q.at[group], keys.transpose((1, 0)))
            plgpu.wgmma_wait(0)
            return acc[...]

        return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))

    s = product(slots.q)
    if slots.q_sink is not None:
        s = jnp.where(_positions(shape, start) < build.sink_tokens, product(slots.q_sink), s)
    scale = spec.score_scale
    if slots.scales is not None:
        s = s * _by_key(slots.scales[0].at[slot], shape)
    if spec.soft_cap is not None:
        s = jnp.tanh(s * (scale / spec.soft_cap)) * spec.soft_cap
        scale = 1.0
    s = s * (scale * LOG2E)
    if slopes is not None:
        s = s + _bias(build, slopes, start) * LOG2E
    return s


def _bias(build: Build, slopes: Any, start: Any) -> Any:
    """Returns float32[64, keys], slope of the row times position of the key."""
    shape, alibi = (ROWS, build.tile.keys), build.spec.alibi
    assert alibi is not None
    position = _positions(shape, start).astype(jnp.float32)
    if alibi.bfloat16:
        position = position.astype(jnp.bfloat16).astype(jnp.float32)
    bias = lax.broadcast_in_dim(slopes, shape, [0]) * position
    if alibi.bfloat16:
        bias = bias.astype(jnp.bfloat16).astype(jnp.float32)
    return bias * alibi.scale


def _positions(shape: tuple[int, int], start: Any) -> Any:
    """Returns int32[64, keys], the position of each key."""
    keys = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
    return keys + start


def _masked(build: Build, q_pos: Any, start: Any, scores: Any) -> Any:
    """Returns scores, -inf for keys that come after a row's query or have left its window."""
    k_pos = _positions(scores.shape, start)
    distance = lax.broadcast_in_dim(q_pos, scores.shape, [0]) - k_pos
    seen = distance >= 0
    if build.spec.window is not None:
        near = distance < build.spec.window
        seen = seen & (near | (k_pos < build.sink_tokens) if build.sink_tokens else near)
    return jnp.where(seen, scores, -jnp.inf)


def _added(build: Build, slots: _Slots, slot: Any, sums: _Sums, scores: Any) -> _Sums:
    """Returns the softmax with a block more; its slot is free afterwards."""
    group, shape = lax.axis_index("group"), scores.shape
    top = jnp.maximum(sums.top, jnp.max(scores, axis=1))
    # Where nothing has been seen yet, any finite number leaves weights of zero.
    base = jnp.where(top == -jnp.inf, 0.0, top)
    weights = jnp.exp2(scores - lax.broadcast_in_dim(base, shape, [0]))
    decay = jnp.exp2(sums.top - base)
    total = sums.total * decay + jnp.sum(weights, axis=1)
    if slots.scales is not None:
        plgpu.barrier_wait(slots.full[1].at[slot])
        weights = weights * _by_key(slots.scales[1].at[slot], shape)
    else:
        plgpu.barrier_wait(slots.full[1].at[slot])
    p = weights.astype(slots.q.dtype)
    if slots.weights is not None:
        slots.weights[group] = p
        plgpu.commit_smem()
        p = slots.weights.at[group]
    values = _as_queries(slots, slots.values.at[slot])
    out = []
    for c, chunk in enumerate(sums.out):
        features = pl.ds(c * chunk.shape[1], chunk.shape[1])

        kept = chunk * lax.broadcast_in_dim(decay, chunk.shape, [0])
        out.append(_plus_product(kept, p, values.at[:, features], slots.weights is not None))
    plgpu.barrier_arrive(slots.free.at[slot])
    return _Sums(top, total, tuple(out))


def _plus_product(kept: Any, p: Any, values: Any, interpreted: bool) -> Any:
    """Returns kept + p values; the interpreter has no sums that begin with something."""

    def run(acc: Any) -> None:
        plgpu.wgmma(acc, p, values)
        plgpu.wgmma_wait(0)

    if not interpreted:
        return pl.run_state(run)(plgpu.ACC.init(kept))

    def alone(acc: Any) -> Any:
        run(acc)
        return acc[...]

    return kept + pl.run_scoped(alone, plgpu.ACC(kept.shape, jnp.float32))


def _as_queries(slots: _Slots, rows: Any) -> Any:
    """Returns rows of keys or values in the queries' type, in shared memory."""
    if slots.wide is None:
        return rows
    # All threads are done with what is overwritten.
    plgpu.commit_smem()
    size = chunk_of(rows.shape[1])
    for start in range(0, rows.shape[1], size):
        part = slice(None), pl.ds(start, size)
        x = rows.at[part][...]
        if x.dtype == jnp.float8_e4m3fn:
            x = x.astype(jnp.float32)  # which is how Hopper converts it
        slots.wide.at[part][...] = x.astype(slots.wide.dtype)
    plgpu.commit_smem()
    return slots.wide


def _by_key(scales: Any, shape: tuple[int, int]) -> Any:
    x = plgpu.load(scales, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
    return lax.broadcast_in_dim(x, shape, [1])


def _store(build: Build, slots: _Slots, sums: _Sums, out: Any, lse: Any) -> None:
    """Writes what a group of threads found."""
    group, item, head = (lax.axis_index(name) for name in ("group", "item", "head"))
    number = lax.axis_index("block") * build.groups + group
    at = lax.axis_index("share"), item, head
    some = jnp.where(sums.total > 0, sums.total, 1.0)
    slots.lse[group] = jnp.where(
        sums.total > 0, (sums.top + jnp.log2(some)) * (1 / LOG2E), -jnp.inf
    )
    inverse = 1.0 / some
    for c, chunk in enumerate(sums.out):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        kept = slots.out.at[group, :, pl.ds(0, chunk.shape[1])]
        kept[...] = (chunk * lax.broadcast_in_dim(inverse, chunk.shape, [0])).astype(out.dtype)
        plgpu.commit_smem()
        rows = pl.ds(number * build.stored, build.stored)
        plgpu.copy_smem_to_gmem(
            slots.out.at[group, pl.ds(0, build.stored), pl.ds(0, chunk.shape[1])],
            out.at[(*at, rows, pl.ds(c * chunk.shape[1], chunk.shape[1]))],
        )
    plgpu.copy_smem_to_gmem(slots.lse.at[group], lse.at[(*at, pl.ds(number * ROWS, ROWS))])
    plgpu.wait_smem_to_gmem(0)
