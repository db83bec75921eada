"""Tiny declarations with values, for tests of the layers."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxserve.config import (
    Activation,
    AlibiSpec,
    AttentionSpec,
    BlockKind,
    LayerSpec,
    MlpSpec,
    ModelConfig,
    NormKind,
    NormSpec,
    RopePairs,
    RopeSpec,
)
from jaxserve.layers.decoder import Model, Params
from jaxserve.layers.param import Declare, Init, Parameter, named_parameters, tree_of
from jaxserve.layers.runtime import Runtime
from jaxserve.layers.step import Step
from jaxserve.layers.tap import Taps
from jaxserve.pallas_kernels import kernel_set
from jaxserve.partitioning.collectives import LocalComm

MEMBERS = ("q", "k", "v", "gate", "up")
"""Members of the groups, in their order."""

Module = TypeVar("Module", bound=nnx.Module)

SERIAL = LayerSpec(
    AttentionSpec(6, 2, 6, rope=RopeSpec(4)),
    MlpSpec(10, Activation.SILU, gated=True),
    NormSpec(),
)
POST_NORMED = LayerSpec(
    AttentionSpec(3, 3, 4, rope=RopeSpec(4), window=4, soft_cap=2.0, scale=0.4),
    MlpSpec(12, Activation.GELU_TANH, gated=True),
    NormSpec(unit_offset=True),
    post_norms=True,
)
PARALLEL = LayerSpec(
    AttentionSpec(5, 1, 4, alibi=AlibiSpec(scale=0.5), qkv_bias=True, out_bias=True),
    MlpSpec(14, Activation.GELU, gated=False, bias=True),
    NormSpec(NormKind.LAYER, bias=True),
    block=BlockKind.PARALLEL,
    mlp_norm=False,
)
TWO_NORMED = replace(
    PARALLEL,
    attention=AttentionSpec(4, 2, 4, rope=RopeSpec(4, pairs=RopePairs.NEIGHBOURS)),
    mlp_norm=True,
)
MIXED = ModelConfig(
    "mixed",
    vocab_size=19,
    embed_dim=8,
    layers=(SERIAL, POST_NORMED, PARALLEL, TWO_NORMED),
    final_norm=NormSpec(),
    max_context_tokens=32,
    embed_scale=2.0,
    logits_scale=0.7,
    logits_soft_cap=3.0,
)
"""All the mathematics there is in one model: layers may differ."""


def random_params(module: nnx.Module, seed: int = 0) -> Params:
    """Returns values for the module's parameters; none is the neutral one."""
    rng = np.random.default_rng(seed)
    centre = {Init.ONES: 1.0}
    spread = {Init.ONES: 0.3, Init.ZEROS: 0.3, Init.EMBED: 0.5}

    def values(leaf: Parameter) -> Array:
        shape, dtype = leaf.get_value().shape, leaf.get_value().dtype
        noise = rng.normal(size=shape) * spread.get(leaf.init, leaf.fan_in**-0.5)
        return jnp.asarray(noise + centre.get(leaf.init, 0.0), dtype)

    return tree_of((path, values(leaf)) for path, leaf in named_parameters(module))


def with_values(module: Module, params: Params) -> Module:
    return nnx.merge(nnx.graphdef(module), params)


def filled(module: Module, seed: int = 0) -> tuple[Module, Params]:
    """Returns (the module with random values, the values for numpy)."""
    params = random_params(module, seed)
    return with_values(module, params), jax.tree.map(np.asarray, params)


def runtime(step: Step, *specs: LayerSpec, tap: Taps | None = None) -> Runtime:
    attentions = {spec.attention for spec in specs}
    return Runtime.begin(step, attentions, LocalComm(), kernel_set("reference"), tap or Taps())


def sequences(rows: Sequence[Sequence[int]]) -> Step:
    """Returns a step of whole sequences, padded on the right to the longest."""
    longest = max(map(len, rows))
    tokens = [[*row, *[0] * (longest - len(row))] for row in rows]
    positions = [[*range(len(row)), *[-1] * (longest - len(row))] for row in rows]
    lengths = [[len(row)] * longest for row in rows]
    return Step(*(jnp.asarray(x, jnp.int32).ravel() for x in (tokens, positions, lengths)))


def restored(params: Params, config: ModelConfig, declare: Declare) -> Params:
    """Returns plainly stored float32 weights (`Declare()`) as another `Declare` stores them."""
    tree = _fused(params) if declare.fuse else params
    before = Model(config, Declare(fuse=declare.fuse)).param_axes()
    after = Model(config, declare).param_axes()
    return jax.tree.map(
        lambda x, old, new: jnp.transpose(x, [old.index(axis) for axis in new]).astype(
            declare.dtype
        ),
        tree,
        before,
        after,
    )


def _fused(tree: Any) -> Any:
    """Returns the tree with the members of each group laid end to end, inputs first."""
    if not isinstance(tree, dict):
        return tree
    if "separate" not in tree:
        return {key: _fused(branch) for key, branch in tree.items()}
    members = [tree["separate"][name] for name in MEMBERS if name in tree["separate"]]
    whole = {
        "values": jnp.concatenate(
            [weight["values"].reshape(weight["values"].shape[0], -1) for weight in members], 1
        )
    }
    if "bias" in members[0]:
        whole["bias"] = jnp.concatenate([weight["bias"].ravel() for weight in members])
    return {"fused": whole}
