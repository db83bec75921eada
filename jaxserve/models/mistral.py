"""Mistral: Llama with a window of the newest tokens in every layer, or without."""

from __future__ import annotations

from jaxserve.config import (
    AttentionSpec,
    LayerSpec,
    ModelConfig,
    NormKind,
    NormSpec,
    uniform_layers,
)
from jaxserve.models.family import Family
from jaxserve.models.fields import Fields
from jaxserve.models.gated import read_mlp
from jaxserve.models.rope import read_rope
from jaxserve.models.tensors import IGNORABLE, projection_sources


def read(fields: Fields) -> ModelConfig:
    """Returns the architecture described by `fields`."""
    embed_dim, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    head_dim = fields.integer("head_dim", max(embed_dim // heads, 1))
    positions = fields.integer("max_position_embeddings", 131_072)
    rope, context = read_rope(fields, head_dim, positions)
    norm = NormSpec(NormKind.RMS, fields.number("rms_norm_eps", 1e-6))
    attention = AttentionSpec(
        heads,
        fields.integer("num_key_value_heads", 8),
        head_dim,
        rope=rope,
        window=fields.optional_integer("sliding_window", 4096),
    )
    layer = LayerSpec(attention, read_mlp(fields), norm)
    return ModelConfig(
        "mistral",
        fields.integer("vocab_size"),
        embed_dim,
        uniform_layers(layer, fields.integer("num_hidden_layers")),
        norm,
        context,
        tied=fields.flag("tie_word_embeddings", False),
    )


FAMILY = Family(
    "mistral", ("MistralForCausalLM",), ("mistral",), read, projection_sources, IGNORABLE
)
