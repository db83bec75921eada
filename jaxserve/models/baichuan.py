"""Baichuan 2: packed projections and an output head of unit rows; 7B rotates, 13B has ALiBi."""

from __future__ import annotations

from jaxserve.config import (
    AlibiSpec,
    AttentionSpec,
    LayerSpec,
    ModelConfig,
    NormKind,
    NormSpec,
    uniform_layers,
)
from jaxserve.errors import ConfigError
from jaxserve.models.family import Family, Source
from jaxserve.models.fields import Fields
from jaxserve.models.gated import read_mlp
from jaxserve.models.rope import read_rope
from jaxserve.models.tensors import (
    IGNORABLE,
    mlp_sources,
    outer_sources,
    stacked_sources,
    with_bias,
)


def read(fields: Fields) -> ModelConfig:
    """Returns the architecture described by `fields`.

    A config with `model_max_length` in the place of `max_position_embeddings`, as that of 13B,
    has ALiBi.
    """
    embed_dim, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    if embed_dim % heads:
        raise ConfigError(f"num_attention_heads={heads} does not divide hidden_size={embed_dim}")
    head_dim = embed_dim // heads
    if fields.has("max_position_embeddings"):
        fields.irrelevant("model_max_length")
        positions = fields.integer("max_position_embeddings")
        rope, context = read_rope(fields, head_dim, positions)
        attention = AttentionSpec(heads, heads, head_dim, rope=rope)
    else:
        context = fields.integer("model_max_length")
        attention = AttentionSpec(heads, heads, head_dim, alibi=AlibiSpec())
    fields.only("tie_word_embeddings", (False,), "its head is normed and its embedding is not")
    fields.irrelevant("z_loss_weight", "gradient_checkpointing")
    norm = NormSpec(NormKind.RMS, fields.number("rms_norm_eps", 1e-6))
    return ModelConfig(
        "baichuan",
        fields.integer("vocab_size"),
        embed_dim,
        uniform_layers(
            LayerSpec(attention, read_mlp(fields), norm), fields.integer("num_hidden_layers")
        ),
        norm,
        context,
        unit_head=True,
    )


def sources(config: ModelConfig) -> dict[str, Source]:
    """Returns where every weight comes from."""
    embed = (config.embed_dim,)
    found = outer_sources(config)
    for index, layer in enumerate(config.layers):
        spec, name, stored = layer.attention, f"layers.{index}", f"model.layers.{index}"
        heads = (spec.num_heads, spec.head_dim)
        found |= stacked_sources(
            {f"{name}.attention.{member}": heads for member in "qkv"},
            f"{stored}.self_attn.W_pack",
            embed,
        )
        found |= with_bias(
            f"{name}.attention.out", f"{stored}.self_attn.o_proj", embed, heads, False
        )
        found |= mlp_sources(layer.mlp, config.embed_dim, name, stored)
    return found


FAMILY = Family("baichuan", ("BaichuanForCausalLM",), ("baichuan",), read, sources, IGNORABLE)
