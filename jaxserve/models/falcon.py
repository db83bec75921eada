"""Falcon: 7B (one key head), 40B and 180B (groups, two norms), 11B, and RW (ALiBi, serial)."""

from __future__ import annotations

import math

from jaxserve.config import (
    AlibiSpec,
    AttentionSpec,
    BlockKind,
    LayerSpec,
    MlpSpec,
    ModelConfig,
    NormKind,
    NormSpec,
    RopeScaling,
    RopeSpec,
    uniform_layers,
)
from jaxserve.errors import ConfigError, UnsupportedError
from jaxserve.models.activations import ACTIVATIONS
from jaxserve.models.family import Family, Source
from jaxserve.models.fields import Fields
from jaxserve.models.rope import read_rope
from jaxserve.models.tensors import by_group_sources, embedding_sources, norm_sources, with_bias


def read(fields: Fields) -> ModelConfig:
    """Returns the architecture described by `fields`."""
    embed_dim = fields.integer("hidden_size")
    fields.only("apply_residual_connection_post_layernorm", (False,), "no published Falcon has it")
    bias = fields.flag("bias", False)
    norm = NormSpec(NormKind.LAYER, fields.number("layer_norm_epsilon", 1e-5), bias=True)
    block, mlp_norm = _block(fields)
    attention, context = _attention(fields, embed_dim, bias)
    mlp = MlpSpec(
        _ffn_dim(fields, embed_dim),
        fields.choice("activation", "gelu", ACTIVATIONS),
        gated=False,
        bias=bias,
    )
    layer = LayerSpec(attention, mlp, norm, block, mlp_norm)
    return ModelConfig(
        "falcon",
        fields.integer("vocab_size"),
        embed_dim,
        uniform_layers(layer, fields.integer("num_hidden_layers")),
        norm,
        context,
        tied=fields.flag("tie_word_embeddings", True),
    )


def _block(fields: Fields) -> tuple[BlockKind, bool]:
    """Returns (kind of block, whether the MLP has a norm of its own)."""
    grouped = fields.flag("new_decoder_architecture", False)
    parallel = fields.flag("parallel_attn", True)
    norms = fields.integer("num_ln_in_parallel_attn", 2 if grouped else 1)
    if not parallel:
        if grouped:
            raise UnsupportedError(
                "parallel_attn=False with new_decoder_architecture=True is not supported by the "
                "falcon family: that architecture is parallel; set parallel_attn to true"
            )
        return BlockKind.SERIAL, True
    if norms > 2 or (norms == 2 and not grouped):
        raise UnsupportedError(
            f"num_ln_in_parallel_attn={norms} with new_decoder_architecture={grouped} is not "
            "supported by the falcon family; it must be 1, or 2 in the new architecture"
        )
    return BlockKind.PARALLEL, norms == 2


def _attention(fields: Fields, embed_dim: int, bias: bool) -> tuple[AttentionSpec, int]:
    """Returns (attention, the context in tokens)."""
    heads = fields.integer("num_attention_heads")
    if embed_dim % heads:
        raise ConfigError(
            f"num_attention_heads={heads} does not divide hidden_size={embed_dim}; "
            "falcon heads share the width evenly"
        )
    head_dim = embed_dim // heads
    rope, alibi, context = _positions(fields, head_dim)
    spec = AttentionSpec(
        heads,
        _kv_heads(fields, heads),
        head_dim,
        rope=rope,
        alibi=alibi,
        qkv_bias=bias,
        out_bias=bias,
    )
    return spec, context


def _positions(fields: Fields, head_dim: int) -> tuple[RopeSpec | None, AlibiSpec | None, int]:
    """Returns (rotary embedding or None, ALiBi or None, the context in tokens)."""
    rope, context = read_rope(fields, head_dim, fields.integer("max_position_embeddings", 2048))
    if not fields.flag("alibi", False):
        return rope, None, context
    if rope.scaling is not RopeScaling.NONE:
        raise UnsupportedError(
            f"rope scaling {rope.scaling.value!r} with alibi=True is not supported: "
            "ALiBi models rotate nothing; remove one"
        )
    # The bias is added before scores are scaled, and was trained in bfloat16.
    return None, AlibiSpec(scale=1.0 / math.sqrt(head_dim), bfloat16=True), context


def _kv_heads(fields: Fields, heads: int) -> int:
    if fields.flag("new_decoder_architecture", False):
        fields.irrelevant("multi_query")
        return fields.integer("num_kv_heads", heads)
    # The older architecture has 1 or N; its configs carry the field with either value.
    if fields.flag("multi_query", True):
        fields.only("num_kv_heads", (1, heads), "multi_query means one key head")
        return 1
    fields.only("num_kv_heads", (heads,), "without multi_query every head has its own keys")
    return heads


def _ffn_dim(fields: Fields, embed_dim: int) -> int:
    ffn_dim = fields.integer("ffn_hidden_size", 4 * embed_dim)
    fields.only("ff_factor", (ffn_dim / embed_dim,), "ffn_hidden_size says otherwise")
    return ffn_dim


def sources(config: ModelConfig) -> dict[str, Source]:
    """Returns where every weight comes from."""
    found = embedding_sources(config, "transformer.word_embeddings")
    assert config.final_norm is not None
    found |= norm_sources("final_norm", "transformer.ln_f", config.final_norm, config.embed_dim)
    for index, layer in enumerate(config.layers):
        found |= _layer(layer, config.embed_dim, f"layers.{index}", f"transformer.h.{index}")
    return found


def _layer(layer: LayerSpec, embed_dim: int, name: str, stored: str) -> dict[str, Source]:
    spec, mlp, embed = layer.attention, layer.mlp, (embed_dim,)
    heads, ffn = (spec.num_heads, spec.head_dim), (mlp.ffn_dim,)
    sources: dict[str, Source] = {}
    for norm, tensor in _norm_names(layer).items():
        sources |= norm_sources(f"{name}.{norm}", f"{stored}.{tensor}", layer.norm, embed_dim)
    fused = f"{stored}.self_attention.query_key_value"
    sources |= by_group_sources(f"{name}.attention", fused, spec, embed_dim)
    sources |= with_bias(
        f"{name}.attention.out", f"{stored}.self_attention.dense", embed, heads, spec.out_bias
    )
    sources |= with_bias(f"{name}.mlp.up", f"{stored}.mlp.dense_h_to_4h", ffn, embed, mlp.bias)
    sources |= with_bias(f"{name}.mlp.down", f"{stored}.mlp.dense_4h_to_h", embed, ffn, mlp.bias)
    return sources


def _norm_names(layer: LayerSpec) -> dict[str, str]:
    """Returns norm of a layer -> its name in the checkpoint."""
    if layer.block is BlockKind.SERIAL:
        return {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if layer.mlp_norm:
        return {"attention_norm": "ln_attn", "mlp_norm": "ln_mlp"}
    return {"attention_norm": "input_layernorm"}


FAMILY = Family(
    "falcon",
    ("FalconForCausalLM",),
    ("falcon",),
    read,
    sources,
    (r"transformer\.h\.\d+\.self_attention\.rotary_emb\.inv_freq", r"lm_head\.weight"),
)
