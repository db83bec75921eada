"""Qwen 3: norms over each query and key head, whose size does not follow from the width."""

from __future__ import annotations

from jaxserve.config import AttentionSpec, LayerSpec, ModelConfig, NormKind, NormSpec
from jaxserve.models.family import Family
from jaxserve.models.fields import Fields
from jaxserve.models.gated import read_mlp
from jaxserve.models.qwen2 import upper_windows
from jaxserve.models.rope import read_rope
from jaxserve.models.tensors import IGNORABLE, projection_sources


def read(fields: Fields) -> ModelConfig:
    """Returns the architecture described by `fields`."""
    attention, norm, context = read_attention(fields, num_kv_heads=32)
    return ModelConfig(
        "qwen3",
        fields.integer("vocab_size"),
        fields.integer("hidden_size"),
        upper_windows(fields, LayerSpec(attention, read_mlp(fields), norm)),
        norm,
        context,
        tied=fields.flag("tie_word_embeddings", False),
    )


def read_attention(fields: Fields, num_kv_heads: int) -> tuple[AttentionSpec, NormSpec, int]:
    """Returns (attention without a window, the norm used everywhere, the context in tokens)."""
    head_dim = fields.integer("head_dim", 128)
    rope, context = read_rope(fields, head_dim, fields.integer("max_position_embeddings", 32_768))
    norm = NormSpec(NormKind.RMS, fields.number("rms_norm_eps", 1e-6))
    bias = fields.flag("attention_bias", False)
    spec = AttentionSpec(
        fields.integer("num_attention_heads"),
        fields.integer("num_key_value_heads", num_kv_heads),
        head_dim,
        rope=rope,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=norm,
    )
    return spec, norm, context


FAMILY = Family("qwen3", ("Qwen3ForCausalLM",), ("qwen3",), read, projection_sources, IGNORABLE)
