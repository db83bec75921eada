"""Phi-3, 3.5 and 4: projections fused in two tensors, rotation stretched by `longrope`."""

from __future__ import annotations

from jaxserve.config import (
    AttentionSpec,
    LayerSpec,
    ModelConfig,
    NormKind,
    NormSpec,
    uniform_layers,
)
from jaxserve.models.family import Family, Source
from jaxserve.models.fields import Fields
from jaxserve.models.gated import read_mlp
from jaxserve.models.rope import read_rope
from jaxserve.models.tensors import IGNORABLE, outer_sources, stacked_sources, with_bias


def read(fields: Fields) -> ModelConfig:
    """Returns the architecture described by `fields`."""
    embed_dim, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    head_dim = fields.integer("head_dim", max(embed_dim // heads, 1))
    positions = fields.integer("max_position_embeddings", 4096)
    fields.only("attention_bias", (False,), "its projections have none")
    # Says nothing where nothing is stretched.
    original = fields.optional_integer("original_max_position_embeddings")
    rope, context = read_rope(fields, head_dim, positions, partial=1.0, original=original)
    norm = NormSpec(NormKind.RMS, fields.number("rms_norm_eps", 1e-5))
    attention = AttentionSpec(
        heads,
        fields.integer("num_key_value_heads", heads),
        head_dim,
        rope=rope,
        window=fields.optional_integer("sliding_window"),
    )
    # Dropout of training.
    fields.irrelevant("resid_pdrop", "embd_pdrop")
    return ModelConfig(
        "phi3",
        fields.integer("vocab_size"),
        embed_dim,
        uniform_layers(
            LayerSpec(attention, read_mlp(fields), norm), fields.integer("num_hidden_layers")
        ),
        norm,
        context,
        tied=fields.flag("tie_word_embeddings", False),
    )


def sources(config: ModelConfig) -> dict[str, Source]:
    """Returns where every weight comes from."""
    found = outer_sources(config)
    for index, layer in enumerate(config.layers):
        name, stored = f"layers.{index}", f"model.layers.{index}"
        found |= _projections(layer, config.embed_dim, name, stored)
    return found


def _projections(layer: LayerSpec, embed_dim: int, name: str, stored: str) -> dict[str, Source]:
    spec, ffn, embed = layer.attention, (layer.mlp.ffn_dim,), (embed_dim,)
    heads, kv_heads = (spec.num_heads, spec.head_dim), (spec.num_kv_heads, spec.head_dim)
    qkv = dict(zip("qkv", (heads, kv_heads, kv_heads), strict=True))
    return {
        **stacked_sources(
            {f"{name}.attention.{member}": outputs for member, outputs in qkv.items()},
            f"{stored}.self_attn.qkv_proj",
            embed,
        ),
        **with_bias(f"{name}.attention.out", f"{stored}.self_attn.o_proj", embed, heads, False),
        **stacked_sources(
            {f"{name}.mlp.gate": ffn, f"{name}.mlp.up": ffn}, f"{stored}.mlp.gate_up_proj", embed
        ),
        **with_bias(f"{name}.mlp.down", f"{stored}.mlp.down_proj", embed, ffn, False),
    }


FAMILY = Family("phi3", ("Phi3ForCausalLM",), ("phi3",), read, sources, IGNORABLE)
