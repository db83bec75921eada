"""BLOOM: ALiBi, a norm behind the embedding, queries, keys and values fused head by head."""

from __future__ import annotations

from jaxserve.config import (
    Activation,
    AlibiSpec,
    AttentionSpec,
    LayerSpec,
    MlpSpec,
    ModelConfig,
    NormKind,
    NormSpec,
    uniform_layers,
)
from jaxserve.errors import ConfigError
from jaxserve.models.family import Family, Source
from jaxserve.models.fields import Fields
from jaxserve.models.tensors import (
    LLAMA_NORMS,
    by_group_sources,
    embedding_sources,
    norm_sources,
    with_bias,
)


def read(fields: Fields) -> ModelConfig:
    """Returns the architecture described by `fields`."""
    embed_dim = fields.integer("hidden_size", fields.integer("n_embed", 64))
    heads = fields.integer("n_head", fields.integer("num_attention_heads", 8))
    if embed_dim % heads:
        raise ConfigError(f"n_head={heads} does not divide hidden_size={embed_dim}")
    fields.only("apply_residual_connection_post_layernorm", (False,), "no published BLOOM has it")
    # How another program splits and rounds sums.
    fields.irrelevant("pretraining_tp", "slow_but_exact", "skip_bias_add", "skip_bias_add_qkv")
    fields.irrelevant("attention_softmax_in_fp32", "masked_softmax_fusion", "bias_dropout_fusion")
    fields.irrelevant("offset_alibi", "unk_token_id")
    context = fields.integer("seq_length", 2048)
    norm = NormSpec(NormKind.LAYER, fields.number("layer_norm_epsilon", 1e-5), bias=True)
    attention = AttentionSpec(
        heads, heads, embed_dim // heads, alibi=AlibiSpec(), qkv_bias=True, out_bias=True
    )
    mlp = MlpSpec(4 * embed_dim, Activation.GELU_TANH, gated=False, bias=True)
    return ModelConfig(
        "bloom",
        fields.integer("vocab_size"),
        embed_dim,
        uniform_layers(
            LayerSpec(attention, mlp, norm),
            fields.integer("n_layer", fields.integer("num_hidden_layers", 2)),
        ),
        norm,
        context,
        tied=fields.flag("tie_word_embeddings", True),
        embed_norm=norm,
    )


def sources(config: ModelConfig) -> dict[str, Source]:
    """Returns where every weight comes from."""
    assert config.final_norm is not None and config.embed_norm is not None
    width = config.embed_dim
    found = embedding_sources(config, "transformer.word_embeddings")
    found |= norm_sources(
        "entrance.norm", "transformer.word_embeddings_layernorm", config.embed_norm, width
    )
    found |= norm_sources("final_norm", "transformer.ln_f", config.final_norm, width)
    for index, layer in enumerate(config.layers):
        found |= _layer(layer, width, f"layers.{index}", f"transformer.h.{index}")
    return found


def _layer(layer: LayerSpec, embed_dim: int, name: str, stored: str) -> dict[str, Source]:
    spec, ffn, embed = layer.attention, (layer.mlp.ffn_dim,), (embed_dim,)
    heads = (spec.num_heads, spec.head_dim)
    sources: dict[str, Source] = {}
    for norm, tensor in LLAMA_NORMS.items():
        sources |= norm_sources(f"{name}.{norm}", f"{stored}.{tensor}", layer.norm, embed_dim)
    fused = f"{stored}.self_attention.query_key_value"
    sources |= by_group_sources(f"{name}.attention", fused, spec, embed_dim)
    for own, tensor, outputs, inputs in (
        ("attention.out", "self_attention.dense", embed, heads),
        ("mlp.up", "mlp.dense_h_to_4h", ffn, embed),
        ("mlp.down", "mlp.dense_4h_to_h", embed, ffn),
    ):
        sources |= with_bias(f"{name}.{own}", f"{stored}.{tensor}", outputs, inputs, True)
    return sources


FAMILY = Family(
    "bloom",
    ("BloomForCausalLM",),
    ("bloom",),
    read,
    sources,
    (r"lm_head\.weight",),
    base="transformer.",
)
