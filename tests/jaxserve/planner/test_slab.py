"""The planned cache gives what the dense cache gives."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from jaxserve.config import (
    Activation,
    AlibiSpec,
    AttentionSpec,
    LayerSpec,
    MlpSpec,
    ModelConfig,
    NormSpec,
    RopeSpec,
)
from jaxserve.errors import UnsupportedError
from jaxserve.layers.cache import At, DenseCache
from jaxserve.layers.decoder import Model
from jaxserve.layers.param import Declare
from jaxserve.layers.step import Step
from jaxserve.pallas_kernels import kernel_set
from jaxserve.partitioning.collectives import LocalComm
from jaxserve.partitioning.stripe import Stripe
from jaxserve.planner.slab import SlabCache
from jaxserve.serving.generation import Program, Prompts, decode_step, prefill

ALIBI = AttentionSpec(4, 2, 8, alibi=AlibiSpec())
PATTERNS = {
    "rope": (AttentionSpec(4, 2, 8, rope=RopeSpec(8)),),
    "alibi": (ALIBI,),
    "windows": (AttentionSpec(4, 1, 8, window=3), AttentionSpec(4, 4, 8)),
}


def config(*attentions: AttentionSpec) -> ModelConfig:
    norm = NormSpec()
    mlp = MlpSpec(32, Activation.SILU, gated=True)
    layers = tuple(LayerSpec(attention, mlp, norm) for attention in attentions)
    return ModelConfig("llama", 64, 32, layers * 2, norm, 64)


@pytest.mark.parametrize("attentions", PATTERNS.values(), ids=PATTERNS)
def test_prompts_and_later_tokens_meet_the_same_keys(attentions):
    shape = config(*attentions)
    model = Model(shape, Declare(stack=True))
    program = Program(model, LocalComm(), kernel_set("xla"))
    params = model.init(jax.random.key(0))
    caches = (
        SlabCache.create(shape, 3, 16, model.declare, program.comm),
        DenseCache.create(shape, 3, 16, model.declare, program.comm, program.kernels),
    )
    tokens = jax.random.randint(jax.random.key(1), (3, 5), 0, 64, jnp.int32)
    lengths = jnp.array([5, 2, 4], jnp.int32)
    found = []
    cache: Any
    for cache in caches:
        scores, cache = prefill(program, params, Prompts(tokens, lengths), cache)
        rows = [scores]
        for step in range(3):
            fresh = jnp.array([7, 8, 9], jnp.int32) + step
            scores, cache = decode_step(program, params, fresh, lengths + step, cache)
            rows.append(scores)
        found.append(jnp.stack(rows))
    np.testing.assert_allclose(found[0], found[1], rtol=2e-5, atol=2e-5)


def test_what_a_slab_cannot_hold_is_refused():
    shape = config(ALIBI)
    cache = SlabCache.create(shape, 1, 16, Declare(stack=True), LocalComm())
    token = jnp.zeros(1, jnp.int32)
    begun = cache.begin(Step(token, token, token))
    x, at = jnp.zeros((1, 4, 8)), At(0, jnp.int32(0))
    sinks = AttentionSpec(4, 4, 8, window=4, sink_tokens=1)
    with pytest.raises(UnsupportedError, match="no streaming cache"):
        begun.attend(at, x, x, x, sinks, kernel_set("xla"))


@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_sequences_in_pieces_give_what_whole_ones_give(soft_cap):
    spec = AttentionSpec(4, 2, 8, soft_cap=soft_cap)
    at, kernels = At(0, jnp.int32(0)), kernel_set("xla")
    lengths = jnp.array([5, 2, 4], jnp.int32)
    places = jnp.broadcast_to(jnp.arange(5), (3, 5))
    first = jnp.where(places < lengths[:, None], places, -1)
    steps = [first, *(lengths[:, None] + later for later in range(3))]

    def attended(slots: int, stripe: Stripe | None) -> list[Any]:
        empty = jnp.zeros((1, 3, 2, slots, 8))
        cache, found = SlabCache((empty,), (empty,)), []
        for number, positions in enumerate(steps):
            q, k, v = (
                jax.random.normal(jax.random.key(10 * number + i), (positions.size, heads, 8))
                for i, heads in enumerate((4, 2, 2))
            )
            flat = positions.reshape(-1)
            out, cache = cache.begin(Step(flat, flat, flat)).attend(
                at, q, k, v, spec, kernels, stripe=stripe
            )
            found.append(jnp.where(flat[:, None, None] >= 0, out, 0))
        return found

    def share(index: Array) -> list[Any]:
        return attended(4, Stripe(3, index, ("x",)))

    merged = jax.vmap(share, axis_name="x")(jnp.arange(3))
    for whole, pieces in zip(attended(12, None), merged, strict=True):
        for piece in pieces:  # on every device
            np.testing.assert_allclose(piece, whole, rtol=2e-5, atol=2e-5)
