"""Gemma 1: scales stored less one, heads of 256, embeddings scaled by the root of the width."""

from __future__ import annotations

import math

from jaxserve.config import (
    Activation,
    AttentionSpec,
    LayerSpec,
    MlpSpec,
    ModelConfig,
    NormKind,
    NormSpec,
    uniform_layers,
)
from jaxserve.models.activations import ACTIVATIONS
from jaxserve.models.family import Family
from jaxserve.models.fields import Fields
from jaxserve.models.rope import read_rope
from jaxserve.models.tensors import IGNORABLE, projection_sources

# The first release wrote "gelu" and meant the approximation by tanh.
_ACTIVATIONS = ACTIVATIONS | {"gelu": Activation.GELU_TANH}


def read(fields: Fields) -> ModelConfig:
    """Returns the architecture described by `fields`."""
    embed_dim, head_dim = fields.integer("hidden_size"), fields.integer("head_dim", 256)
    fields.only("use_bidirectional_attention", (False,), "it generates left to right")
    rope, context = read_rope(fields, head_dim, fields.integer("max_position_embeddings", 8192))
    norm = NormSpec(NormKind.RMS, fields.number("rms_norm_eps", 1e-6), unit_offset=True)
    bias = fields.flag("attention_bias", False)
    attention = AttentionSpec(
        fields.integer("num_attention_heads"),
        fields.integer("num_key_value_heads", 16),
        head_dim,
        rope=rope,
        qkv_bias=bias,
        out_bias=bias,
    )
    layer = LayerSpec(attention, _mlp(fields), norm)
    return ModelConfig(
        "gemma",
        fields.integer("vocab_size"),
        embed_dim,
        uniform_layers(layer, fields.integer("num_hidden_layers")),
        norm,
        context,
        tied=fields.flag("tie_word_embeddings", True),
        embed_scale=math.sqrt(embed_dim),
    )


def _mlp(fields: Fields) -> MlpSpec:
    stated = fields.choice("hidden_act", "gelu_pytorch_tanh", _ACTIVATIONS)
    same = next(name for name, kind in ACTIVATIONS.items() if kind is stated)
    # Configs of transformers 4 may have this one besides, and it decides there.
    activation = fields.choice("hidden_activation", same, _ACTIVATIONS)
    return MlpSpec(fields.integer("intermediate_size"), activation, gated=True)


FAMILY = Family("gemma", ("GemmaForCausalLM",), ("gemma",), read, projection_sources, IGNORABLE)
