"""DeciLM: Llama whose layers have key heads in different numbers."""

from __future__ import annotations

from jaxserve.config import AttentionSpec, LayerSpec, ModelConfig, NormKind, NormSpec
from jaxserve.errors import ConfigError
from jaxserve.models.family import Family
from jaxserve.models.fields import Fields
from jaxserve.models.gated import read_mlp
from jaxserve.models.rope import read_rope
from jaxserve.models.tensors import IGNORABLE, projection_sources

# How another program computes attention.
_IRRELEVANT = (
    "naive_attention_decode_batched",
    "naive_attention_decode_single",
    "naive_attention_prefill",
    "num_key_value_heads",
    "pretraining_tp",
)


def read(fields: Fields) -> ModelConfig:
    """Returns the architecture described by `fields`."""
    embed_dim, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    head_dim = fields.integer("head_dim", max(embed_dim // heads, 1))
    rope, context = read_rope(fields, head_dim, fields.integer("max_position_embeddings", 2048))
    fields.irrelevant(*_IRRELEVANT)
    fields.only("attention_bias", (False,), "its projections have none")
    count = fields.integer("num_hidden_layers")
    kv_heads = fields.integers("num_key_value_heads_per_layer")
    if len(kv_heads) != count:
        raise ConfigError(
            f"num_key_value_heads_per_layer={list(kv_heads)} must have num_hidden_layers={count} "
            "entries"
        )
    norm, mlp = NormSpec(NormKind.RMS, fields.number("rms_norm_eps", 1e-6)), read_mlp(fields)
    return ModelConfig(
        "decilm",
        fields.integer("vocab_size"),
        embed_dim,
        tuple(
            LayerSpec(AttentionSpec(heads, number, head_dim, rope=rope), mlp, norm)
            for number in kv_heads
        ),
        norm,
        context,
        tied=fields.flag("tie_word_embeddings", False),
    )


FAMILY = Family("decilm", ("DeciLMForCausalLM",), ("deci",), read, projection_sources, IGNORABLE)
