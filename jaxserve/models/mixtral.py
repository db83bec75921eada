"""Mixtral: Mistral with eight MLPs, of which a token takes two."""

from __future__ import annotations

from dataclasses import replace

from jaxserve.config import (
    AttentionSpec,
    ExpertsSpec,
    LayerSpec,
    ModelConfig,
    NormKind,
    NormSpec,
    uniform_layers,
)
from jaxserve.models.family import Family, Source
from jaxserve.models.fields import Fields
from jaxserve.models.gated import read_mlp
from jaxserve.models.rope import read_rope
from jaxserve.models.tensors import IGNORABLE, ExpertNames, projection_sources


def read(fields: Fields) -> ModelConfig:
    """Returns the architecture described by `fields`."""
    embed_dim, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    head_dim = fields.integer("head_dim", max(embed_dim // heads, 1))
    positions = fields.integer("max_position_embeddings", 131_072)
    rope, context = read_rope(fields, head_dim, positions, theta=1e6)
    norm = NormSpec(NormKind.RMS, fields.number("rms_norm_eps", 1e-5))
    attention = AttentionSpec(
        heads,
        fields.integer("num_key_value_heads", 8),
        head_dim,
        rope=rope,
        window=fields.optional_integer("sliding_window"),
    )
    # Of training.
    fields.irrelevant("router_aux_loss_coef", "router_jitter_noise")
    experts = ExpertsSpec(
        fields.integer("num_local_experts", 8), fields.integer("num_experts_per_tok", 2)
    )
    layer = LayerSpec(attention, replace(read_mlp(fields), experts=experts), norm)
    return ModelConfig(
        "mixtral",
        fields.integer("vocab_size"),
        embed_dim,
        uniform_layers(layer, fields.integer("num_hidden_layers")),
        norm,
        context,
        tied=fields.flag("tie_word_embeddings", False),
    )


def sources(config: ModelConfig) -> dict[str, Source]:
    """Returns where every weight comes from."""
    names = ExpertNames("block_sparse_moe", gate="w1", up="w3", down="w2")
    return projection_sources(config, experts=names)


FAMILY = Family("mixtral", ("MixtralForCausalLM",), ("mixtral",), read, sources, IGNORABLE)
