"""Work lists of the TPU kernel: runs of queries of one sequence, and the blocks each one reads.

An item is a run of at most `queries` tokens of one sequence, and one share of the blocks of keys
that these tokens see. Its numbers are scalars, which the kernel finds in scalar memory.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

NONE = -1
FAR = 1 << 30


class Runs(NamedTuple):
    """Runs of queries.

    Attributes:
        row: int32[I], sequence.
        token: int32[I, Q], packed tokens; any where there is none.
        q_pos: int32[I, Q], -1 where there is none.
        low, high: int32[I], least and greatest position of a run's queries; high is -1 and low is
            far away where a run has none.
    """

    row: Array
    token: Array
    q_pos: Array
    low: Array
    high: Array


class Reach(NamedTuple):
    """Which keys items may see; static.

    Attributes:
        block: keys of a block.
        window: see `AttentionSpec`.
        sink_tokens: keys before this stay visible besides a window.
        newest: size of a mask over the newest keys, 0 without one.
        splits: shares into which an item's blocks are divided.
        written: a block that holds an item's own key counts as one that needs a mask.
    """

    block: int
    window: int | None
    sink_tokens: int
    newest: int
    splits: int
    written: bool = False

    @property
    def sink_blocks(self) -> int:
        """Returns the blocks that hold sink keys."""
        return -(-self.sink_tokens // self.block) if self.window is not None else 0


class Item:
    """Places of an item's numbers in scalar memory.

    A turn is the place of a block in the order of reading: sinks first, then from `first` on.
    Turns from `low` to `high` are this item's; those from `clear` to `edge` need no mask. `base`
    is the block whose scales come first after those of the sinks.
    """

    ROW, FIRST, LOW, CLEAR, EDGE, HIGH, LAST, KV_LEN, Q_POS, NEXT, BASE = range(11)
    SIZE = 11


def single_runs(q_start: Array, q_pos: Array) -> Runs:
    """Returns one run a row, of the rows that have exactly one token."""
    single = q_start[1:] - q_start[:-1] == 1
    token = jnp.minimum(q_start[:-1], q_pos.shape[0] - 1)
    position = jnp.where(single, q_pos[token], NONE)
    low = jnp.where(single, position, FAR)
    row = jnp.arange(q_start.shape[0] - 1, dtype=jnp.int32)
    return Runs(row, token[:, None], position[:, None], low, position)


def long_runs(q_start: Array, q_pos: Array, queries: int, count: int, least: int) -> Runs:
    """Returns `count` runs of up to `queries` tokens, of the rows that have `least` or more."""
    tokens = q_start[1:] - q_start[:-1]
    ends = run_ends(q_start, queries, least)
    number = jnp.arange(count, dtype=jnp.int32)
    row = jnp.searchsorted(ends, number, side="right", method="compare_all").astype(jnp.int32)
    row = jnp.minimum(row, tokens.shape[0] - 1)
    within = number - jnp.where(row > 0, ends[row - 1], 0)
    offset = within[:, None] * queries + jnp.arange(queries, dtype=jnp.int32)[None, :]
    real = (offset < tokens[row][:, None]) & (number < ends[-1])[:, None]
    token = jnp.clip(q_start[row][:, None] + offset, 0, q_pos.shape[0] - 1)
    position = jnp.where(real, q_pos[token], NONE)
    low = jnp.min(jnp.where(real, position, FAR), axis=1)
    return Runs(row, token, position, low, jnp.max(position, axis=1))


def run_ends(q_start: Array, queries: int, least: int) -> Array:
    """Returns int32[B], the number of the run after a row's last one."""
    tokens = q_start[1:] - q_start[:-1]
    runs = jnp.where(tokens >= least, lax.div(tokens + queries - 1, queries), 0)
    return jnp.cumsum(runs, dtype=jnp.int32)


def items(runs: Runs, kv_len: Array, base: Array, reach: Reach) -> Array:
    """Returns int32[splits * I, Item.SIZE]; the shares of a run lie I items apart.

    Args:
        base: int32[B], see `Item`.
    """
    block = reach.block
    length = kv_len[runs.row]
    last = jnp.where(runs.high >= 0, runs.high, NONE)
    if reach.newest:
        # A mask may show keys that come after a query.
        last = jnp.where(runs.low < FAR, length - 1, NONE)
    total = lax.div(last + block, block)
    first = jnp.zeros_like(total)
    own = 0 if reach.written else 1
    # Before `clear` a block may hold keys that have left a window, after `edge` keys to come.
    edge = lax.div(jnp.maximum(jnp.where(runs.low < FAR, runs.low, 0) + own, 0), block)
    if reach.newest:
        edge = jnp.minimum(edge, lax.div(jnp.maximum(length - reach.newest, 0), block))
    clear = first
    if reach.window is not None:
        seen = jnp.where(runs.q_pos >= 0, runs.q_pos, FAR)
        oldest = jnp.maximum(jnp.min(seen, axis=1) - reach.window + 1, 0)
        if reach.newest:
            oldest = jnp.minimum(oldest, jnp.maximum(length - reach.newest, 0))
        first = jnp.minimum(lax.div(oldest, block), total)
        # The newest query of a run has lost the most keys.
        gone = jnp.maximum(runs.high - reach.window + 1, 0)
        clear = lax.div(gone + block - 1, block)
        sinks = jnp.minimum(reach.sink_blocks, total)
        first = jnp.maximum(first, sinks)
        total = sinks + total - first
        clear = jnp.maximum(clear - first, 0) + sinks
        edge = jnp.maximum(edge - first, 0) + sinks
    share = lax.div(total + reach.splits - 1, reach.splits)
    parts = []
    for split in range(reach.splits):
        low = jnp.minimum(split * share, total)
        high = jnp.minimum(low + share, total)
        opens = jnp.clip(clear, low, high)
        closes = jnp.clip(edge, opens, high)
        nothing = jnp.full_like(total, NONE)
        numbers = [runs.row, first, low, opens, closes, high, last, length, runs.high]
        numbers += [nothing, base[runs.row]]
        parts.append(jnp.stack(numbers, axis=1))
    return jnp.concatenate(parts)


def linked(table: Array, cores: int) -> Array:
    """Returns the items with the next one that reads anything, on the same core."""
    count = table.shape[0] // cores
    reads = (table[:, Item.HIGH] > table[:, Item.LOW]).reshape(cores, count)
    number = jnp.arange(cores * count, dtype=jnp.int32).reshape(cores, count)
    here = jnp.where(reads, number, FAR)
    coming = lax.cummin(here, axis=1, reverse=True)
    after = jnp.concatenate([coming[:, 1:], jnp.full((cores, 1), FAR, jnp.int32)], axis=1)
    after = jnp.where(after == FAR, NONE, after).reshape(-1)
    return table.at[:, Item.NEXT].set(after)


def first_items(table: Array, cores: int) -> Array:
    """Returns int32[cores], the first item of each core that reads anything."""
    count = table.shape[0] // cores
    reads = (table[:, Item.HIGH] > table[:, Item.LOW]).reshape(cores, count)
    number = jnp.arange(cores * count, dtype=jnp.int32).reshape(cores, count)
    found = jnp.min(jnp.where(reads, number, FAR), axis=1)
    return jnp.where(found == FAR, NONE, found)
