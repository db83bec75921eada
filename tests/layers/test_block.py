"""How a block joins attention and MLP.

A sequence of one token attends to itself alone: attention is then the value, mapped out. That
leaves the block's own arithmetic, which numpy repeats here.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.config import (
    Activation,
    AttentionSpec,
    BlockKind,
    LayerSpec,
    MlpSpec,
    NormKind,
    NormSpec,
)
from jaxserve.layers.block import Block
from jaxserve.layers.cache import At, NoCache
from jaxserve.layers.decoder import Params
from jaxserve.layers.param import Axis, Declare
from jaxserve.layers.tap import Taps

from .tiny_models import filled, runtime, sequences, with_values

BATCH, WIDTH = 3, 6
X = np.random.default_rng(0).normal(size=(BATCH, WIDTH)).astype(np.float32)

SERIAL = LayerSpec(
    AttentionSpec(4, 2, 5, qkv_bias=True, out_bias=True),
    MlpSpec(9, Activation.RELU, gated=True, bias=True),
    NormSpec(NormKind.LAYER, bias=True),
)
PARALLEL = replace(SERIAL, block=BlockKind.PARALLEL)


class Numpy:
    """The parts of a block for single tokens, from the same weights."""

    def __init__(self, params: Params) -> None:
        self.params = params

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        centred = x - x.mean(1, keepdims=True)
        normed = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5)
        return normed * self.params[name]["scale"] + self.params[name]["bias"]

    def attention(self, x: np.ndarray) -> np.ndarray:
        weights = self.params["attention"]
        value = weights["qkv"]["separate"]["v"]
        heads = np.repeat(np.tensordot(x, value["values"], 1) + value["bias"], 2, axis=1)
        return np.tensordot(heads, weights["out"]["values"], 2) + weights["out"]["bias"]

    def mlp(self, x: np.ndarray) -> np.ndarray:
        hidden = self.params["mlp"]["hidden"]["separate"]
        gate, up = (x @ w["values"] + w["bias"] for w in map(hidden.get, ("gate", "up")))
        down = self.params["mlp"]["down"]
        return np.maximum(gate, 0) * up @ down["values"] + down["bias"]


def serial(of: Numpy, x: np.ndarray) -> np.ndarray:
    x = x + of.attention(of.norm("attention_norm", x))
    return x + of.mlp(of.norm("mlp_norm", x))


def post_normed(of: Numpy, x: np.ndarray) -> np.ndarray:
    attended = of.attention(of.norm("attention_norm", x))
    x = x + of.norm("attention_post_norm", attended)
    return x + of.norm("mlp_post_norm", of.mlp(of.norm("mlp_norm", x)))


def parallel(of: Numpy, x: np.ndarray) -> np.ndarray:
    h = of.norm("attention_norm", x)
    return x + of.attention(h) + of.mlp(h)


def parallel_two_normed(of: Numpy, x: np.ndarray) -> np.ndarray:
    attended = of.attention(of.norm("attention_norm", x))
    return x + attended + of.mlp(of.norm("mlp_norm", x))


@pytest.mark.parametrize(
    ("spec", "formula"),
    [
        (SERIAL, serial),
        (replace(SERIAL, post_norms=True), post_normed),
        (replace(PARALLEL, mlp_norm=False), parallel),
        (PARALLEL, parallel_two_normed),
    ],
)
def test_a_block_joins_its_parts_as_declared(spec: LayerSpec, formula: Any) -> None:
    declared = Block(spec, Axis("embed", WIDTH), Declare())
    _, params = filled(declared)
    step = sequences([[1]] * BATCH)

    @jax.jit
    def run(x: jax.Array) -> jax.Array:
        cache = NoCache(BATCH).begin(step)
        return with_values(declared, params)(x, At(0), cache, runtime(step, spec))[0]

    np.testing.assert_allclose(run(jnp.asarray(X)), formula(Numpy(params), X), atol=1e-5)


def test_norms_that_a_block_lacks_are_not_declared() -> None:
    block = Block(replace(PARALLEL, mlp_norm=False), Axis("embed", WIDTH), Declare())
    assert (block.mlp_norm, block.attention_post_norm, block.mlp_post_norm) == (None, None, None)


@pytest.mark.parametrize("kind", BlockKind)
def test_the_residual_grows_by_what_the_taps_show(kind: BlockKind) -> None:
    spec = replace(SERIAL, block=kind)
    declared = Block(spec, Axis("embed", WIDTH), Declare())
    _, params = filled(declared)
    step = sequences([[1]] * BATCH)

    @jax.jit
    def run(x: jax.Array) -> dict[str, jax.Array]:
        taps = Taps(capture=("*",))
        cache = NoCache(BATCH).begin(step)
        with_values(declared, params)(x, At(4), cache, runtime(step, spec, tap=taps))
        return taps.captured

    shown = run(jnp.asarray(X))
    names = ["layers.4.attention", "layers.4.attention_probs", "layers.4.mlp", "layers.4.resid"]
    assert sorted(shown) == names
    wanted = X + shown["layers.4.attention"] + shown["layers.4.mlp"]
    np.testing.assert_allclose(shown["layers.4.resid"], wanted, atol=1e-6)
