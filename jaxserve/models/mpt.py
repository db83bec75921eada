"""MPT: ALiBi, LayerNorm without bias, projections that may be clipped."""

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
from jaxserve.errors import ConfigError, UnsupportedError
from jaxserve.models.family import Family, Source
from jaxserve.models.fields import IRRELEVANT, Fields
from jaxserve.models.tensors import embedding_sources, norm_sources, stacked_sources

# Dropout, initialisation, another program's kernels, and labels of published models.
_IRRELEVANT = (
    "resid_pdrop",
    "emb_pdrop",
    "embedding_fraction",
    "init_config",
    "init_device",
    "learned_pos_emb",
    "norm_type",
    "tokenizer_name",
    "verbose",
)


def read(fields: Fields) -> ModelConfig:
    """Returns the architecture described by `fields`."""
    embed_dim = fields.integer("d_model")
    fields.irrelevant(*_IRRELEVANT)
    fields.only("no_bias", (True,), "its projections and norms have none")
    if fields.has("logit_scale"):
        raise UnsupportedError("logit_scale is not supported by the mpt family; leave it out")
    norm = NormSpec(NormKind.LAYER, fields.number("layer_norm_epsilon", 1e-5))
    ffn_dim = embed_dim * fields.integer("expansion_ratio", 4)
    layer = LayerSpec(
        _attention(fields, embed_dim), MlpSpec(ffn_dim, Activation.GELU, gated=False), norm
    )
    return ModelConfig(
        "mpt",
        fields.integer("vocab_size"),
        embed_dim,
        uniform_layers(layer, fields.integer("n_layers")),
        norm,
        fields.integer("max_seq_len", 2048),
        tied=fields.flag("tie_word_embeddings", True),
    )


def _attention(fields: Fields, embed_dim: int) -> AttentionSpec:
    heads = fields.integer("n_heads")
    if embed_dim % heads:
        raise ConfigError(f"n_heads={heads} does not divide d_model={embed_dim}")
    scale = clip = None
    if (table := fields.table("attn_config")) is not None:
        # Some saved it as a config of its own, with all that has.
        table.irrelevant(*IRRELEVANT, "attn_impl", "attn_pdrop", "id2label", "label2id")
        table.only("is_encoder_decoder", (False,), "it generates left to right")
        table.only("attn_type", ("multihead_attention",), "every head has its own keys")
        table.only("alibi", (True,), "positions are ALiBi's")
        table.only("alibi_bias_max", (8,), "slopes begin at a half")
        for name in ("prefix_lm", "qk_ln", "attn_uses_sequence_id"):
            table.only(name, (False,), "no published MPT has it")
        scale, clip = table.optional_number("softmax_scale"), table.optional_number("clip_qkv")
        table.finish()
    return AttentionSpec(
        heads, heads, embed_dim // heads, scale=scale, alibi=AlibiSpec(), qkv_clip=clip
    )


def sources(config: ModelConfig) -> dict[str, Source]:
    """Returns where every weight comes from."""
    assert config.final_norm is not None
    width = config.embed_dim
    found = embedding_sources(config, "transformer.wte")
    found |= norm_sources("final_norm", "transformer.norm_f", config.final_norm, width)
    for index, layer in enumerate(config.layers):
        found |= _layer(layer, width, f"layers.{index}", f"transformer.blocks.{index}")
    return found


def _layer(layer: LayerSpec, embed_dim: int, name: str, stored: str) -> dict[str, Source]:
    spec, ffn, embed = layer.attention, (layer.mlp.ffn_dim,), (embed_dim,)
    heads = (spec.num_heads, spec.head_dim)
    sources = norm_sources(f"{name}.attention_norm", f"{stored}.norm_1", layer.norm, embed_dim)
    sources |= norm_sources(f"{name}.mlp_norm", f"{stored}.norm_2", layer.norm, embed_dim)
    attention, mlp = f"{name}.attention", f"{name}.mlp"
    for members, tensor, inputs in (
        ({f"{attention}.{member}": heads for member in "qkv"}, "attn.Wqkv", embed),
        ({f"{attention}.out": embed}, "attn.out_proj", heads),
        ({f"{mlp}.up": ffn}, "ffn.up_proj", embed),
        ({f"{mlp}.down": embed}, "ffn.down_proj", ffn),
    ):
        sources |= stacked_sources(members, f"{stored}.{tensor}", inputs)
    return sources


FAMILY = Family(
    "mpt", ("MPTForCausalLM", "MptForCausalLM"), ("mpt",), read, sources, (r"lm_head\.weight",)
)
