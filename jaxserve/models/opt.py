"""OPT: learned positions from row 2 on; the 350M norms sums and has embeddings of another width."""

from __future__ import annotations

import numpy as np

from jaxserve.config import (
    AttentionSpec,
    LayerSpec,
    MlpSpec,
    ModelConfig,
    NormKind,
    NormPlace,
    NormSpec,
    uniform_layers,
)
from jaxserve.errors import ConfigError
from jaxserve.models.activations import ACTIVATIONS
from jaxserve.models.family import Family, Source
from jaxserve.models.fields import Fields
from jaxserve.models.tensors import embedding_sources, norm_sources, reshaped, with_bias

OFFSET = 2
"""Rows of the table of positions that belong to none."""


def read(fields: Fields) -> ModelConfig:
    """Returns the architecture described by `fields`."""
    embed_dim = fields.integer("hidden_size")
    positions = fields.integer("max_position_embeddings", 2048)
    fields.only("layer_norm_elementwise_affine", (True,), "norms without weights are no OPT's")
    fields.only("layerdrop", (0.0, 0), "all layers are computed")
    fields.irrelevant("dropout", "activation_dropout", "init_std", "prefix")
    # Biases are of all projections or of none.
    bias = fields.flag("enable_bias", True)
    norm = NormSpec(NormKind.LAYER, 1e-5, bias=True)
    before = fields.flag("do_layer_norm_before", True)
    no_final = fields.flag("_remove_final_layer_norm", False) or not before
    mlp = MlpSpec(
        fields.integer("ffn_dim"),
        fields.choice("activation_function", "relu", ACTIVATIONS),
        gated=False,
        bias=bias,
    )
    place = NormPlace.INPUT if before else NormPlace.SUM
    layer = LayerSpec(_attention(fields, embed_dim, bias), mlp, norm, norm_place=place)
    table_dim = fields.integer("word_embed_proj_dim", embed_dim)
    return ModelConfig(
        "opt",
        fields.integer("vocab_size"),
        embed_dim,
        uniform_layers(layer, fields.integer("num_hidden_layers")),
        None if no_final else norm,
        positions,
        tied=fields.flag("tie_word_embeddings", True),
        num_positions=positions,
        table_dim=None if table_dim == embed_dim else table_dim,
    )


def _attention(fields: Fields, embed_dim: int, bias: bool) -> AttentionSpec:
    heads = fields.integer("num_attention_heads")
    if embed_dim % heads:
        raise ConfigError(
            f"num_attention_heads={heads} does not divide hidden_size={embed_dim}; "
            "opt heads share the width evenly"
        )
    return AttentionSpec(heads, heads, embed_dim // heads, qkv_bias=bias, out_bias=bias)


def sources(config: ModelConfig) -> dict[str, Source]:
    """Returns where every weight comes from."""
    assert config.num_positions is not None
    width = config.embed_dim
    found = embedding_sources(config, "model.decoder.embed_tokens")
    found["entrance.positions.table"] = Source(
        "model.decoder.embed_positions.weight", (config.num_positions + OFFSET, width), _positions
    )
    if config.table_dim is not None:
        table, embed = (config.table_dim,), (width,)
        found["widening.inward"] = reshaped("model.decoder.project_in.weight", embed, table)
        found["widening.outward"] = reshaped("model.decoder.project_out.weight", table, embed)
    if config.final_norm is not None:
        tensor = "model.decoder.final_layer_norm"
        found |= norm_sources("final_norm", tensor, config.final_norm, width)
    for index, layer in enumerate(config.layers):
        found |= _layer(layer, width, f"layers.{index}", f"model.decoder.layers.{index}")
    return found


def _positions(table: np.ndarray) -> np.ndarray:
    return table[OFFSET:]


def _layer(layer: LayerSpec, embed_dim: int, name: str, stored: str) -> dict[str, Source]:
    spec, ffn, embed = layer.attention, (layer.mlp.ffn_dim,), (embed_dim,)
    heads = (spec.num_heads, spec.head_dim)
    sources: dict[str, Source] = {}
    norms = {"attention_norm": "self_attn_layer_norm", "mlp_norm": "final_layer_norm"}
    for norm, tensor in norms.items():
        sources |= norm_sources(f"{name}.{norm}", f"{stored}.{tensor}", layer.norm, embed_dim)
    for own, tensor, outputs, inputs in (
        ("attention.q", "self_attn.q_proj", heads, embed),
        ("attention.k", "self_attn.k_proj", heads, embed),
        ("attention.v", "self_attn.v_proj", heads, embed),
        ("attention.out", "self_attn.out_proj", embed, heads),
        ("mlp.up", "fc1", ffn, embed),
        ("mlp.down", "fc2", embed, ffn),
    ):
        sources |= with_bias(f"{name}.{own}", f"{stored}.{tensor}", outputs, inputs, spec.qkv_bias)
    return sources


FAMILY = Family(
    "opt",
    ("OPTForCausalLM",),
    ("opt",),
    read,
    sources,
    (r"lm_head\.weight",),
    base="model.",
)
