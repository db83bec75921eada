"""Gemma 3, text: five layers with a window to one without, each kind with its own rotation."""

from __future__ import annotations

import math
from dataclasses import replace

from jaxserve.config import (
    AttentionSpec,
    LayerSpec,
    MlpSpec,
    ModelConfig,
    NormKind,
    NormSpec,
    RopeSpec,
)
from jaxserve.errors import ConfigError
from jaxserve.models.activations import ACTIVATIONS
from jaxserve.models.family import Family, Source
from jaxserve.models.fields import Fields
from jaxserve.models.rope import rope_of_table
from jaxserve.models.tensors import IGNORABLE, projection_sources
from jaxserve.models.windows import FULL, SLIDING, windowed_layers

# Of layers that see all, and of those with a window.
THETA = {FULL: ("rope_theta", 1e6), SLIDING: ("rope_local_base_freq", 1e4)}


def read(fields: Fields) -> ModelConfig:
    """Returns the architecture described by `fields`."""
    embed_dim = fields.integer("hidden_size")
    fields.only("use_bidirectional_attention", (False,), "it generates left to right")
    norm = NormSpec(NormKind.RMS, fields.number("rms_norm_eps", 1e-6), unit_offset=True)
    head_dim = fields.integer("head_dim", 256)
    ropes, context = _ropes(fields, head_dim)
    attention = replace(_attention(fields, head_dim), rope=ropes[FULL], qk_norm=norm)
    mlp = MlpSpec(
        fields.integer("intermediate_size"),
        fields.choice("hidden_activation", "gelu_pytorch_tanh", ACTIVATIONS),
        gated=True,
    )
    return ModelConfig(
        "gemma3",
        fields.integer("vocab_size"),
        embed_dim,
        _layers(fields, LayerSpec(attention, mlp, norm, post_norms=True), ropes[SLIDING]),
        norm,
        context,
        tied=fields.flag("tie_word_embeddings", True),
        embed_scale=math.sqrt(embed_dim),
        logits_soft_cap=fields.optional_number("final_logit_softcapping"),
    )


def _attention(fields: Fields, head_dim: int) -> AttentionSpec:
    """Returns attention without positions, norms and window."""
    bias = fields.flag("attention_bias", False)
    return AttentionSpec(
        fields.integer("num_attention_heads"),
        fields.integer("num_key_value_heads", 4),
        head_dim,
        scale=fields.number("query_pre_attn_scalar", 256.0) ** -0.5,
        soft_cap=fields.optional_number("attn_logit_softcapping"),
        qkv_bias=bias,
        out_bias=bias,
    )


def _ropes(fields: Fields, head_dim: int) -> tuple[dict[str, RopeSpec], int]:
    """Returns (the rotation of each kind of layer, the context in tokens).

    Transformers 5 keeps `rope_parameters` of each kind; before, `rope_scaling` was that of layers
    without a window.
    """
    context = fields.integer("max_position_embeddings", 131_072)
    both, scaling = fields.table("rope_parameters"), fields.table("rope_scaling")
    if both is not None and scaling is not None:
        raise ConfigError(
            "rope_scaling and rope_parameters are both set; keep one, they mean the same"
        )
    ropes: dict[str, RopeSpec] = {}
    for kind, (name, default) in THETA.items():
        theta = fields.number(name, default)
        table = both.table(kind) if both is not None else scaling if kind == FULL else None
        if table is None:
            ropes[kind] = RopeSpec(head_dim, theta)
            continue
        theta = table.number("rope_theta", theta)
        ropes[kind], _ = rope_of_table(table, head_dim, theta, context)
        table.finish()
    if both is not None:
        both.finish()
    return ropes, context


def _layers(fields: Fields, layer: LayerSpec, sliding: RopeSpec) -> tuple[LayerSpec, ...]:
    """Returns one spec per layer; those with a window have the other rotation."""
    period = fields.integer("sliding_window_pattern", fields.integer("_sliding_window_pattern", 6))
    count = fields.integer("num_hidden_layers")
    default = [SLIDING if (index + 1) % period else FULL for index in range(count)]
    window = fields.optional_integer("sliding_window", 4096)
    return tuple(
        found
        if found.attention.window is None
        else replace(found, attention=replace(found.attention, rope=sliding))
        for found in windowed_layers(fields, layer, window, default)
    )


def sources(config: ModelConfig) -> dict[str, Source]:
    """Returns where every weight comes from."""
    norms = {
        "attention_norm": "input_layernorm",
        "attention_post_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    }
    return projection_sources(config, norms)


FAMILY = Family("gemma3", ("Gemma3ForCausalLM",), ("gemma3_text",), read, sources, IGNORABLE)
