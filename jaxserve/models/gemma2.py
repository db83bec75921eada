"""Gemma 2: norms before and after, soft caps, windows in some layers."""

from __future__ import annotations

import math

from jaxserve.config import (
    AttentionSpec,
    LayerSpec,
    MlpSpec,
    ModelConfig,
    NormKind,
    NormSpec,
)
from jaxserve.models.activations import ACTIVATIONS
from jaxserve.models.family import Family, Source
from jaxserve.models.fields import Fields
from jaxserve.models.rope import read_rope
from jaxserve.models.tensors import IGNORABLE, projection_sources
from jaxserve.models.windows import FULL, SLIDING, windowed_layers


def read(fields: Fields) -> ModelConfig:
    """Returns the architecture described by `fields`."""
    embed_dim = fields.integer("hidden_size")
    fields.only("use_bidirectional_attention", (False,), "it generates left to right")
    norm = NormSpec(NormKind.RMS, fields.number("rms_norm_eps", 1e-6), unit_offset=True)
    attention, context = _attention(fields)
    layer = LayerSpec(attention, _mlp(fields), norm, post_norms=True)
    window = fields.optional_integer("sliding_window", 4096)
    if window is not None:
        fields.only("sliding_window_size", (window,), "sliding_window decides, and differs")
    default = [(SLIDING, FULL)[i % 2] for i in range(fields.integer("num_hidden_layers"))]
    return ModelConfig(
        "gemma2",
        fields.integer("vocab_size"),
        embed_dim,
        windowed_layers(fields, layer, window, default),
        norm,
        context,
        tied=fields.flag("tie_word_embeddings", True),
        embed_scale=math.sqrt(embed_dim),
        logits_soft_cap=fields.optional_number("final_logit_softcapping", 30.0),
    )


def _attention(fields: Fields) -> tuple[AttentionSpec, int]:
    """Returns (attention without a window, the context in tokens)."""
    head_dim = fields.integer("head_dim", 256)
    rope, context = read_rope(fields, head_dim, fields.integer("max_position_embeddings", 8192))
    bias = fields.flag("attention_bias", False)
    spec = AttentionSpec(
        fields.integer("num_attention_heads"),
        fields.integer("num_key_value_heads"),
        head_dim,
        scale=fields.number("query_pre_attn_scalar", 256.0) ** -0.5,
        rope=rope,
        soft_cap=fields.optional_number("attn_logit_softcapping", 50.0),
        qkv_bias=bias,
        out_bias=bias,
    )
    return spec, context


def _mlp(fields: Fields) -> MlpSpec:
    activation = fields.choice("hidden_activation", "gelu_pytorch_tanh", ACTIVATIONS)
    same = tuple(name for name, kind in ACTIVATIONS.items() if kind is activation)
    fields.only("hidden_act", same, "hidden_activation decides, and says otherwise")
    return MlpSpec(fields.integer("intermediate_size"), activation, gated=True)


def sources(config: ModelConfig) -> dict[str, Source]:
    """Returns where every weight comes from."""
    norms = {
        "attention_norm": "input_layernorm",
        "attention_post_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    }
    return projection_sources(config, norms)


FAMILY = Family("gemma2", ("Gemma2ForCausalLM",), ("gemma2",), read, sources, IGNORABLE)
