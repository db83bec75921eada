"""The TPU kernel, interpreted, against the definition: options in pairs, ragged shapes, writes."""

from dataclasses import replace
from itertools import product
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxserve.config import AlibiSpec, AttentionSpec
from jaxserve.errors import UnsupportedError
from jaxserve.pallas_kernels.paged_attention import mosaic, reference, tpu
from jaxserve.pallas_kernels.paged_attention.places import Extra, row_of_tokens

from .random_pages import SMALL, Case, arrays, both, filled

pytestmark = pytest.mark.usefixtures("compile_fast")

MIXED = [(0, 9), (140, 1), (7, 0), (130, 5), (0, 1), (3, 40)]
"""Whole prompts, decode rows, a row without tokens, chunks across blocks of keys and queries."""

# Each option meets each other one in some case: heads, page size, mask, bias, dtype, outputs.
CASES = {
    "gqa 64": Case(AttentionSpec(6, 2, 64), MIXED, options=["sink_logits"]),
    "mha 80, window, mask": Case(
        AttentionSpec(3, 3, 80, window=37), MIXED, page_size=32, width=10, options=["mask"]
    ),
    "mqa 96, alibi": Case(AttentionSpec(5, 1, 96, alibi=AlibiSpec(scale=0.5)), MIXED, 48, 7),
    "gqa 128, soft cap, int8": Case(
        AttentionSpec(4, 2, 128, soft_cap=0.7), MIXED, 64, 5, pages_dtype="int8",
        options=["scales", "mask"],
    ),
    "mqa 256, sinks, fp8": Case(
        AttentionSpec(2, 1, 256, window=37, soft_cap=0.7), MIXED, 256, 2,
        pages_dtype="float8_e4m3fn", sinks=4, options=["q_sink", "scales"],
    ),
    "turning pages, pinned, int8": Case(
        AttentionSpec(4, 2, 64, window=37), [(300, 5), (70, 1), (0, 6), (399, 1)], width=7,
        sinks=20, pinned=2, pages_dtype="int8", options=["scales", "sink_logits"],
    ),
    "alibi as bfloat16, decode": Case(
        AttentionSpec(6, 2, 64, alibi=AlibiSpec(bfloat16=True)), [(100, 1), (299, 1), (0, 1)],
        tokens=3, max_query=1,
    ),
    "drafts": Case(
        AttentionSpec(6, 2, 64), [(100, 3), (299, 1), (0, 8)], max_query=8, options=["mask"]
    ),
}  # fmt: skip
FEW_DIGITS = {"alibi as bfloat16, decode": 1e-5}


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_is_the_definition(name: str) -> None:
    both(CASES[name]).check(FEW_DIGITS.get(name, 4e-6))


HEADS = [(4, 4), (6, 2), (5, 1)]
WINDOWS = [{}, {"window": 37}, {"window": 37, "sinks": 4}]
CAPS = [{}, {"soft_cap": 0.7}]
BIASES = [{}, {"alibi": AlibiSpec()}]
DTYPES = ["float32", "int8", "float8_e4m3fn"]
SIZES = list(product([64, 80, 96, 128, 256], [16, 32, 64, 128, 256]))
"""Head sizes and page sizes."""
OPTIONS = list(product(HEADS, WINDOWS, CAPS, BIASES, DTYPES))
# Sizes take turns: each meets each option.
PRODUCT = [(*some, *SIZES[7 * number % len(SIZES)]) for number, some in enumerate(OPTIONS)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("heads", "window", "cap", "bias", "pages_dtype", "head", "page_size"), PRODUCT
)
def test_every_option_meets_every_other(
    heads: tuple[int, int], window: dict[str, Any], cap: dict[str, Any], bias: dict[str, Any],
    pages_dtype: str, head: int, page_size: int,
) -> None:  # fmt: skip
    rest = {"window": window.get("window"), **cap, **bias}
    case = Case(
        AttentionSpec(*heads, head, **rest), MIXED, page_size, -(-320 // page_size),
        pages_dtype=pages_dtype, sinks=window.get("sinks", 0),
        options=[] if pages_dtype == "float32" else ["scales"],
    )  # fmt: skip
    # A bias of a hundred leaves fewer digits behind the point.
    both(case).check(2e-5 if bias else 4e-6)


def test_the_product_has_every_pair_of_sizes_and_options() -> None:
    for place, values in enumerate((HEADS, WINDOWS, CAPS, BIASES, DTYPES)):
        for size in (5, 6):
            found = {(str(case[place]), case[size]) for case in PRODUCT}
            assert len(found) == 5 * len(values)
    assert {case[5:] for case in PRODUCT} == set(SIZES)


def test_bfloat16_stays_near_the_definition() -> None:
    both(replace(CASES["gqa 64"], dtype="bfloat16", options=())).check(0.02)


def test_halves_of_the_keys_are_merged_exactly() -> None:
    case = replace(CASES["gqa 64"], options=())
    both(case, replace(SMALL, cores=2)).check()


@pytest.mark.parametrize("name", ["gqa 128, soft cap, int8", "alibi as bfloat16, decode"])
def test_heads_that_take_several_calls_are_the_definition(name: str) -> None:
    both(CASES[name], replace(SMALL, key_heads=1)).check(FEW_DIGITS.get(name, 4e-6))


def test_rows_whose_pages_do_not_fit_into_scalar_memory_take_several_calls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Room for two rows of 20 pages; six rows take three calls.
    monkeypatch.setattr(tpu, "SMEM_TABLE", 50)
    both(Case(AttentionSpec(2, 1, 64), MIXED, tokens=61)).check()


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_written_pages_are_those_of_the_definition(dtype: str) -> None:
    case = Case(AttentionSpec(6, 2, 64), MIXED, page_size=32, width=10, pages_dtype=dtype)
    rng = np.random.default_rng(0)
    plain, rows = filled(case, rng)
    q, table, q_start, _, q_pos = arrays(case, rng)
    k, v = (jnp.asarray(rng.normal(size=(q.shape[0], 2, 64)) * 9, "float32") for _ in "kv")
    at = table, row_of_tokens(q_start, q.shape[0]), q_pos
    wanted = reference.write_pages(plain, k, v, *at, page_size=32)
    found = tpu.write_pages(rows, k, v, *at, page_size=32)
    keys = found.rows[..., :64].swapaxes(1, 2)
    np.testing.assert_array_equal(keys, wanted.keys)
    np.testing.assert_array_equal(found.rows[..., 64:].swapaxes(1, 2), wanted.values)
    assert not np.array_equal(wanted.keys, plain.keys)
    if found.scales is not None:
        np.testing.assert_array_equal(found.scales, _flat(wanted))


def _flat(pages: reference.Pages) -> np.ndarray:
    """Returns the scales of the definition's pages as the kernel keeps them."""
    assert pages.scales is not None
    both = np.stack([np.asarray(x) for x in pages.scales])
    return both.transpose(1, 0, 3, 2).reshape(both.shape[1], -1)


@pytest.mark.parametrize(
    ("dtype", "key_heads"), [("float32", 0), ("float32", 1), ("int8", 1), ("float8_e4m3fn", 0)]
)
def test_storing_while_attending_is_storing_first(dtype: str, key_heads: int) -> None:
    # The last row's own key is the last of its block.
    runs = [(0, 9), (140, 1), (7, 0), (127, 1)]
    case = Case(AttentionSpec(6, 2, 64), runs, pages_dtype=dtype)
    rng = np.random.default_rng(0)
    plain, rows = filled(case, rng)
    q, table, q_start, kv_len, q_pos = arrays(case, rng)
    k, v = (jnp.asarray(rng.normal(size=(q.shape[0], 2, 64)), "float32") for _ in "kv")
    row = row_of_tokens(q_start, q.shape[0])
    after = reference.write_pages(plain, k, v, table, row, q_pos, page_size=16)
    rest = q_start, kv_len, q_pos, case.spec
    wanted = reference.paged_attention(q, after, table, *rest, page_size=16)
    tile = replace(SMALL, key_heads=key_heads)
    out, found = tpu.write_and_attend(q, k, v, rows, table, row, *rest, page_size=16, tile=tile)
    np.testing.assert_allclose(out, wanted, atol=2e-6)
    np.testing.assert_array_equal(found.rows[..., :64].swapaxes(1, 2), after.keys)
    np.testing.assert_array_equal(found.rows[..., 64:].swapaxes(1, 2), after.values)
    if found.scales is not None:
        np.testing.assert_array_equal(found.scales, _flat(after))


@settings(
    max_examples=12, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
@given(
    lengths=st.lists(st.tuples(st.integers(0, 290), st.integers(0, 10)), min_size=4, max_size=4),
    seed=st.integers(0, 3),
)
def test_any_mixture_of_rows_is_what_the_definition_says(
    lengths: list[tuple[int, int]], seed: int
) -> None:
    # One shape for all, so one compilation.
    lengths = lengths if any(new for _, new in lengths) else [(5, 1), *lengths[1:]]
    both(Case(AttentionSpec(2, 1, 64), lengths, tokens=44), seed=seed).check()


def test_what_the_kernel_cannot_do_is_refused_by_name() -> None:
    case = CASES["gqa 64"]
    rng = np.random.default_rng(0)
    _, rows = filled(case, rng)
    q, table, q_start, kv_len, q_pos = arrays(case, rng)
    with pytest.raises(UnsupportedError, match="'tpu' has no outputs=key_mass"):
        tpu.paged_attention(
            q, rows, table, q_start, kv_len, q_pos, case.spec,
            page_size=16, outputs=(Extra.KEY_MASS,),
        )  # fmt: skip


def test_heads_of_64_take_no_more_memory_than_they_need() -> None:
    assert mosaic.row_lanes(64) == 2 * 64
    assert mosaic.row_lanes(128) == 2 * 128
