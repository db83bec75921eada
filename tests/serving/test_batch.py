"""Shapes of steps, and plans through the one array that carries them."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.serving.batch import Ladder, StepShape, pack, positions_of, unpack
from jaxserve.serving.plan import RowKind, StepPlan


def plan(rows: list[tuple[int, int, int, RowKind]], tokens: list[int]) -> StepPlan:
    """Returns a plan of rows (slot, tokens, start, kind)."""
    slots, counts, starts, kinds = (list(column) for column in zip(*rows, strict=True))
    return StepPlan(
        number=0,
        slots=slots,
        counts=counts,
        starts=starts,
        kinds=kinds,
        tokens=tokens,
        admissions=[],
        writes=[[], []],
        copies=[[], []],
    )


ROWS = [
    (4, 1, 9, RowKind.DECODE),
    (0, 1, 3, RowKind.DECODE),
    (2, 3, 16, RowKind.CHUNK),
    (1, 2, 0, RowKind.LAST),
]
TABLES = [np.arange(18, dtype=np.int32).reshape(6, 3), np.arange(100, 112).reshape(6, 2)]
WIDTHS = (3, 2)


@pytest.mark.parametrize("slots", [1, 2, 3, 8, 31, 32, 100])
@pytest.mark.parametrize("tokens", [101, 128, 512])
def test_every_plan_fits_a_shape_and_none_is_larger_than_needed(slots: int, tokens: int) -> None:
    ladder = Ladder.of(tokens, slots)
    shapes = set(ladder.shapes())
    for rows in range(1, slots + 1):
        for count in {rows, rows + 1, min(2 * rows + 5, tokens), tokens}:
            shape = ladder.fit(count, rows)
            assert shape in shapes
            assert shape.num_rows >= rows
            assert shape.num_tokens >= count
            assert shape.decode_only == (count == rows)
            if count == rows > 2:
                assert shape.num_rows < 2 * rows
            elif count > max(16, 4 * rows):
                assert shape.num_tokens < 2 * count
    assert len(shapes) < 40


def test_no_shape_has_a_single_row() -> None:
    assert min(shape.num_rows for shape in Ladder.of(64, 1).shapes()) == 2


def test_a_plan_comes_out_as_it_went_in() -> None:
    shape = StepShape(num_rows=6, num_tokens=16)
    packed = pack(plan(ROWS, [7, 8, 9, 5, 6]), shape, TABLES, needs=13, next_tokens=[0, 0, 10, 0])
    assert packed.shape == (shape.size(WIDTHS),)
    batch = unpack(jnp.asarray(packed), shape, WIDTHS)
    assert int(batch.needs) == 13
    assert batch.q_start.tolist() == [0, 1, 2, 5, 7, 7, 7]
    assert batch.tokens[2:7].tolist() == [7, 8, 9, 5, 6]
    assert batch.row_of_token[:7].tolist() == [0, 1, 2, 2, 2, 3, 3]
    assert batch.slots.tolist() == [4, 0, 2, 1, 5, 5]  # the last slot is the spare
    assert batch.kinds.tolist() == [0, 0, 1, 2, 1, 1]
    assert batch.next_tokens.tolist() == [0, 0, 10, 0, 0, 0]
    for table, source in zip(batch.tables, TABLES, strict=True):
        np.testing.assert_array_equal(table, source[[4, 0, 2, 1, 5, 5]])


def test_the_device_knows_where_decoding_rows_go_on() -> None:
    # The plan's starts are bounds only: slot 4 holds 8 tokens, slot 0 holds 3.
    shape = StepShape(num_rows=6, num_tokens=16)
    batch = unpack(jnp.asarray(pack(plan(ROWS, [0] * 5), shape, TABLES, 0)), shape, WIDTHS)
    cached = jnp.array([3, 70, 71, 72, 8, 73], jnp.int32)
    positions, lengths = positions_of(batch, cached)
    assert positions.tolist() == [8, 3, 16, 17, 18, 0, 1] + [-1] * 9
    assert lengths[:4].tolist() == [9, 4, 19, 2]
