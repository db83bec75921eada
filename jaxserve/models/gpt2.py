"""GPT-2 and Cerebras-GPT: learned positions, LayerNorm, weights stored inputs first."""

from __future__ import annotations

from dataclasses import replace

from jaxserve.config import (
    AttentionSpec,
    LayerSpec,
    MlpSpec,
    ModelConfig,
    NormKind,
    NormSpec,
)
from jaxserve.errors import ConfigError
from jaxserve.models.activations import ACTIVATIONS
from jaxserve.models.family import Family, Source
from jaxserve.models.fields import Fields
from jaxserve.models.tensors import embedding_sources, norm_sources, stacked_sources

# Dropout, a head for classification, and an order of multiplications.
_IRRELEVANT = (
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
    "summary_type",
    "summary_use_proj",
    "summary_activation",
    "summary_proj_to_labels",
    "summary_first_dropout",
    "reorder_and_upcast_attn",
    "task_specific_params",
)


def read(fields: Fields) -> ModelConfig:
    """Returns the architecture described by `fields`."""
    embed_dim, positions = fields.integer("n_embd"), fields.integer("n_positions", 1024)
    fields.only("n_ctx", (positions,), "n_positions says otherwise")
    fields.irrelevant(*_IRRELEVANT)
    norm = NormSpec(NormKind.LAYER, fields.number("layer_norm_epsilon", 1e-5), bias=True)
    mlp = MlpSpec(
        fields.integer("n_inner", 4 * embed_dim),
        fields.choice("activation_function", "gelu_new", ACTIVATIONS),
        gated=False,
        bias=True,
    )
    return ModelConfig(
        "gpt2",
        fields.integer("vocab_size"),
        embed_dim,
        _layers(fields, LayerSpec(_attention(fields, embed_dim), mlp, norm)),
        norm,
        positions,
        tied=fields.flag("tie_word_embeddings", True),
        num_positions=positions,
    )


def _attention(fields: Fields, embed_dim: int) -> AttentionSpec:
    heads = fields.integer("n_head")
    if embed_dim % heads:
        raise ConfigError(f"n_head={heads} does not divide n_embd={embed_dim}; heads share it")
    head_dim = embed_dim // heads
    scale = None if fields.flag("scale_attn_weights", True) else 1.0
    return AttentionSpec(heads, heads, head_dim, scale=scale, qkv_bias=True, out_bias=True)


def _layers(fields: Fields, layer: LayerSpec) -> tuple[LayerSpec, ...]:
    """Returns one spec per layer; scores may shrink from layer to layer."""
    count = fields.integer("n_layer")
    if not fields.flag("scale_attn_by_inverse_layer_idx", False):
        return (layer,) * count
    spec = layer.attention
    scales = (spec.score_scale / (index + 1) for index in range(count))
    return tuple(replace(layer, attention=replace(spec, scale=scale)) for scale in scales)


def sources(config: ModelConfig) -> dict[str, Source]:
    """Returns where every weight comes from."""
    assert config.final_norm is not None and config.num_positions is not None
    width = config.embed_dim
    found = embedding_sources(config, "transformer.wte")
    found["entrance.positions.table"] = Source(
        "transformer.wpe.weight", (config.num_positions, width)
    )
    found |= norm_sources("final_norm", "transformer.ln_f", config.final_norm, width)
    for index, layer in enumerate(config.layers):
        found |= _layer(layer, width, f"layers.{index}", f"transformer.h.{index}")
    return found


def _layer(layer: LayerSpec, embed_dim: int, name: str, stored: str) -> dict[str, Source]:
    spec, ffn, embed = layer.attention, (layer.mlp.ffn_dim,), (embed_dim,)
    heads = (spec.num_heads, spec.head_dim)
    sources = norm_sources(f"{name}.attention_norm", f"{stored}.ln_1", layer.norm, embed_dim)
    sources |= norm_sources(f"{name}.mlp_norm", f"{stored}.ln_2", layer.norm, embed_dim)
    attention, mlp = f"{name}.attention", f"{name}.mlp"
    for members, tensor, inputs in (
        ({f"{attention}.{member}": heads for member in "qkv"}, "attn.c_attn", embed),
        ({f"{attention}.out": embed}, "attn.c_proj", heads),
        ({f"{mlp}.up": ffn}, "mlp.c_fc", embed),
        ({f"{mlp}.down": embed}, "mlp.c_proj", ffn),
    ):
        sources |= stacked_sources(
            members, f"{stored}.{tensor}", inputs, bias=True, inputs_first=True
        )
    return sources


FAMILY = Family(
    "gpt2",
    ("GPT2LMHeadModel",),
    ("gpt2",),
    read,
    sources,
    # Masks that early checkpoints have beside the weights.
    (r"transformer\.h\.\d+\.attn\.(masked_)?bias", r"lm_head\.weight"),
    base="transformer.",
)
