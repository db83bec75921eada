"""Every attention kernel against the sums written out, and the fast ones against the reference."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxserve.config import AlibiSpec, AttentionSpec
from jaxserve.pallas_kernels import BACKENDS, resolve
from jaxserve.pallas_kernels.attention.scores import alibi_slopes
from jaxserve.pallas_kernels.attention.xla import MIN_BLOCK

SPECS = {
    "mha": AttentionSpec(3, 3, 5),
    "gqa": AttentionSpec(6, 2, 4),
    "mqa": AttentionSpec(5, 1, 8),
    "scale": AttentionSpec(2, 1, 4, scale=0.3),
    "window": AttentionSpec(4, 2, 4, window=3),
    "soft cap": AttentionSpec(4, 2, 4, soft_cap=0.7),
    "window and soft cap": AttentionSpec(4, 2, 4, window=2, soft_cap=0.5, scale=0.9),
    "alibi": AttentionSpec(6, 2, 4, alibi=AlibiSpec(scale=0.5)),
    "alibi in bfloat16": AttentionSpec(9, 3, 4, alibi=AlibiSpec(bfloat16=True)),
}


@dataclass(frozen=True)
class Case:
    """Arrays of one call; `live` marks queries that are not padding."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    q_positions: np.ndarray
    k_positions: np.ndarray

    @property
    def live(self) -> np.ndarray:
        return self.q_positions >= 0

    def run(self, backend: str, spec: AttentionSpec, own: bool = False) -> np.ndarray:
        out = compiled(backend)(
            self.q, self.k, self.v, self.q_positions, self.k_positions, spec, own
        )
        assert out.shape == self.q.shape
        assert out.dtype == self.q.dtype
        return np.asarray(out)


@cache
def compiled(backend: str) -> Callable[..., jax.Array]:
    return jax.jit(resolve("attention", backend), static_argnums=(5, 6))


def random_case(
    spec: AttentionSpec, q_positions: np.ndarray, k_positions: np.ndarray, dtype: type = np.float32
) -> Case:
    rng = np.random.default_rng(1)
    batch, length = q_positions.shape
    slots = k_positions.shape[1]
    shapes = (
        (batch, length, spec.num_heads, spec.head_dim),
        (batch, spec.num_kv_heads, slots, spec.head_dim),
        (batch, spec.num_kv_heads, slots, spec.head_dim),
    )
    q, k, v = (rng.normal(size=shape).astype(dtype) for shape in shapes)
    return Case(q, k, v, q_positions.astype(np.int32), k_positions.astype(np.int32))


def cached_case(spec: AttentionSpec) -> Case:
    """Returns three queries a row over slots in no order, some empty; one query is padding."""
    q_positions = np.array([[3, 4, 5], [6, -1, 7]])
    k_positions = np.array([[0, 1, 2, 3, 4, 5, -1], [7, 6, -1, 4, 3, 2, 1]])
    return random_case(spec, q_positions, k_positions)


def own_case(spec: AttentionSpec, length: int) -> Case:
    """Returns two whole sequences, the second with padding on the right."""
    positions = np.tile(np.arange(length), (2, 1))
    positions[1, length - 2 :] = -1
    return random_case(spec, positions, positions)


def written_out(case: Case, spec: AttentionSpec) -> np.ndarray:
    """Returns attention in float64, one query, head and key at a time."""
    out = np.zeros(case.q.shape)
    group = spec.num_heads // spec.num_kv_heads
    for row, query, head in np.ndindex(case.q.shape[:3]):
        position = case.q_positions[row, query]
        weights: dict[int, float] = {}
        for slot, at in enumerate(case.k_positions[row]):
            distance = position - at
            if at < 0 or distance < 0 or (spec.window is not None and distance >= spec.window):
                continue
            q, k = case.q[row, query, head], case.k[row, head // group, slot]
            score = math.fsum(map(float, q.astype(float) * k)) * spec.score_scale
            if spec.soft_cap is not None:
                score = spec.soft_cap * math.tanh(score / spec.soft_cap)
            if spec.alibi is not None:
                dtype = ml_dtypes.bfloat16 if spec.alibi.bfloat16 else np.float32
                slope = alibi_slopes(spec.num_heads)[head].astype(dtype)
                score += np.multiply(slope, dtype(at)).astype(float) * spec.alibi.scale
            weights[slot] = math.exp(score)
        for slot, weight in weights.items():
            share = weight / sum(weights.values())
            out[row, query, head] += share * case.v[row, head // group, slot]
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SPECS)
def test_attention_is_what_is_written_out(backend: str, name: str) -> None:
    spec = SPECS[name]
    case = cached_case(spec)
    found = case.run(backend, spec)
    np.testing.assert_allclose(found[case.live], written_out(case, spec)[case.live], atol=2e-6)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("name", ["gqa", "window"])
def test_what_lies_in_empty_slots_and_padding_is_never_seen(name: str) -> None:
    spec = SPECS[name]
    case = cached_case(spec)
    before = case.run("xla", spec)
    empty = np.broadcast_to(case.k_positions[:, None, :] < 0, case.k.shape[:3])
    case.k[empty] = case.v[empty] = 1e4
    case.q[~case.live] = -1e4
    np.testing.assert_array_equal(case.run("xla", spec)[case.live], before[case.live])


@pytest.mark.parametrize("name", ["gqa", "window and soft cap", "alibi"])
def test_runs_of_a_whole_sequence_give_what_one_pass_gives(name: str) -> None:
    # Three runs of queries, each over the keys up to its end; the last one is short.
    spec = SPECS[name]
    case = own_case(spec, 2 * MIN_BLOCK + 3)
    found = case.run("xla", spec, own=True)
    wanted = case.run("reference", spec)
    np.testing.assert_allclose(found[case.live], wanted[case.live], atol=2e-6)


def test_a_single_token_returns_its_own_value() -> None:
    spec = SPECS["gqa"]
    case = random_case(spec, np.zeros((2, 1)), np.zeros((2, 1)))
    wanted = np.repeat(case.v, 3, axis=1).swapaxes(1, 2)
    for backend in BACKENDS:
        np.testing.assert_allclose(case.run(backend, spec), wanted, rtol=1e-6)


@pytest.mark.parametrize("name", ["gqa", "alibi in bfloat16"])
def test_bfloat16_stays_near_the_reference(name: str) -> None:
    spec = SPECS[name]
    case = own_case(spec, 9)
    rounded = random_case(spec, case.q_positions, case.k_positions, ml_dtypes.bfloat16)
    found = rounded.run("xla", spec, own=True).astype(np.float32)
    wanted = rounded.run("reference", spec).astype(np.float32)
    np.testing.assert_allclose(found[case.live], wanted[case.live], atol=0.03)


def test_keys_of_another_dtype_are_read() -> None:
    spec = SPECS["gqa"]
    case = cached_case(spec)
    stored = Case(
        case.q,
        case.k.astype(ml_dtypes.bfloat16),
        case.v.astype(ml_dtypes.bfloat16),
        case.q_positions,
        case.k_positions,
    )
    found, wanted = (stored.run(backend, spec) for backend in ("xla", "reference"))
    np.testing.assert_allclose(found[case.live], wanted[case.live], atol=0.02)


def test_gradients_are_those_of_the_reference() -> None:
    spec = SPECS["soft cap"]
    case = own_case(spec, 6)
    towards = np.random.default_rng(2).normal(size=case.q.shape) * case.live[..., None, None]

    def gradients(backend: str) -> tuple[jax.Array, ...]:
        def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            out = resolve("attention", backend)(
                q, k, v, case.q_positions, case.k_positions, spec, True
            )
            return jnp.sum(out * towards)

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(case.q, case.k, case.v)

    for found, wanted in zip(gradients("xla"), gradients("reference"), strict=True):
        assert float(jnp.abs(wanted).max()) > 0.01
        np.testing.assert_allclose(found, wanted, atol=2e-6)
