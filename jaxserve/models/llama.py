"""Llama 1, 2, 3, 3.1 and 3.2, and what is built like them (Vicuna, CodeLlama, Yi, ...)."""

from __future__ import annotations

from jaxserve.config import (
    AttentionSpec,
    LayerSpec,
    MlpSpec,
    ModelConfig,
    NormKind,
    NormSpec,
    uniform_layers,
)
from jaxserve.models.activations import ACTIVATIONS
from jaxserve.models.family import Family, Source
from jaxserve.models.fields import Fields
from jaxserve.models.rope import read_rope
from jaxserve.models.tensors import IGNORABLE, projection_sources


def read(fields: Fields) -> ModelConfig:
    """Returns the architecture described by `fields`."""
    embed_dim, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    head_dim = fields.integer("head_dim", max(embed_dim // heads, 1))
    rope, context = read_rope(fields, head_dim, fields.integer("max_position_embeddings", 2048))
    # Early fine-tunes for long contexts state the stretched length here.
    context = max(context, fields.integer("max_sequence_length", context))
    # Splits sums differently and nothing else.
    fields.irrelevant("pretraining_tp")
    attention_bias = fields.flag("attention_bias", False)
    norm = NormSpec(NormKind.RMS, fields.number("rms_norm_eps", 1e-6))
    layer = LayerSpec(
        attention=AttentionSpec(
            heads,
            fields.integer("num_key_value_heads", heads),
            head_dim,
            rope=rope,
            qkv_bias=attention_bias,
            out_bias=attention_bias,
        ),
        mlp=MlpSpec(
            fields.integer("intermediate_size"),
            fields.choice("hidden_act", "silu", ACTIVATIONS),
            gated=True,
            bias=fields.flag("mlp_bias", False),
        ),
        norm=norm,
    )
    return ModelConfig(
        "llama",
        fields.integer("vocab_size"),
        embed_dim,
        uniform_layers(layer, fields.integer("num_hidden_layers")),
        norm,
        context,
        tied=fields.flag("tie_word_embeddings", False),
    )


def sources(config: ModelConfig) -> dict[str, Source]:
    """Returns where every weight comes from."""
    return projection_sources(config)


FAMILY = Family("llama", ("LlamaForCausalLM",), ("llama",), read, sources, IGNORABLE)
