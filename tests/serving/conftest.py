"""A tiny model for the tests of generation: two unlike layers, float32."""

from collections.abc import Callable, Sequence
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.config import (
    Activation,
    AttentionSpec,
    LayerSpec,
    MlpSpec,
    ModelConfig,
    NormSpec,
    RopeSpec,
)
from jaxserve.layers.decoder import Model, Params
from jaxserve.layers.param import Declare
from jaxserve.pallas_kernels import kernel_set
from jaxserve.partitioning.collectives import LocalComm
from jaxserve.serving.generation import Program, logits

VOCAB = 31
WHOLE = 40

Continuation = tuple[list[int], list[float]]
Continue = Callable[[Sequence[int], int], Continuation]


@pytest.fixture(scope="session")
def program() -> Program:
    rope = RopeSpec(4)
    mlp = MlpSpec(20, Activation.SILU, gated=True)
    layers = (
        LayerSpec(AttentionSpec(4, 2, 4, rope=rope), mlp, NormSpec()),
        LayerSpec(AttentionSpec(2, 1, 4, rope=rope, window=6), mlp, NormSpec()),
    )
    config = ModelConfig("tiny", VOCAB, 12, layers, NormSpec(), 128)
    return Program(Model(config, Declare(fuse=True)), LocalComm(), kernel_set("xla"))


@pytest.fixture(scope="session")
def params(program: Program) -> Params:
    rng = np.random.default_rng(0)

    def values(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        # Large enough for continuations that do not repeat themselves.
        return jnp.asarray(rng.normal(size=leaf.shape) * (0.5 if len(leaf.shape) > 1 else 1.5))

    return jax.tree.map(values, program.model.abstract_params())


@pytest.fixture(scope="session")
def continued(program: Program, params: Params) -> Continue:
    """Returns a function (prompt, count) -> (tokens, log-probabilities), greedily.

    Every token is found anew from the logits of the whole sequence before it.
    """
    compiled = jax.jit(logits, static_argnums=0)

    @cache
    def run(prompt: tuple[int, ...], count: int) -> Continuation:
        sequence, scores = list(prompt), []
        for _ in range(count):
            # What comes later changes nothing, so one length serves every step.
            whole = np.array([sequence + [0] * (WHOLE - len(sequence))], np.int32)
            row = np.asarray(compiled(program, params, whole), np.float64)[0, len(sequence) - 1]
            sequence.append(int(row.argmax()))
            scores.append(float(row.max() - np.log(np.exp(row).sum())))
        return sequence[len(prompt) :], scores

    return lambda prompt, count: run(tuple(prompt), count)
