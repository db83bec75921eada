"""Attention over pages against the sums written out, and the fast kernel against the reference."""

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.config import AlibiSpec, AttentionSpec, cache_spec
from jaxserve.errors import UnsupportedError
from jaxserve.pallas_kernels import BACKENDS, kernel_set
from jaxserve.pallas_kernels.attention.scores import alibi_slopes
from jaxserve.pallas_kernels.paged_attention.places import Extra

from .pools import Pool, Run, read

SPECS = {
    "mha": AttentionSpec(3, 3, 5),
    "gqa": AttentionSpec(6, 2, 4),
    "mqa": AttentionSpec(5, 1, 8),
    "scale": AttentionSpec(2, 1, 4, scale=0.3),
    "window": AttentionSpec(4, 2, 4, window=37),
    "soft cap": AttentionSpec(4, 2, 4, soft_cap=0.7),
    "alibi": AttentionSpec(6, 2, 4, alibi=AlibiSpec(scale=0.5)),
}
MIXED = [Run(0, 0, 9), Run(1, 140, 1), Run(2, 7, 0), Run(3, 130, 5), Run(4, 0, 1), Run(5, 3, 140)]
"""Whole prompts, decode rows, a row without tokens, chunks across blocks of keys and queries."""


def written_out(
    spec: AttentionSpec, run: Run, sinks: int = 0, logit: float | None = None
) -> np.ndarray:
    """Returns attention of a run in float64, one query and head at a time."""
    tokens = read(spec, run.sequence)
    out = np.zeros((run.count, spec.num_heads, spec.head_dim))
    group = spec.num_heads // spec.num_kv_heads
    for index, head in np.ndindex(out.shape[:2]):
        position = run.start + index
        keys = [
            p
            for p in range(position + 1)
            if spec.window is None or position - p < spec.window or p < sinks
        ]
        scores = tokens.k[keys, head // group].astype(float) @ tokens.q[position, head]
        scores *= spec.score_scale
        if spec.soft_cap is not None:
            scores = spec.soft_cap * np.tanh(scores / spec.soft_cap)
        if spec.alibi is not None:
            scores += alibi_slopes(spec.num_heads)[head] * np.array(keys) * spec.alibi.scale
        weights = np.exp(scores)
        total = weights.sum() + (0 if logit is None else math.exp(logit))
        out[index, head] = weights @ tokens.v[keys, head // group] / total
    return out


def all_written_out(spec: AttentionSpec, runs: list[Run], **options: Any) -> np.ndarray:
    return np.concatenate([written_out(spec, run, **options) for run in runs])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SPECS)
def test_attention_is_what_is_written_out(backend: str, name: str) -> None:
    pool = Pool(SPECS[name], backend=backend)
    found = pool.call(MIXED, padding=3)
    wanted = all_written_out(SPECS[name], MIXED)
    np.testing.assert_allclose(found[:-3], wanted, atol=3e-6)
    np.testing.assert_array_equal(found[-3:], 0)


@pytest.mark.parametrize("max_query", [1, 4])
def test_tokens_taken_one_by_one_give_the_same(max_query: int) -> None:
    runs = [Run(0, 100 - max_query, max_query), Run(1, 130, 1), Run(2, 5, 0), Run(3, 3, max_query)]
    runs = runs if max_query > 1 else [Run(r.sequence, r.start, 1) for r in runs]
    found = Pool(SPECS["gqa"]).call(runs, static=(("max_query", max_query),))
    np.testing.assert_allclose(found, all_written_out(SPECS["gqa"], runs), atol=3e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_needs_no_more_columns_than_it_sees(backend: str) -> None:
    # 37 keys and five new tokens lie in at most four pages of 16; nine pages take turns in five.
    spec = SPECS["window"]
    narrow = Pool(spec, width=5, backend=backend, written=4)
    runs = [Run(0, 138, 5), Run(1, 70, 1), Run(2, 0, 6)]
    found = narrow.call(runs)
    np.testing.assert_allclose(found, all_written_out(spec, runs), atol=3e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sinks", [4, 20])
def test_sinks_stay_visible_in_pages_that_never_turn(backend: str, sinks: int) -> None:
    spec = SPECS["window"]
    pool = Pool(spec, width=7, pinned_pages=2, backend=backend, written=4)
    runs = [Run(0, 300, 5), Run(1, 70, 1), Run(2, 0, 6), Run(3, 399, 1)]
    found = pool.call(runs, static=(("sink_tokens", sinks),))
    np.testing.assert_allclose(found, all_written_out(spec, runs, sinks=sinks), atol=3e-6)
    assert not np.allclose(found, all_written_out(spec, runs), atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_for_the_sinks_can_differ(backend: str) -> None:
    # Zero queries give the sinks the score zero: each weighs one.
    spec = AttentionSpec(1, 1, 4, window=3)
    runs = [Run(0, 50, 2)]
    zero = {"q_sink": jnp.zeros((2, 1, 4))}
    found = Pool(spec, backend=backend).call(runs, options=zero, static=(("sink_tokens", 2),))
    tokens = read(spec, 0)
    for index, position in enumerate([50, 51]):
        keys = [0, 1, position - 2, position - 1, position]
        scores = tokens.k[keys, 0] @ tokens.q[position, 0] * spec.score_scale
        weights = np.exp(np.where(np.array(keys) < 2, 0.0, scores))
        wanted = weights @ tokens.v[keys, 0] / weights.sum()
        np.testing.assert_allclose(found[index, 0], wanted, atol=2e-6)


def test_a_sink_logit_takes_its_share() -> None:
    spec = SPECS["mqa"]
    options = {"sink_logits": jnp.full(5, 1.5)}
    found = Pool(spec, backend="reference").call(MIXED, options=options)
    np.testing.assert_allclose(found, all_written_out(spec, MIXED, logit=1.5), atol=3e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lse_is_the_log_of_the_denominator(backend: str) -> None:
    # One head whose queries are zero: every visible key weighs one.
    spec = AttentionSpec(2, 1, 4, scale=0.0)
    static = (("outputs", (Extra.LSE,)),)
    _, lse = Pool(spec, backend=backend).call([Run(0, 0, 3), Run(1, 200, 1)], 1, static=static)
    wanted = np.log([1, 2, 3, 201])
    np.testing.assert_allclose(lse[:4], np.stack([wanted, wanted], 1), rtol=1e-6)
    np.testing.assert_array_equal(lse[4], -np.inf)


def test_key_mass_is_what_queries_pay_to_a_place() -> None:
    # Equal weights; two heads share a key head. Position 0 is seen by both queries of row 0.
    spec = AttentionSpec(2, 1, 4, scale=0.0)
    static = (("outputs", (Extra.KEY_MASS,)),)
    pool = Pool(spec, backend="reference", page_size=4, width=2)
    _, mass = pool.call([Run(0, 0, 2), Run(1, 4, 1)], padding=1, static=static)
    np.testing.assert_allclose(mass[0, 0], [2 * (1 + 0.5), 1, 0, 0, 0, 0, 0, 0])
    np.testing.assert_allclose(mass[1, 0], [0.4] * 5 + [0, 0, 0], rtol=1e-6)


def test_a_mask_decides_over_the_newest_keys() -> None:
    # A tree of three drafts after five tokens: 5 -> {6, 7}; the last does not see its sibling.
    spec = AttentionSpec(1, 1, 4)
    tree = jnp.array([[True, False, False], [True, True, False], [True, False, True]])
    found = Pool(spec, backend="reference").call([Run(0, 5, 3)], options={"mask": tree})
    tokens = read(spec, 0)
    for index, keys in enumerate([[5], [5, 6], [5, 7]]):
        keys = [*range(5), *keys]
        weights = np.exp(tokens.k[keys, 0] @ tokens.q[5 + index, 0] / 2)
        wanted = weights @ tokens.v[keys, 0] / weights.sum()
        np.testing.assert_allclose(found[index, 0], wanted, atol=2e-6)


def test_scales_multiply_what_pages_hold() -> None:
    spec = SPECS["gqa"]
    kernels = kernel_set("reference")
    pool = Pool(spec, backend="reference")
    table, pages = pool.filled([0], [40])
    scale = jnp.asarray(np.random.default_rng(0).uniform(1, 2, pages.keys.shape[::2]), jnp.float32)
    divided = pages._replace(
        keys=pages.keys / scale[:, None, :, None], values=pages.values / scale[:, None, :, None] / 2
    )
    arrays = table, jnp.array([0, 2]), jnp.array([40]), jnp.array([38, 39])
    q = jnp.asarray(read(spec, 0).q[38:40])
    wanted = kernels.paged_attention(q, pages, *arrays, spec, page_size=16)
    scales = scale, 2 * scale
    found = kernels.paged_attention(q, divided, *arrays, spec, page_size=16, scales=scales)
    np.testing.assert_allclose(found, wanted, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_copied_pages_serve_as_the_first_ones_did(backend: str) -> None:
    spec = SPECS["gqa"]
    pool = Pool(spec, backend=backend, first_page=4, width=3)
    kernels = kernel_set(backend)
    table, pages = pool.filled([0], [40])
    pages = kernels.copy_pages(pages, table[0], jnp.array([0, 1, 2]))
    q = jnp.asarray(read(spec, 0).q[39:40])
    rest = jnp.array([0, 1]), jnp.array([40]), jnp.array([39]), spec
    moved = kernels.paged_attention(q, pages, jnp.array([[0, 1, 2]]), *rest, page_size=16)
    wanted = kernels.paged_attention(q, pages, table, *rest, page_size=16)
    np.testing.assert_array_equal(moved, wanted)
    assert float(jnp.abs(wanted).max()) > 0


def test_pages_of_another_dtype_are_read() -> None:
    pool = Pool(SPECS["gqa"], dtype="bfloat16")
    table, pages = pool.filled([0], [40])
    q = jnp.asarray(read(pool.spec, 0).q[30:40])
    found = kernel_set("xla").paged_attention(
        q, pages, table, jnp.array([0, 10]), jnp.array([40]), jnp.arange(30, 40), pool.spec,
        page_size=16,
    )  # fmt: skip
    np.testing.assert_allclose(found, written_out(pool.spec, Run(0, 30, 10)), atol=0.02)


def test_bfloat16_stays_near_what_is_written_out() -> None:
    found = Pool(SPECS["gqa"], dtype="bfloat16").call(MIXED)
    np.testing.assert_allclose(found, all_written_out(SPECS["gqa"], MIXED), atol=0.05)


def test_what_only_the_reference_has_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match="'xla' has no sink_logits in paged_attention"):
        Pool(SPECS["gqa"]).call([Run(0, 0, 1)], options={"sink_logits": jnp.zeros(6)})
    with pytest.raises(UnsupportedError, match="no outputs=key_mass in"):
        Pool(SPECS["gqa"]).call([Run(0, 0, 1)], static=(("outputs", (Extra.KEY_MASS,)),))
    with pytest.raises(UnsupportedError, match="page_size=24 neither divides 128"):
        replace(Pool(SPECS["gqa"]), page_size=24).filled([0], [1])


def test_pages_take_the_memory_that_the_spec_says() -> None:
    # The fast layout has one more row beside the values of each head.
    spec = cache_spec(SPECS["gqa"], "bfloat16")
    pages = kernel_set("reference").init_pages(7, 16, spec)
    assert sum(x.nbytes for x in jax.tree.leaves(pages)) == 7 * 16 * spec.bytes_per_token
