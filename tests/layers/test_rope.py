"""Rotary positions as multiplication by complex numbers, and each way of stretching them."""

import math
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.config import RopePairs, RopeScaling, RopeSpec
from jaxserve.layers.rope import inverse_frequencies, rotate, rotation

PLAIN = RopeSpec(8, theta=100.0)
STRETCHED = replace(PLAIN, original_context_tokens=64, low_freq_factor=1.0, high_freq_factor=4.0)
X = np.random.default_rng(0).normal(size=(5, 3, 10)).astype(np.float32)
POSITIONS = np.array([0, 1, 2, 7, 31], np.int32)


def frequencies(spec: RopeSpec, length: int = 1) -> np.ndarray:
    """Returns the angle per position, read off the rotation at position 1."""
    cos, sin = rotation(spec, jnp.ones(1, jnp.int32), jnp.full(1, length, jnp.int32))
    return np.arctan2(np.asarray(sin), np.asarray(cos))[0, 0]


@pytest.mark.parametrize("pairs", RopePairs)
def test_a_rotation_multiplies_pairs_as_complex_numbers(pairs: RopePairs) -> None:
    spec = replace(PLAIN, pairs=pairs)
    cos, sin = rotation(spec, jnp.asarray(POSITIONS), jnp.asarray(POSITIONS) + 1)
    found = np.asarray(rotate(jnp.asarray(X), spec, cos, sin))
    wanted = X.copy()
    for pair in range(4):
        real, imaginary = (
            (pair, pair + 4) if pairs is RopePairs.HALVES else (2 * pair, 2 * pair + 1)
        )
        turn = np.exp(1j * POSITIONS * 100.0 ** (-pair / 4))[:, None]
        product = (X[..., real] + 1j * X[..., imaginary]) * turn
        wanted[..., real], wanted[..., imaginary] = product.real, product.imag
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    np.testing.assert_array_equal(found[..., 8:], X[..., 8:])  # past rotary_dim


def test_scores_depend_on_the_distance_alone() -> None:
    def score(at: int) -> float:
        positions = jnp.array([at, at + 3], jnp.int32)
        cos, sin = rotation(PLAIN, positions, positions + 1)
        turned = np.asarray(rotate(jnp.asarray(X[:2]), PLAIN, cos, sin))
        return float((turned[0] * turned[1]).sum())

    assert score(0) == pytest.approx(score(40), rel=1e-4)


def test_bfloat16_is_turned_in_float32() -> None:
    x = jnp.asarray(X, jnp.bfloat16)
    cos, sin = rotation(PLAIN, jnp.asarray(POSITIONS), jnp.asarray(POSITIONS) + 1)
    found = rotate(x, PLAIN, cos, sin)
    wide = rotate(x.astype(jnp.float32), PLAIN, cos, sin)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, wide.astype(jnp.bfloat16))


@pytest.mark.parametrize("scaling", [RopeScaling.LINEAR, RopeScaling.LLAMA3, RopeScaling.YARN])
def test_a_factor_of_one_stretches_nothing(scaling: RopeScaling) -> None:
    found = frequencies(replace(STRETCHED, scaling=scaling, factor=1.0))
    np.testing.assert_allclose(found, frequencies(PLAIN), rtol=1e-5)


def test_linear_scaling_divides_positions() -> None:
    spec = replace(PLAIN, scaling=RopeScaling.LINEAR, factor=4.0)
    np.testing.assert_allclose(frequencies(spec), frequencies(PLAIN) / 4, rtol=1e-5)


def test_dynamic_scaling_starts_past_the_trained_context() -> None:
    spec = replace(STRETCHED, scaling=RopeScaling.DYNAMIC, factor=2.0)
    for length in (1, 63, 64):
        np.testing.assert_allclose(frequencies(spec, length), frequencies(PLAIN), rtol=1e-5)
    # Twice the trained context: the base grows by (2 * 128 / 64 - 1) ** (8 / 6).
    grown = 100.0 * 3 ** (8 / 6)
    wanted = grown ** -(np.arange(4) / 4)
    np.testing.assert_allclose(frequencies(spec, 128), wanted, rtol=1e-5)


def test_dynamic_scaling_looks_at_each_tokens_own_length() -> None:
    spec = replace(STRETCHED, scaling=RopeScaling.DYNAMIC, factor=2.0)
    positions, lengths = jnp.array([5, 5]), jnp.array([10, 128])
    cos, _ = rotation(spec, positions, lengths)
    alone = [rotation(spec, positions[i : i + 1], lengths[i : i + 1])[0][0] for i in range(2)]
    np.testing.assert_array_equal(cos, jnp.stack(alone))
    assert not np.allclose(alone[0], alone[1])


def test_llama3_scaling_keeps_fast_pairs_and_divides_slow_ones() -> None:
    # Turns within 64 tokens: 10.2, 3.22, 1.02, 0.32; kept above 4, divided below 1.
    found = inverse_frequencies(replace(STRETCHED, scaling=RopeScaling.LLAMA3, factor=8.0))
    plain = inverse_frequencies(PLAIN)
    assert found[0] == plain[0]
    assert found[3] == pytest.approx(plain[3] / 8)
    # Between them as in Meta's code: smooth = (64 / wavelength - low) / (high - low).
    for pair in (1, 2):
        smooth = (64 * plain[pair] / (2 * math.pi) - 1) / 3
        assert 0 < smooth < 1
        blended = (1 - smooth) * plain[pair] / 8 + smooth * plain[pair]
        assert found[pair] == pytest.approx(blended, rel=1e-6)


def yarn(**fields: Any) -> RopeSpec:
    # Pair i turns 1024 * 10 ** (-i / 4) / (2 pi) times within the trained context.
    return RopeSpec(
        16,
        theta=100.0,
        scaling=RopeScaling.YARN,
        factor=4.0,
        original_context_tokens=1024,
        **fields,
    )


def test_yarn_keeps_fast_pairs_divides_slow_ones_and_ramps_between() -> None:
    # 60 turns are made by pair 8 * ln(1024 / (60 * 2 pi)) / ln(100) = 1.7, rounded down to 1;
    # 20 turns by pair 3.6, rounded up to 4.
    spec = yarn(beta_fast=60.0, beta_slow=20.0)
    kept = inverse_frequencies(spec) / inverse_frequencies(replace(spec, scaling=RopeScaling.NONE))
    ramp = [0, 0, 1 / 3, 2 / 3, 1, 1, 1, 1]
    np.testing.assert_allclose(kept, [1 - r + r / 4 for r in ramp], rtol=1e-5)


def test_yarn_without_truncation_uses_the_exact_edges() -> None:
    spec = yarn(beta_fast=60.0, beta_slow=20.0, truncate=False)
    kept = inverse_frequencies(spec) / inverse_frequencies(replace(spec, scaling=RopeScaling.NONE))
    low, high = (
        8 * math.log(1024 / (turns * 2 * math.pi)) / math.log(100) for turns in (60.0, 20.0)
    )
    ramp = np.clip((np.arange(8) - low) / (high - low), 0, 1)
    assert 0 < ramp[2] < 1
    np.testing.assert_allclose(kept, 1 - ramp + ramp / 4, rtol=1e-5)


def test_yarn_multiplies_cosine_and_sine() -> None:
    positions = jnp.arange(3)
    plain, louder = (
        jnp.stack(rotation(yarn(attention_factor=factor), positions, positions + 1))
        for factor in (1.0, 1.25)
    )
    np.testing.assert_allclose(louder, plain * 1.25, rtol=1e-6)
