"""The shapes of a step and the one array that carries a plan to the device.

    ladder = Ladder.of(max_tokens=512, num_slots=32)
    shape = ladder.fit(num_tokens=40, num_rows=9)                  # StepShape(32, 64)
    packed = pack(plan, shape, tables, needs)                     # int32[shape.size(widths)]
    batch = unpack(packed, shape, widths)                         # inside the compiled step

A compiled step has static shapes, so plans are padded to the next step of a short ladder; every
shape of the ladder is compiled before serving starts. One array means one transfer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxserve.serving.scheduler import RowKind, StepPlan

MIN_ROWS = 2
"""One row leaves XLA's fast path on CPU, and its bits differ from those among other rows."""

MIN_MIXED_TOKENS = 16


@dataclass(frozen=True, order=True)
class StepShape:
    """Sizes of one compiled step, of each shard where there are several.

    Attributes:
        num_rows: sequences R.
        num_tokens: packed tokens T; T = R is a step in which each row has one token.
    """

    num_rows: int
    num_tokens: int

    @property
    def decode_only(self) -> bool:
        """Returns whether every row has exactly one token."""
        return self.num_tokens == self.num_rows

    def size(self, widths: Sequence[int]) -> int:
        """Returns the length of the packed array, for page tables of these widths."""
        return 2 + 2 * self.num_tokens + (5 + sum(widths)) * self.num_rows

    def __str__(self) -> str:
        if self.decode_only:
            return f"decode of {self.num_rows} rows"
        return f"{self.num_tokens} tokens of {self.num_rows} rows"


@dataclass(frozen=True)
class Ladder:
    """The shapes that are compiled: sizes of decode-only steps, and of steps with prefill."""

    decode_rows: tuple[int, ...]
    mixed_tokens: tuple[int, ...]
    mixed_rows: tuple[int, ...]

    @classmethod
    def of(cls, max_tokens: int, num_slots: int, multiple: int = 1) -> Self:
        """Returns the usual ladder: powers of two, for rows beside prefill powers of four.

        Args:
            max_tokens: largest number of tokens in a step.
            num_slots: largest number of rows.
            multiple: tokens come in multiples of this, which a layout asks for.
        """
        rows = _rounded(_powers(2, MIN_ROWS, num_slots), multiple)
        tokens = _rounded(_powers(2, MIN_MIXED_TOKENS, max_tokens), multiple)
        return cls(rows, tokens, _powers(4, MIN_ROWS, num_slots))

    def shapes(self) -> list[StepShape]:
        """Returns all shapes, smallest first."""
        decode = {StepShape(rows, rows) for rows in self.decode_rows}
        mixed = {
            StepShape(rows, tokens)
            for rows in self.mixed_rows
            for tokens in self.mixed_tokens
            if rows < tokens
        }
        return sorted(decode | mixed)

    def fit(self, num_tokens: int, num_rows: int) -> StepShape:
        """Returns the smallest shape that holds a plan."""
        if num_tokens == num_rows:
            rows = _first_at_least(self.decode_rows, num_rows)
            return StepShape(rows, rows)
        rows = _first_at_least(self.mixed_rows, num_rows)
        return StepShape(rows, _first_at_least(self.mixed_tokens, max(num_tokens, rows + 1)))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """A plan on the device, padded; of S shards, one after the other in every array.

    Attributes:
        needs: int32[], see `slot_state.Needs`.
        tokens: int32[T]; what stands at tokens that the device has itself does not matter.
        row_of_token: int32[T], row within the shard.
        q_start: int32[S * (R / S + 1)], first token of each row of a shard, within the shard, and
            the end; padding rows are empty.
        slots: int32[R]; padding rows have the spare slot.
        starts: int32[R], position of the first token; decode rows read it from their slot.
        kinds: int32[R], see `RowKind`; padding rows are chunks.
        next_tokens: int32[R], the prompt's token after a chunk, for prompt log-probabilities.
        tables: per cache group int32[R, W].
        num_shards: S.
    """

    needs: Array
    tokens: Array
    row_of_token: Array
    q_start: Array
    slots: Array
    starts: Array
    kinds: Array
    next_tokens: Array
    tables: tuple[Array, ...]
    num_shards: int = field(default=1, metadata={"static": True})

    @property
    def rows_of_tokens(self) -> Array:
        """Returns int32[T], rows counted over all shards."""
        shard = jnp.arange(self.num_shards, dtype=jnp.int32)[:, None]
        rows = self.row_of_token.reshape(self.num_shards, -1)
        return (rows + shard * (self.slots.shape[0] // self.num_shards)).reshape(-1)

    @property
    def ends(self) -> Array:
        """Returns int32[R], the token after each row's last one, counted over all shards."""
        return (self._starts[:, 1:] + self._offsets).reshape(-1)

    @property
    def counts(self) -> Array:
        """Returns int32[R], tokens of each row."""
        return (self._starts[:, 1:] - self._starts[:, :-1]).reshape(-1)

    @property
    def filled(self) -> Array:
        """Returns bool[T]: which tokens are not padding."""
        size = self.tokens.shape[0] // self.num_shards
        index = jnp.arange(size, dtype=jnp.int32)[None, :]
        return (index < self._starts[:, -1:]).reshape(-1)

    @property
    def _starts(self) -> Array:
        return self.q_start.reshape(self.num_shards, -1)

    @property
    def _offsets(self) -> Array:
        """Returns int32[S, 1], first token of each shard."""
        size = self.tokens.shape[0] // self.num_shards
        return jnp.arange(self.num_shards, dtype=jnp.int32)[:, None] * size


def by_shard(plan: StepPlan, num_shards: int, num_slots: int) -> list[list[int]]:
    """Returns the rows of each shard, in the plan's order.

    Args:
        num_slots: slots of a shard.
    """
    found: list[list[int]] = [[] for _ in range(num_shards)]
    for row, slot in enumerate(plan.slots):
        found[slot // num_slots].append(row)
    return found


def part_of(plan: StepPlan, rows: Sequence[int]) -> StepPlan:
    """Returns a plan of some of a plan's rows, in the same order; only what `pack` reads."""
    first = plan.kinds.count(RowKind.DECODE)
    given = np.cumsum([0, *plan.counts[first:]]).tolist()
    tokens = [
        token
        for row in rows
        if row >= first
        for token in plan.tokens[given[row - first] : given[row - first + 1]]
    ]
    slots, counts, starts, kinds = ([column[row] for row in rows] for column in _columns(plan))
    return StepPlan(plan.number, slots, counts, starts, kinds, tokens, [], [], [])


def _columns(plan: StepPlan) -> tuple[list[int], ...]:
    return plan.slots, plan.counts, plan.starts, plan.kinds


def pack(
    plan: StepPlan,
    shape: StepShape,
    tables: Sequence[np.ndarray],
    needs: int,
    next_tokens: Sequence[int] = (),
) -> np.ndarray:
    """Returns the plan of one shard as one int32 array.

    Args:
        next_tokens: see `Batch`; may be left out where no row wants prompt log-probabilities.
        tables: per cache group int32[S + 1, W], pages of every slot; the last row is the spare.
    """
    rows, size = len(plan.slots), shape.num_rows
    spare = tables[0].shape[0] - 1
    counts: Any = np.zeros(size, np.int32)
    counts[:rows] = plan.counts
    q_start: Any = np.zeros(size + 1, np.int32)
    np.cumsum(counts, out=q_start[1:])
    slots: Any = np.full(size, spare, np.int32)
    slots[:rows] = plan.slots
    given = int(q_start[rows])
    tokens: Any = np.zeros(shape.num_tokens, np.int32)
    if plan.tokens:
        tokens[given - len(plan.tokens) : given] = plan.tokens  # decode rows come first
    row_of_token: Any = np.zeros(shape.num_tokens, np.int32)
    row_of_token[:given] = np.repeat(np.arange(size, dtype=np.int32), counts)
    starts: Any = np.zeros(size, np.int32)
    starts[:rows] = plan.starts
    kinds: Any = np.full(size, RowKind.CHUNK, np.int32)
    kinds[:rows] = plan.kinds
    following: Any = np.zeros(size, np.int32)
    following[: len(next_tokens)] = next_tokens
    parts = [[needs], tokens, row_of_token, q_start, slots, starts, kinds, following]
    parts += [table[slots].ravel() for table in tables]
    return np.concatenate(parts, dtype=np.int32, casting="unsafe")


def unpack(packed: Array, shape: StepShape, widths: Sequence[int]) -> Batch:
    """Returns the plans that `pack` put into int32[N] each, of all shards end to end."""
    rows, tokens = shape.num_rows, shape.num_tokens
    sizes = [tokens, tokens, rows + 1, *[rows] * 4, *(rows * width for width in widths)]
    ends = np.cumsum([1, *sizes])
    shards = packed.reshape(-1, shape.size(widths))
    parts = [shards[:, start:end].reshape(-1) for start, end in pairwise(ends.tolist())]
    tables = [t.reshape(-1, width) for t, width in zip(parts[7:], widths, strict=True)]
    return Batch(packed[0], *parts[:7], tables=tuple(tables), num_shards=shards.shape[0])


def positions_of(batch: Batch, num_cached: Array) -> tuple[Array, Array]:
    """Returns (positions int32[T], -1 at padding; tokens of each row after the step int32[R]).

    Args:
        num_cached: int32[S + 1], where rows that decode go on.
    """
    decodes = batch.kinds == RowKind.DECODE
    first = jnp.where(decodes, num_cached[batch.slots], batch.starts)
    index = jnp.arange(batch.tokens.shape[0], dtype=jnp.int32)
    row, counts = batch.rows_of_tokens, batch.counts
    positions = first[row] + index - (batch.ends - counts)[row]
    return jnp.where(batch.filled, positions, -1), first + counts


def _powers(base: int, first: int, last: int) -> tuple[int, ...]:
    """Returns first, first * base, ... up to the first step that reaches `last`, cut to it."""
    steps = [first]
    while steps[-1] < last:
        steps.append(min(steps[-1] * base, last))
    return tuple(steps)


def _rounded(steps: Sequence[int], multiple: int) -> tuple[int, ...]:
    """Returns the steps at the next multiples, each once."""
    return tuple(dict.fromkeys(-(-step // multiple) * multiple for step in steps))


def _first_at_least(steps: Sequence[int], size: int) -> int:
    for step in steps:
        if step >= size:
            return step
    raise AssertionError(f"{size} is above the ladder {steps}")
