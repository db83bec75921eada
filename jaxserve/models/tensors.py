"""Places of weights in checkpoints whose tensors are [outputs, inputs], as PyTorch keeps them."""

from __future__ import annotations

import math

import numpy as np

from jaxserve.config import LayerSpec, ModelConfig
from jaxserve.models.family import Source


def reshaped(tensor: str, *sides: tuple[int, ...]) -> Source:
    """Returns the source of a weight whose sides are flattened in the checkpoint.

    Args:
        sides: shape of the outputs, and of the inputs where there are any; one dimension of the
            stored tensor each.
    """
    whole = tuple(size for side in sides for size in side)

    def unflatten(stored: np.ndarray) -> np.ndarray:
        return stored.reshape(whole)

    return Source(tensor, tuple(math.prod(side) for side in sides), unflatten)


def with_bias(
    name: str, tensor: str, outputs: tuple[int, ...], inputs: tuple[int, ...], bias: bool
) -> dict[str, Source]:
    """Returns sources of a linear map, and of its bias where it has one."""
    sources = {name: reshaped(f"{tensor}.weight", outputs, inputs)}
    if bias:
        sources[f"{name}.bias"] = reshaped(f"{tensor}.bias", outputs)
    return sources


def embedding_sources(config: ModelConfig, embedding: str) -> dict[str, Source]:
    """Returns sources of the embedding and, where it is not tied, of the output head."""
    table = (config.vocab_size, config.embed_dim)
    sources = {"embedding": Source(f"{embedding}.weight", table)}
    if not config.tied:
        sources["head"] = Source("lm_head.weight", table)
    return sources


def projection_sources(config: ModelConfig, norms: dict[str, str]) -> dict[str, Source]:
    """Returns all sources of a model with Llama's tensor names.

    Args:
        norms: norm of a layer -> its name in the checkpoint.
    """
    sources = embedding_sources(config, "model.embed_tokens")
    sources["final_norm.scale"] = Source("model.norm.weight", (config.embed_dim,))
    for index, layer in enumerate(config.layers):
        stored = f"model.layers.{index}"
        for norm, tensor in norms.items():
            sources[f"layers.{index}.{norm}.scale"] = Source(
                f"{stored}.{tensor}.weight", (config.embed_dim,)
            )
        sources |= _layer_projections(layer, config.embed_dim, f"layers.{index}", stored)
    return sources


def _layer_projections(
    layer: LayerSpec, embed_dim: int, name: str, stored: str
) -> dict[str, Source]:
    spec, mlp, embed = layer.attention, layer.mlp, (embed_dim,)
    heads, kv_heads = (spec.num_heads, spec.head_dim), (spec.num_kv_heads, spec.head_dim)
    ffn = (mlp.ffn_dim,)
    attention, stored_attention = f"{name}.attention", f"{stored}.self_attn"
    sources: dict[str, Source] = {}
    for member, outputs in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
        sources |= with_bias(
            f"{attention}.{member}",
            f"{stored_attention}.{member}_proj",
            outputs,
            embed,
            spec.qkv_bias,
        )
    sources |= with_bias(
        f"{attention}.out", f"{stored_attention}.o_proj", embed, heads, spec.out_bias
    )
    for member, outputs, inputs in (
        ("gate", ffn, embed),
        ("up", ffn, embed),
        ("down", embed, ffn),
    ):
        sources |= with_bias(
            f"{name}.mlp.{member}", f"{stored}.mlp.{member}_proj", outputs, inputs, mlp.bias
        )
    return sources
