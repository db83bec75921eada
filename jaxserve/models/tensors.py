"""Places of weights in checkpoints whose tensors are [outputs, inputs], as PyTorch keeps them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from jaxserve.config import AttentionSpec, MlpSpec, ModelConfig, NormSpec
from jaxserve.models.family import Source

LLAMA_NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
"""Norms of a block by their names in checkpoints of Llama and of most models since."""

IGNORABLE = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"lm_head\.weight")
"""Tensors without weights of their own in such checkpoints."""


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


@dataclass(frozen=True)
class ExpertNames:
    """How tensors of experts are called: `<layer>.<block>.experts.<number>.<gate>.weight`.

    Attributes:
        block: what a layer calls its experts and their router, which is its `gate`.
        gate, up, down: what an expert calls its projections.
    """

    block: str
    gate: str
    up: str
    down: str


def norm_sources(name: str, tensor: str, spec: NormSpec, size: int) -> dict[str, Source]:
    """Returns sources of a norm over `size` features."""
    sources = {f"{name}.scale": Source(f"{tensor}.weight", (size,))}
    if spec.bias:
        sources[f"{name}.bias"] = Source(f"{tensor}.bias", (size,))
    return sources


def stacked_sources(
    members: dict[str, tuple[int, ...]],
    tensor: str,
    inputs: tuple[int, ...],
    bias: bool = False,
    inputs_first: bool = False,
) -> dict[str, Source]:
    """Returns sources of linear maps whose outputs lie one after the other in one tensor.

    Args:
        members: name -> outputs, in the order in which they lie.
        inputs_first: the tensor is [inputs, outputs].
    """
    total, start = sum(math.prod(outputs) for outputs in members.values()), 0
    sources: dict[str, Source] = {}
    for name, outputs in members.items():
        rows = slice(start, start := start + math.prod(outputs))
        shape = (total, math.prod(inputs))

        def weight(stored: np.ndarray, rows=rows, outputs=outputs) -> np.ndarray:
            outputs_first = stored.T if inputs_first else stored
            return outputs_first[rows].reshape(*outputs, *inputs)

        def vector(stored: np.ndarray, rows=rows, outputs=outputs) -> np.ndarray:
            return stored[rows].reshape(outputs)

        sources[name] = Source(f"{tensor}.weight", shape[::-1] if inputs_first else shape, weight)
        if bias:
            sources[f"{name}.bias"] = Source(f"{tensor}.bias", (total,), vector)
    return sources


def by_group_sources(
    name: str, tensor: str, spec: AttentionSpec, embed_dim: int
) -> dict[str, Source]:
    """Returns sources of q, k and v, fused group by group.

    Rows of the tensor are [K, G + 2, H]: per key head first its G query heads, then key, then
    value; with N key heads that is query, key and value of head after head.
    """
    sources: dict[str, Source] = {}
    for member in ("q", "k", "v"):
        own = f"{name}.{member}"
        sources[own] = _of_group(f"{tensor}.weight", spec, member, (embed_dim,))
        if spec.qkv_bias:
            sources[f"{own}.bias"] = _of_group(f"{tensor}.bias", spec, member, ())
    return sources


def _of_group(tensor: str, spec: AttentionSpec, member: str, inputs: tuple[int, ...]) -> Source:
    groups = spec.num_heads // spec.num_kv_heads
    rows = (spec.num_kv_heads, groups + 2, spec.head_dim)

    def select(fused: np.ndarray) -> np.ndarray:
        by_group = fused.reshape(*rows, *inputs)
        if member == "q":
            return by_group[:, :groups].reshape(spec.num_heads, spec.head_dim, *inputs)
        return by_group[:, groups if member == "k" else groups + 1]

    return Source(tensor, (math.prod(rows), *inputs), select)


def embedding_sources(
    config: ModelConfig, embedding: str, head: str = "lm_head"
) -> dict[str, Source]:
    """Returns sources of the embedding and, where it is not tied, of the output head."""
    table = (config.vocab_size, config.table_dim or config.embed_dim)
    sources = {"embedding": Source(f"{embedding}.weight", table)}
    if not config.tied:
        sources["head"] = Source(f"{head}.weight", table)
    return sources


def projection_sources(
    config: ModelConfig,
    norms: dict[str, str] = LLAMA_NORMS,
    experts: ExpertNames | None = None,
) -> dict[str, Source]:
    """Returns all sources of a model with Llama's tensor names.

    Args:
        norms: norm of a layer -> its name in the checkpoint.
        experts: names in layers that have experts.
    """
    sources = outer_sources(config, norms)
    for index, layer in enumerate(config.layers):
        name, stored = f"layers.{index}", f"model.layers.{index}"
        sources |= _attention(layer.attention, config.embed_dim, name, stored)
        if layer.mlp.experts is None:
            sources |= mlp_sources(layer.mlp, config.embed_dim, name, stored)
        else:
            assert experts is not None
            sources |= _experts(layer.mlp, config.embed_dim, name, stored, experts)
    return sources


def outer_sources(config: ModelConfig, norms: dict[str, str] = LLAMA_NORMS) -> dict[str, Source]:
    """Returns sources of embedding, head and norms with Llama's names; see `projection_sources`."""
    assert config.final_norm is not None
    width = config.embed_dim
    sources = embedding_sources(config, "model.embed_tokens")
    sources |= norm_sources("final_norm", "model.norm", config.final_norm, width)
    for index, layer in enumerate(config.layers):
        for norm, tensor in norms.items():
            sources |= norm_sources(
                f"layers.{index}.{norm}", f"model.layers.{index}.{tensor}", layer.norm, width
            )
    return sources


def _attention(spec: AttentionSpec, embed_dim: int, name: str, stored: str) -> dict[str, Source]:
    embed = (embed_dim,)
    heads, kv_heads = (spec.num_heads, spec.head_dim), (spec.num_kv_heads, spec.head_dim)
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
    if spec.qk_norm is not None:
        for norm in ("q_norm", "k_norm"):
            sources |= norm_sources(
                f"{attention}.{norm}", f"{stored_attention}.{norm}", spec.qk_norm, spec.head_dim
            )
    return sources


def mlp_sources(mlp: MlpSpec, embed_dim: int, name: str, stored: str) -> dict[str, Source]:
    """Returns sources of a gated MLP with Llama's names."""
    embed, ffn = (embed_dim,), (mlp.ffn_dim,)
    sources: dict[str, Source] = {}
    for member, outputs, inputs in (
        ("gate", ffn, embed),
        ("up", ffn, embed),
        ("down", embed, ffn),
    ):
        sources |= with_bias(
            f"{name}.mlp.{member}", f"{stored}.mlp.{member}_proj", outputs, inputs, mlp.bias
        )
    return sources


def _experts(
    mlp: MlpSpec, embed_dim: int, name: str, stored: str, names: ExpertNames
) -> dict[str, Source]:
    assert mlp.experts is not None
    count, block = mlp.experts.count, f"{stored}.{names.block}"
    sources = {f"{name}.mlp.router": Source(f"{block}.gate.weight", (count, embed_dim))}
    for member, tensor, shape in (
        ("gate", names.gate, (mlp.ffn_dim, embed_dim)),
        ("up", names.up, (mlp.ffn_dim, embed_dim)),
        ("down", names.down, (embed_dim, mlp.ffn_dim)),
    ):
        tensors = tuple(f"{block}.experts.{index}.{tensor}.weight" for index in range(count))
        sources[f"{name}.mlp.{member}"] = Source(tensors[0], shape, stacked=tensors)
    return sources
