"""Qwen 2 and 2.5: biases on queries, keys and values alone; windows in the upper layers."""

from __future__ import annotations

from jaxserve.config import AttentionSpec, LayerSpec, ModelConfig, NormKind, NormSpec
from jaxserve.models.family import Family
from jaxserve.models.fields import Fields
from jaxserve.models.gated import read_mlp
from jaxserve.models.rope import read_rope
from jaxserve.models.tensors import IGNORABLE, projection_sources
from jaxserve.models.windows import FULL, SLIDING, windowed_layers


def read(fields: Fields) -> ModelConfig:
    """Returns the architecture described by `fields`."""
    embed_dim, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    head_dim = fields.integer("head_dim", max(embed_dim // heads, 1))
    rope, context = read_rope(fields, head_dim, fields.integer("max_position_embeddings", 32_768))
    norm = NormSpec(NormKind.RMS, fields.number("rms_norm_eps", 1e-6))
    attention = AttentionSpec(
        heads, fields.integer("num_key_value_heads", 32), head_dim, rope=rope, qkv_bias=True
    )
    return ModelConfig(
        "qwen2",
        fields.integer("vocab_size"),
        embed_dim,
        upper_windows(fields, LayerSpec(attention, read_mlp(fields), norm)),
        norm,
        context,
        tied=fields.flag("tie_word_embeddings", False),
    )


def upper_windows(fields: Fields, layer: LayerSpec) -> tuple[LayerSpec, ...]:
    """Returns the layers: those from `max_window_layers` on slide, if any do."""
    window = fields.optional_integer("sliding_window", 4096)
    if not fields.flag("use_sliding_window", False):
        window = None
    first = fields.count("max_window_layers", 28)
    default = [
        SLIDING if window is not None and index >= first else FULL
        for index in range(fields.integer("num_hidden_layers"))
    ]
    return windowed_layers(fields, layer, window, default)


FAMILY = Family("qwen2", ("Qwen2ForCausalLM",), ("qwen2",), read, projection_sources, IGNORABLE)
