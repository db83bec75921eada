"""The TPU kernel as a TPU's memories, copies and cores have it, and the faults that this shows.

Buffers begin as no numbers, a copy lands when it is waited for (or at once, with races looked
for), and cores take their shares of the grid in random order.
"""

from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxserve.config import AttentionSpec
from jaxserve.pallas_kernels.paged_attention import mosaic, tpu
from jaxserve.pallas_kernels.paged_attention.items import Item
from jaxserve.pallas_kernels.paged_attention.tiles import Tile

from .random_pages import Both, Case, both

CASE = Case(AttentionSpec(4, 2, 64), [(100, 1), (0, 20), (290, 1), (4, 0)], tokens=24)
WINDOW = Case(
    AttentionSpec(2, 1, 128, window=37), [(290, 1), (129, 9)], sinks=4, pages_dtype="int8",
    options=["scales"], tokens=10,
)  # fmt: skip
LATE = pltpu.InterpretParams()
RACES = pltpu.InterpretParams(detect_races=True, dma_execution_mode="eager")
CORES = pltpu.InterpretParams(num_cores_or_threads=2, random_seed=3)
HALVES = Tile(128, 128, 16, cores=2)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Compiles anew before and after, as the code may have been changed."""
    cast(Any, tpu._attention).clear_cache()
    yield
    cast(Any, tpu._attention).clear_cache()
    pltpu.reset_tpu_interpret_mode_state()


@pytest.mark.parametrize(
    ("case", "params"), [(CASE, RACES), (WINDOW, LATE)], ids=["races", "window, late"]
)
def test_blocks_are_read_when_they_are_there(case: Case, params: Any) -> None:
    both(case, interpret=params).check(4e-6)


def test_cores_share_nothing_but_what_they_read() -> None:
    both(CASE, HALVES, CORES).check(4e-6)


def fails(found: Both) -> bool:
    return not np.allclose(found.found[0], found.wanted[0], atol=1e-3)


def test_a_missing_wait_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mosaic._Step, "wait", lambda *args: None)
    assert fails(both(CASE, interpret=LATE))


def test_a_page_past_the_pool_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    copy = mosaic._Step.copy

    def past(self: Any, page: Any, slot: Any, place: Any) -> Any:
        return copy(self, page + 1000, slot, place)

    monkeypatch.setattr(mosaic._Step, "copy", past)
    with pytest.raises(Exception, match=r"[Oo]ut.of.bounds"):
        both(CASE, interpret=LATE)


def test_a_wrong_page_is_found_in_plain_interpretation(monkeypatch: pytest.MonkeyPatch) -> None:
    number = mosaic._Step.number

    def shifted(self: Any, item: Any, place: int) -> Any:
        return number(self, item, place) * (0 if place == Item.ROW else 1)

    monkeypatch.setattr(mosaic._Step, "number", shifted)
    assert fails(both(CASE))


def test_a_mask_off_by_one_is_found_in_plain_interpretation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = mosaic._Step.seen
    monkeypatch.setattr(mosaic._Step, "seen", lambda self, item, k_pos: seen(self, item, k_pos - 1))
    assert fails(both(CASE))
