"""The attention layer against its sums in numpy."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.config import AlibiSpec, AttentionSpec, RopeSpec
from jaxserve.layers.attention import Attention
from jaxserve.layers.cache import At, NoCache
from jaxserve.layers.param import Axis, Declare

from .tiny_models import SERIAL, filled, runtime, sequences, with_values

LENGTH = 5
X = np.random.default_rng(0).normal(size=(LENGTH, 7)).astype(np.float32)


def turned(x: np.ndarray) -> np.ndarray:
    """Returns x[T, heads, 4] with features (0, 2) and (1, 3) turned, at base 10000."""
    pairs = x[..., :2] + 1j * x[..., 2:]
    product = pairs * np.exp(1j * np.arange(LENGTH)[:, None] * np.array([1, 0.01]))[:, None]
    return np.concatenate([product.real, product.imag], axis=-1)


@pytest.mark.parametrize(
    "spec",
    [
        AttentionSpec(6, 2, 4, rope=RopeSpec(4)),
        AttentionSpec(3, 3, 4, rope=RopeSpec(4), window=2, scale=0.3),
        AttentionSpec(4, 1, 4, alibi=AlibiSpec(), qkv_bias=True, out_bias=True),
    ],
)
def test_attention_is_its_formula(spec: AttentionSpec) -> None:
    declared = Attention(spec, Axis("embed", 7), Declare())
    _, params = filled(declared)
    step = sequences([range(LENGTH)])

    @jax.jit
    def attend(x: jax.Array) -> jax.Array:
        run = runtime(step, replace(SERIAL, attention=spec))
        attention = with_values(declared, params)
        q, k, v = run.comm.distribute(attention.project(x, run))
        return attention.finish(q, k, v, At(0), NoCache(1).begin(step), run)[0]

    def projected(name: str) -> np.ndarray:
        weight = params["qkv"]["separate"][name]
        return np.tensordot(X, weight["values"], 1) + weight.get("bias", 0)

    q, k, v = map(projected, "qkv")
    if spec.rope is not None:
        q, k = turned(q), turned(k)
    heads = np.zeros((LENGTH, spec.num_heads, spec.head_dim))
    for head in range(spec.num_heads):
        own = head * spec.num_kv_heads // spec.num_heads
        scores = q[:, head] @ k[:, own].T * spec.score_scale
        if spec.alibi is not None:  # four heads: slopes 1/4, 1/16, 1/64, 1/256
            scores += 4.0 ** -(head + 1) * np.arange(LENGTH)
        distance = np.arange(LENGTH)[:, None] - np.arange(LENGTH)
        hidden = (distance < 0) | (distance >= (spec.window or LENGTH))
        weights = np.where(hidden, 0, np.exp(scores))
        heads[:, head] = weights / weights.sum(1, keepdims=True) @ v[:, own]
    out = params["out"]
    wanted = np.tensordot(heads, out["values"], 2)  # the block adds the bias
    np.testing.assert_allclose(attend(jnp.asarray(X)), wanted, atol=1e-5)
