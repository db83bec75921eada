"""The TPU kernel of attention over pages, and what it needs to know before it is compiled.

A grid step is one item (see `items`): it reads its blocks of keys and values, one page per copy,
while the copies of the next block, its own or that of the next item, are under way. Softmax is
kept in base two, its denominator by lane; both are put together when the item ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxserve.config import AttentionSpec
from jaxserve.pallas_kernels.paged_attention.items import Item

LANES = 128
SUBLANES = 8

MOST_SCORES = 1 << 16
"""Scores of a head and block, up to which the work of several heads is put side by side."""

MOST_HEADS = 8
"""Key heads whose work is put side by side, at most; more would not fit into the registers."""

LOG2_E = math.log2(math.e)

_HIDDEN = -2e30
"""Score of a key that is not seen. A query's maximum starts above it, so such a key weighs exactly
zero even where nothing else is seen."""
_LOWEST = -1e30


@dataclass(frozen=True)
class Build:
    """All that one compiled kernel depends on.

    Attributes:
        spec: of the attention.
        queries: tokens of an item, 1 or a multiple of 8.
        page_size: tokens of a page.
        pages_per_block: pages read at once.
        width: columns of a page table.
        pinned_pages, sink_tokens: see `reference.paged_attention`.
        newest: keys of the mask, 0 without one.
        sink_queries: the sink keys have queries of their own.
        scaled: pages have scales.
        lse: whether the logarithm of the denominator is asked for.
        written: each item stores the key and value of its one token first.
        items: of each core.
        cores: over which the grid is divided.
        trips: with a number, every item reads this many unmasked blocks, whatever its scalars
            say: for estimates, which need loops of known length.
        small: loops stay loops; interpreting compiles for long otherwise.
        copies: whether blocks are copied; without, an estimate is that of the computation alone.
        first_head: key head of the pages at which those of `spec` begin.
        page_heads: key heads of the pages; 0 where they are those of `spec`.
    """

    spec: AttentionSpec
    queries: int
    page_size: int
    pages_per_block: int
    width: int
    pinned_pages: int
    sink_tokens: int
    newest: int
    sink_queries: bool
    scaled: bool
    lse: bool
    written: bool
    items: int
    cores: int
    out_dtype: str
    trips: int | None = None
    small: bool = False
    copies: bool = True
    first_head: int = 0
    page_heads: int = 0

    @property
    def together(self) -> int:
        """Returns the key heads that follow each other in the code; the others wait in a loop."""
        heads = self.spec.num_kv_heads
        if self.small or self.rows * self.block > MOST_SCORES:
            return 1
        return max(part for part in range(1, MOST_HEADS + 1) if heads % part == 0)

    def stored_rows(self, bytes_each: int) -> int:
        """Returns the tokens of a page that are stored at once: a row of registers if they fit."""
        rows = SUBLANES * 4 // bytes_each
        return self.page_size if self.page_size % rows else rows

    @property
    def block(self) -> int:
        """Returns the keys of a block."""
        return self.page_size * self.pages_per_block

    @property
    def group(self) -> int:
        """Returns the query heads that share a key head."""
        return self.spec.num_heads // self.spec.num_kv_heads

    @property
    def rows(self) -> int:
        """Returns the rows of queries of a key head, head by head, in whole registers."""
        return -(-self.group * self.queries // SUBLANES) * SUBLANES

    @property
    def sink_blocks(self) -> int:
        """Returns the blocks that hold sink keys."""
        return -(-self.sink_tokens // self.block) if self.spec.window is not None else 0


def shared_lanes(head: int) -> bool:
    """Returns whether a key and its value fit into one row of lanes."""
    return head <= LANES // 2


def key_lanes(head: int) -> int:
    """Returns the lanes that queries are multiplied over."""
    return -(-head // LANES) * LANES


def row_lanes(head: int) -> int:
    """Returns the lanes of a token's key and value together."""
    return LANES if shared_lanes(head) else 2 * key_lanes(head)


def value_lane(head: int) -> int:
    """Returns the lane at which a value begins."""
    return LANES // 2 if shared_lanes(head) else key_lanes(head)


class Operands(NamedTuple):
    """Arrays of a call; those that a build has no use for are None.

    Attributes:
        items: int32[cores * items * Item.SIZE].
        first: int32[cores], first item that reads anything.
        table: int32[B * width].
        q, q_sink: [I, K, rows, lanes].
        q_pos: int32[I, queries, 1], where an item has more than one token.
        slopes: float32[K, rows, 1] in base two.
        mask: float32[I, queries, newest in whole lanes].
        scales: float32[B, blocks, 2 * K in whole registers, block], of each key and value.
        fresh: [I, K, 1, lanes], keys and values to store.
        pages: [P, K, page_size, lanes].
    """

    items: Array
    first: Array
    table: Array
    q: Array
    q_sink: Array | None
    q_pos: Array | None
    slopes: Array | None
    mask: Array | None
    scales: Array | None
    fresh: Array | None
    pages: Array


class _Scratch(NamedTuple):
    """Memory of a core that outlives a grid step or is too large for registers."""

    blocks: Any
    copied: Any
    scales: Any
    scaled: Any
    stored: Any
    top: Any
    total: Any
    out: Any
    slot: Any


def attend(build: Build, given: Operands, interpret: Any) -> tuple[Array, Array | None, Array]:
    """Returns (out [I, K, rows, lanes], lse float32[I, K, rows] or None, the pages)."""
    spec, heads = build.spec, build.spec.num_kv_heads
    lanes = row_lanes(spec.head_dim)
    out_lanes = key_lanes(spec.head_dim)
    count = given.q.shape[0]

    def by_item(*shape: int) -> pl.BlockSpec:
        zeros = (0,) * len(shape)
        return pl.BlockSpec((None, *shape), lambda core, i, *_: (core * build.items + i, *zeros))

    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    blocked = {
        "q": by_item(*given.q.shape[1:]),
        "q_sink": by_item(*given.q.shape[1:]),
        "q_pos": by_item(build.queries, 1),
        "slopes": pl.BlockSpec((heads, build.rows, 1), lambda *_: (0, 0, 0)),
        "mask": None if given.mask is None else by_item(*given.mask.shape[1:]),
        "scales": anywhere,
        "fresh": None if given.fresh is None else by_item(*given.fresh.shape[1:]),
        "pages": anywhere,
    }
    names = [name for name in blocked if getattr(given, name) is not None]
    out_shape = [jax.ShapeDtypeStruct((count, heads, build.rows, out_lanes), build.out_dtype)]
    out_specs = [by_item(heads, build.rows, out_lanes)]
    if build.lse:
        out_shape.append(jax.ShapeDtypeStruct((count, heads, build.rows, 1), jnp.float32))
        out_specs.append(by_item(heads, build.rows, 1))
    aliases = {}
    if build.written:
        aliases = {3 + names.index("pages"): len(out_shape)}
        out_shape.append(jax.ShapeDtypeStruct(given.pages.shape, given.pages.dtype))
        out_specs.append(anywhere)
    state = jax.ShapeDtypeStruct((heads, build.rows, LANES), jnp.float32)
    scale_shape = (1, LANES) if given.scales is None else given.scales.shape[2:]
    page = (heads, build.page_size, lanes)
    scratch = [
        pltpu.VMEM((2, build.pages_per_block, *page), given.pages.dtype),
        pltpu.SemaphoreType.DMA((2,)),
        pltpu.VMEM((2, *scale_shape), jnp.float32),
        pltpu.SemaphoreType.DMA((2,)),
        pltpu.SemaphoreType.DMA,
        pltpu.VMEM(state.shape, jnp.float32),
        pltpu.VMEM(state.shape, jnp.float32),
        pltpu.VMEM((heads, build.rows, out_lanes), jnp.float32),
        pltpu.SMEM((1,), jnp.int32),
    ]
    found = pl.pallas_call(
        partial(_kernel, build, names),
        out_shape=out_shape,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(build.cores, build.items),
            in_specs=[blocked[name] for name in names],
            out_specs=out_specs,
            scratch_shapes=scratch,
        ),
        input_output_aliases=aliases,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=vmem_bytes(build, given.pages.dtype, given.q.dtype),
        ),
        interpret=interpret,
        name="paged_attention",
    )(given.items, given.first, given.table, *(getattr(given, name) for name in names))
    out, *rest = found
    lse = rest.pop(0)[..., 0] if build.lse else None
    return out, lse, rest.pop() if build.written else given.pages


def vmem_bytes(build: Build, page_dtype: Any, q_dtype: Any) -> int:
    """Returns the memory that a core is asked for."""
    return max(16 << 20, used_bytes(build, page_dtype, q_dtype) + (4 << 20))


def used_bytes(build: Build, page_dtype: Any, q_dtype: Any) -> int:
    """Returns the memory of a core's blocks and operands, both twice, of its sums and scores."""
    spec, heads = build.spec, build.spec.num_kv_heads
    lanes = row_lanes(spec.head_dim)
    page_size, q_size = jnp.dtype(page_dtype).itemsize, jnp.dtype(q_dtype).itemsize
    block = heads * build.block * lanes * page_size
    if build.scaled:
        block += -(-2 * heads // SUBLANES) * SUBLANES * build.block * 4
    rows = heads * build.rows
    wide = rows * key_lanes(spec.head_dim)
    out_size = jnp.dtype(build.out_dtype).itemsize
    operands = wide * (q_size * (1 + build.sink_queries) + out_size)
    # One number a row takes a row of lanes.
    operands += rows * LANES * 4 * (build.lse + (spec.alibi is not None))
    if build.queries > 1:
        operands += build.queries * (LANES + -(-build.newest // LANES) * LANES) * 4
    if build.written:
        operands += heads * SUBLANES * 4 * lanes
    sums = rows * 2 * LANES * 4 + wide * 4
    # Scores, their weights, and what they become.
    scores = build.together * build.rows * build.block * (4 + 4 + q_size)
    return 2 * (block + operands) + sums + scores


def pages_of(keys: int, page_size: int) -> int:
    """Returns the pages of a block of about `keys` keys, in whole rows of lanes."""
    step = LANES // math.gcd(LANES, page_size)
    return max(1, round(keys / page_size / step)) * step


def _kernel(build: Build, names: list[str], numbers: Any, first: Any, table: Any, *refs: Any):
    given: dict[str, Any] = dict.fromkeys(Operands._fields)
    given.update(zip(names, refs[: len(names)], strict=True))
    outs = list(refs[len(names) : -len(_Scratch._fields)])
    scratch = _Scratch(*refs[-len(_Scratch._fields) :])
    out = outs.pop(0)
    lse = outs.pop(0) if build.lse else None
    pages = outs.pop(0) if build.written else given["pages"]
    step = _Step(build, numbers, table, given, pages, scratch)
    core, index = pl.program_id(0), pl.program_id(1)
    item = core * build.items + index

    @pl.when(index == 0)
    def _():
        scratch.slot[0] = 0
        # Pages that a last block does not have keep what stood here, and must be numbers.
        scratch.blocks[...] = jnp.zeros_like(scratch.blocks)
        scratch.scales[...] = jnp.zeros_like(scratch.scales)

        @pl.when(first[core] >= 0)
        def _():
            step.start(first[core], step.number(first[core], Item.LOW), 0)

    low, high = step.number(item, Item.LOW), step.number(item, Item.HIGH)
    clear, edge = step.number(item, Item.CLEAR), step.number(item, Item.EDGE)
    scratch.top[...] = jnp.full_like(scratch.top, _LOWEST)
    scratch.total[...] = jnp.zeros_like(scratch.total)
    scratch.out[...] = jnp.zeros_like(scratch.out)
    if build.trips is not None:
        lax.fori_loop(0, build.trips, partial(step.turn, item, build.trips, False), None)
    else:
        if build.spec.window is not None:
            lax.fori_loop(low, clear, partial(step.turn, item, high, True), None)
        lax.fori_loop(clear, edge, partial(step.turn, item, high, False), None)
        lax.fori_loop(edge, high, partial(step.turn, item, high, True), None)
    total = jnp.sum(scratch.total[...], axis=2, keepdims=True)
    some = total > 0
    out[...] = (scratch.out[...] / jnp.where(some, total, 1.0)).astype(out.dtype)
    if lse is not None:
        top = scratch.top[:, :, :1]
        logarithm = jnp.log(jnp.where(some, total, 1.0)) + top / LOG2_E
        lse[...] = jnp.where(some, logarithm, -jnp.inf)


class _Step:
    """One grid step: its operands, and what is done with a block."""

    def __init__(
        self,
        build: Build,
        numbers: Any,
        table: Any,
        given: dict[str, Any],
        pages: Any,
        scratch: Any,
    ):
        self.build = build
        self.spec = build.spec
        self.numbers = numbers
        self.table = table
        self.given = given
        self.pages = pages
        self.scratch = scratch

    def number(self, item: Any, place: int) -> Any:
        """Returns one of an item's scalars."""
        return self.numbers[item * Item.SIZE + place]

    def block_of(self, item: Any, turn: Any) -> Any:
        """Returns where a block lies among the sequence's."""
        if self.spec.window is None:
            return turn
        sinks = self.build.sink_blocks
        return jnp.where(turn < sinks, turn, self.number(item, Item.FIRST) + turn - sinks)

    def needed(self, item: Any, block: Any) -> Any:
        """Returns how many pages of a block hold anything that the item sees."""
        build = self.build
        last = lax.div(self.number(item, Item.LAST), build.page_size)
        return jnp.minimum(last + 1 - block * build.pages_per_block, build.pages_per_block)

    def copy(self, page: Any, slot: Any, place: Any) -> Any:
        """Returns the copy of one page."""
        into = self.scratch.blocks.at[slot, place]
        return pltpu.make_async_copy(self.page(page), into, self.scratch.copied.at[slot])

    def page(self, page: Any) -> Any:
        """Returns a page's part with the heads of this call."""
        if not self.build.page_heads:
            return self.pages.at[page]
        return self.pages.at[page, pl.ds(self.build.first_head, self.spec.num_kv_heads)]

    def copy_scales(self, item: Any, block: Any, slot: Any) -> Any:
        """Returns the copy of the scales of a block."""
        place = block
        if self.spec.window is not None:
            sinks = self.build.sink_blocks
            later = block - self.number(item, Item.BASE) + sinks
            place = jnp.where(block < sinks, block, later)
        source = self.given["scales"].at[self.number(item, Item.ROW), place]
        return pltpu.make_async_copy(
            source, self.scratch.scales.at[slot], self.scratch.scaled.at[slot]
        )

    def start(self, item: Any, turn: Any, slot: Any) -> None:
        """Begins to copy the pages of a block."""
        build = self.build
        block = self.block_of(item, turn)
        start = self.number(item, Item.ROW) * build.width
        page = block * build.pages_per_block
        turning = build.width - build.pinned_pages
        wraps = self.spec.window is not None
        if wraps:
            later = build.pinned_pages + lax.rem(jnp.maximum(page - build.pinned_pages, 0), turning)
            page = jnp.where(page < build.pinned_pages, page, later)

        def one(place: Any, column: Any) -> Any:
            self.copy(self.table[start + column], slot, place).start()
            column = column + 1
            return jnp.where(column == build.width, build.pinned_pages, column) if wraps else column

        if not build.copies:
            return
        needed = self.needed(item, block)
        if build.scaled:
            self.copy_scales(item, block, slot).start()

        self.every_page(needed, one, page)

    def wait(self, item: Any, turn: Any, slot: Any) -> None:
        """Waits until the pages of a block are there."""
        build = self.build
        if not build.copies:
            return
        block = self.block_of(item, turn)
        needed = self.needed(item, block)
        if build.scaled:
            self.copy_scales(item, block, slot).wait()

        def one(place: Any, none: int) -> int:
            self.copy(0, slot, place).wait()
            return none

        self.every_page(needed, one, 0)

    def every_page(self, needed: Any, one: Callable[[Any, Any], Any], start: Any) -> None:
        """Does one thing for each page of a block, without a loop where the block is whole."""
        pages = self.build.pages_per_block
        if self.build.small:
            lax.fori_loop(0, needed, one, start)
            return

        @pl.when(needed == pages)
        def _():
            state = start
            for place in range(pages):
                state = one(place, state)

        @pl.when(needed < pages)
        def _():
            lax.fori_loop(0, needed, one, start)

    def turn(self, item: Any, end: Any, masked: bool, turn: Any, none: None) -> None:
        """Adds one block to an item's sums, while the next block is being copied."""
        slot = self.scratch.slot[0]
        ends = turn + 1 == end
        after = jnp.where(ends, self.number(item, Item.NEXT), item)
        then = jnp.where(ends, self.number(jnp.maximum(after, 0), Item.LOW), turn + 1)

        @pl.when(after >= 0)
        def _():
            self.start(after, then, 1 - slot)

        self.wait(item, turn, slot)
        block = self.block_of(item, turn)
        if self.build.written and masked:
            self.store(item, block, slot)
        self.add(item, block, slot, masked)
        self.scratch.slot[0] = 1 - slot

    def store(self, item: Any, block: Any, slot: Any) -> None:
        """Puts the item's own key and value into the block, and its page back where it lies."""
        build = self.build
        position = self.number(item, Item.Q_POS)
        offset = position - block * build.block

        @pl.when((position >= 0) & (offset >= 0) & (offset < build.block))
        def _():
            place = lax.div(offset, build.page_size)
            within = lax.rem(offset, build.page_size)
            count = build.stored_rows(self.pages.dtype.itemsize)
            start = pl.multiple_of(lax.div(within, count) * count, count)
            rows = slice(None), pl.ds(start, count)
            held = self.scratch.blocks.at[slot, place].at[rows]
            here = start + lax.broadcasted_iota(jnp.int32, held.shape, 1) == within
            held[...] = chosen(here, self.given["fresh"][...], held[...])
            page = lax.div(position, build.page_size)
            turning = build.width - build.pinned_pages
            later = build.pinned_pages + lax.rem(jnp.maximum(page - build.pinned_pages, 0), turning)
            column = jnp.where(page < build.pinned_pages, page, later)
            page = self.table[self.number(item, Item.ROW) * build.width + column]
            back = pltpu.make_async_copy(held, self.page(page).at[rows], self.scratch.stored)
            back.start()
            back.wait()

    def add(self, item: Any, block: Any, slot: Any, masked: bool) -> None:
        """Adds the keys and values of a block to the sums of every head."""
        build = self.build
        start = block * build.block
        k_pos = start + lax.broadcasted_iota(jnp.int32, (1, build.block), 1)
        seen = self.seen(item, k_pos) if masked else None
        together = build.together
        if together == self.spec.num_kv_heads:
            self.add_heads(slot, k_pos, seen, tuple(range(together)))
            return

        def some(turn: Any, none: None) -> None:
            first = turn * together
            self.add_heads(slot, k_pos, seen, tuple(first + head for head in range(together)))

        lax.fori_loop(0, self.spec.num_kv_heads // together, some, None)

    def seen(self, item: Any, k_pos: Any) -> Any:
        """Returns bool[rows or 1, block]: the keys that each row of queries sees."""
        build = self.build
        alone = build.queries == 1
        q_pos = self.number(item, Item.Q_POS) if alone else self.given["q_pos"][...]
        seen = k_pos <= q_pos
        if self.spec.window is not None:
            near = q_pos - k_pos < self.spec.window
            if build.sink_tokens:
                near = near | (k_pos < build.sink_tokens)
            seen = seen & near
        if build.newest:
            oldest = self.number(item, Item.KV_LEN) - build.newest
            mask = self.given["mask"][...]
            number = lax.broadcasted_iota(jnp.int32, (mask.shape[1], build.block), 0)
            places = (k_pos - oldest == number).astype(jnp.float32)
            allowed = lax.dot_general(
                mask, places, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
            )
            allowed = (allowed > 0.5) & (k_pos <= self.number(item, Item.LAST)) & (q_pos >= 0)
            seen = jnp.where(k_pos >= oldest, allowed.astype(jnp.int32), seen.astype(jnp.int32)) > 0
        if alone:
            return seen
        seen = jnp.concatenate([seen.astype(jnp.int32)] * build.group, axis=0)
        return seen > 0

    def add_heads(self, slot: Any, k_pos: Any, seen: Any, heads: tuple[Any, ...]) -> None:
        """Adds a block to the sums of the queries of key heads that follow each other."""
        build, scratch = self.build, self.scratch
        at = pl.ds(heads[0], len(heads))
        rows = len(heads) * build.rows
        top, total, out = (
            x[at].reshape(rows, x.shape[2]) for x in (scratch.top, scratch.total, scratch.out)
        )
        if seen is not None and seen.shape[0] > 1:
            seen = jnp.concatenate([seen.astype(jnp.int32)] * len(heads), axis=0) > 0
        held = [self.held(slot, head) for head in heads]
        scores = self.scores(held, heads, slot, k_pos, seen)
        before, top = top, jnp.maximum(top, jnp.max(scores, axis=1, keepdims=True))
        weights = jnp.exp2(scores - top[:, :1])
        fade = jnp.exp2(before - top)
        total = fade * total
        for start in range(0, build.block, LANES):
            total = total + weights[:, start : start + LANES]
        faded = jnp.concatenate([fade] * (out.shape[1] // LANES), axis=1)
        out = out * faded + self.summed(held, heads, slot, weights)
        shape = len(heads), build.rows
        scratch.top[at] = top.reshape(*shape, -1)
        scratch.total[at] = total.reshape(*shape, -1)
        scratch.out[at] = out.reshape(*shape, -1)

    def held(self, slot: Any, head: Any) -> Any:
        """Returns [block, lanes], keys and values of one head in the queries' type."""
        held = self.scratch.blocks[slot, :, head].reshape(self.build.block, -1)
        dtype = self.given["q"].dtype
        return held if held.dtype == dtype else held.astype(jnp.float32).astype(dtype)

    def scores(
        self, held: list[Any], heads: tuple[Any, ...], slot: Any, k_pos: Any, seen: Any
    ) -> Any:
        """Returns float32[heads * rows, block] in base two, what is not seen far below."""
        build, spec = self.build, self.spec
        lanes = key_lanes(spec.head_dim)

        def of(name: str) -> Any:
            parts = []
            for head, some in zip(heads, held, strict=True):
                part = _dot(self.given[name][head], some[:, :lanes], 1)
                if build.scaled:
                    part = part * self.scratch.scales[slot, pl.ds(head, 1)]
                parts.append(part)
            return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=0)

        scores = of("q")
        if build.sink_queries and seen is not None:
            scores = jnp.where(k_pos < build.sink_tokens, of("q_sink"), scores)
        if spec.soft_cap is not None:
            capped = jnp.tanh(scores * (spec.score_scale / spec.soft_cap))
            scores = capped * (spec.soft_cap * LOG2_E)
        else:
            scores = scores * (spec.score_scale * LOG2_E)
        if spec.alibi is not None:
            at = pl.ds(heads[0], len(heads))
            slopes = self.given["slopes"][at].reshape(-1, 1)
            scores = scores + self.bias(slopes, k_pos)
        return scores if seen is None else jnp.where(seen, scores, _HIDDEN)

    def summed(self, held: list[Any], heads: tuple[Any, ...], slot: Any, weights: Any) -> Any:
        """Returns float32[heads * rows, lanes], a block's values by their weights."""
        build, spec = self.build, self.spec
        lane = 0 if shared_lanes(spec.head_dim) else value_lane(spec.head_dim)
        parts = []
        for place, (head, some) in enumerate(zip(heads, held, strict=True)):
            part = weights[place * build.rows : (place + 1) * build.rows]
            if build.scaled:
                part = part * self.scratch.scales[slot, pl.ds(spec.num_kv_heads + head, 1)]
            parts.append(_dot(part.astype(some.dtype), some[:, lane:], 0))
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=0)

    def bias(self, slopes: Any, k_pos: Any) -> Any:
        """Returns float32[rows, block], the position bias in base two."""
        alibi = self.spec.alibi
        assert alibi is not None
        positions = k_pos.astype(jnp.float32)
        if alibi.bfloat16:
            positions = positions.astype(jnp.bfloat16).astype(jnp.float32)
            bias = (slopes * positions).astype(jnp.bfloat16).astype(jnp.float32)
        else:
            bias = slopes * positions
        return bias * (alibi.scale * LOG2_E)


def chosen(here: Any, new: Any, old: Any) -> Any:
    """Returns new where `here` and old elsewhere; bytes are chosen as float32, which holds them."""
    if old.dtype.itemsize > 1:
        return jnp.where(here, new, old)
    return jnp.where(here, new.astype(jnp.float32), old.astype(jnp.float32)).astype(old.dtype)


def _dot(x: Any, y: Any, contracted: int) -> Any:
    """Returns x times y in float32, contracted over x's lanes and the dimension given of y."""
    exact = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return lax.dot_general(
        x,
        y,
        (((1,), (contracted,)), ((), ())),
        precision=exact,
        preferred_element_type=jnp.float32,
    )
