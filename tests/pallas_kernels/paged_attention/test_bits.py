"""A query's bits depend on its own sequence alone, whatever is computed beside it and how."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from jaxserve.config import AlibiSpec, AttentionSpec

from .pools import Pool, Run

SPECS = {
    "gqa": AttentionSpec(9, 3, 64),
    "mha": AttentionSpec(2, 2, 32),
    "mqa": AttentionSpec(4, 1, 128),
    "narrow": AttentionSpec(4, 2, 4),
    "window": AttentionSpec(4, 2, 32, window=150),
    "soft cap": AttentionSpec(4, 2, 32, soft_cap=3.0),
    "alibi": AttentionSpec(6, 2, 32, alibi=AlibiSpec()),
}
SINGLE = (("max_query", 1),)
CASES = [(name, dtype) for name in SPECS for dtype in ("bfloat16", "float32")]
FIRST = [("gqa", "bfloat16"), ("narrow", "float32"), ("window", "bfloat16"), ("mha", "float32")]
"""What is tested every time; the others take as long again each."""


def cases() -> list[Any]:
    return [
        pytest.param(case, id=" ".join(case), marks=[] if case in FIRST else pytest.mark.slow)
        for case in CASES
    ]


@pytest.fixture(scope="module", params=cases())
def pool(request: pytest.FixtureRequest) -> Pool:
    name, dtype = request.param
    return Pool(SPECS[name], dtype=dtype, width=20)


@pytest.fixture(scope="module")
def whole(pool: Pool) -> np.ndarray:
    """All 300 tokens of sequence 0 as one run."""
    return pool.call([Run(0, 0, 300)])


def test_a_page_may_be_smaller_than_a_block_or_larger(pool: Pool, whole: np.ndarray) -> None:
    for page_size, width in ((32, 10), (128, 3), (256, 4)):
        other = replace(pool, page_size=page_size, width=width)
        np.testing.assert_array_equal(other.call([Run(0, 0, 300)]), whole)


def test_a_prompt_may_come_in_pieces_beside_others(pool: Pool, whole: np.ndarray) -> None:
    runs = [Run(1, 5, 1), Run(0, 100, 177), Run(2, 0, 4), Run(3, 30, 1)]
    np.testing.assert_array_equal(pool.call(runs, padding=11)[1:178], whole[100:277])


@pytest.mark.parametrize("others", [0, 3, 15])
def test_a_token_may_come_alone_or_beside_others(
    pool: Pool, whole: np.ndarray, others: int
) -> None:
    # Longer and shorter sequences, so that blocks are taken by ever fewer of them.
    beside = [Run(1 + i, (7, 310, 140)[i % 3], 1) for i in range(others)]
    runs = [Run(0, 150, 1), *beside]
    np.testing.assert_array_equal(pool.call(runs)[0], whole[150])
    np.testing.assert_array_equal(pool.call(runs, static=SINGLE)[0], whole[150])


def test_drafts_taken_one_by_one_are_what_they_are_together(pool: Pool, whole: np.ndarray) -> None:
    runs = [Run(0, 254, 4), Run(1, 3, 4)]
    found = pool.call(runs, static=(("max_query", 4),))
    np.testing.assert_array_equal(found[:4], whole[254:258])


def test_many_tokens_at_once_have_the_bits_of_few(pool: Pool, whole: np.ndarray) -> None:
    # More sequences than are taken together, and not a whole number of such groups.
    starts = [150, *((7, 310, 140)[i % 3] for i in range(36))]
    runs = [Run(0 if i == 0 else 1 + i % 5, start, 1) for i, start in enumerate(starts)]
    found = pool.call(runs, static=SINGLE)
    np.testing.assert_array_equal(found[0], whole[150])
    alone = pool.call(runs[30:31])
    np.testing.assert_array_equal(found[30], alone[0])
