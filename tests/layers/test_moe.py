"""Experts against their formula in numpy, token by token."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.config import Activation, ExpertsSpec, MlpSpec, Quantization
from jaxserve.layers.moe import Experts, Routing
from jaxserve.layers.param import Axis, Declare
from jaxserve.pallas_kernels import BACKENDS, kernel_set

from .tiny_models import SERIAL, filled, runtime, sequences, with_values

SPEC = MlpSpec(7, Activation.RELU, gated=True, experts=ExpertsSpec(5, 2))
X = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)


def by_hand(x: np.ndarray, params: Any, renormalised: bool, gated: bool) -> np.ndarray:
    """Returns what the two likeliest of five experts give to one token."""
    scores = params["router"]["values"] @ x
    chances = np.exp(scores) / np.exp(scores).sum()
    taken = np.argsort(-chances)[:2]
    total = chances[taken].sum() if renormalised else 1.0
    y = np.zeros_like(x)
    for expert in taken:
        up = params["up"]["values"][expert] @ x
        gate = params["gate"]["values"][expert] @ x if gated else up
        h = np.maximum(gate, 0) * (up if gated else 1)
        y += chances[expert] / total * (params["down"]["values"][expert] @ h)
    return y


@pytest.mark.parametrize("renormalised", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_a_token_takes_the_likeliest_experts(renormalised: bool, gated: bool) -> None:
    spec = replace(SPEC, gated=gated, experts=ExpertsSpec(5, 2, renormalised))
    experts, params = filled(Experts(spec, Axis("embed", 6), Declare()))
    run = experts.route(jnp.asarray(X), runtime(sequences([[1, 2, 3, 4]]), SERIAL))
    parts = experts.project(jnp.asarray(X), run)
    found = experts.finish(*run.comm.distribute(parts), run=run)
    wanted = np.stack([by_hand(x, params, renormalised, gated) for x in X])
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert int(run.routing.load.sum()) == 2 * len(X)


def test_padding_goes_nowhere_and_no_token_is_dropped() -> None:
    # All prefer expert 2, then expert 0.
    scores = jnp.tile(jnp.array([[1.0, -1.0, 3.0]]), (40, 1))
    valid = jnp.arange(40) % 4 != 3
    routing = Routing.of(scores, valid, ExpertsSpec(3, 2))
    assert routing.load.tolist() == [30, 0, 30]
    first, second = 1 / (1 + np.exp(-2)), 1 / (1 + np.exp(2))
    np.testing.assert_allclose(routing.weights[0], [first, second], rtol=1e-6)
    # Rows of padding stand behind all others.
    behind = np.asarray(routing.order[60:]) // 2
    assert not np.asarray(valid)[behind].any()
    np.testing.assert_array_equal(
        np.asarray(routing.order)[np.asarray(routing.places)], np.arange(80)
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("quantize", Quantization)
def test_rounded_experts_have_scales_of_their_own(quantize: Quantization, backend: str) -> None:
    _, params = filled(Experts(SPEC, Axis("embed", 6), Declare()))
    rounded, whole = dict(params), dict(params)
    for name in ("gate", "up", "down"):
        values = params[name]["values"]
        scales = np.abs(values).max(axis=2) / 127
        parts = np.rint(values / scales[..., None]).astype(np.int8)
        rounded[name] = {"values": parts, "scales": scales}
        whole[name] = {"values": parts * scales[..., None]}
    experts = Experts(SPEC, Axis("embed", 6), Declare(quantize=quantize))
    experts = with_values(experts, jax.tree.map(jnp.asarray, rounded))
    run = replace(runtime(sequences([[1, 2, 3, 4]]), SERIAL), kernels=kernel_set(backend))
    run = experts.route(jnp.asarray(X), run)
    found = experts.finish(*run.comm.distribute(experts.project(jnp.asarray(X), run)), run=run)
    wanted = np.stack([by_hand(x, whole, True, True) for x in X])
    limit = 1e-5 if quantize is Quantization.INT8 else 0.02
    error = np.abs(found - wanted).max() / np.abs(wanted).max()
    assert error < limit
    assert bool(error > 1e-4) is (quantize is Quantization.W8A8)
