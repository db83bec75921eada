"""GPT-NeoX, Pythia, Dolly and others: attention and MLP side by side, a quarter of a head turns."""

from __future__ import annotations

from jaxserve.config import (
    AttentionSpec,
    BlockKind,
    LayerSpec,
    MlpSpec,
    ModelConfig,
    NormKind,
    NormSpec,
    uniform_layers,
)
from jaxserve.errors import ConfigError
from jaxserve.models.activations import ACTIVATIONS
from jaxserve.models.family import Family, Source
from jaxserve.models.fields import Fields
from jaxserve.models.rope import read_rope
from jaxserve.models.tensors import (
    LLAMA_NORMS,
    by_group_sources,
    embedding_sources,
    norm_sources,
    with_bias,
)


def read(fields: Fields) -> ModelConfig:
    """Returns the architecture described by `fields`."""
    embed_dim = fields.integer("hidden_size")
    attention, context = _attention(fields, embed_dim)
    norm = NormSpec(NormKind.LAYER, fields.number("layer_norm_eps", 1e-5), bias=True)
    mlp = MlpSpec(
        fields.integer("intermediate_size", 4 * embed_dim),
        fields.choice("hidden_act", "gelu", ACTIVATIONS),
        gated=False,
        bias=True,
    )
    parallel = fields.flag("use_parallel_residual", True)
    block = BlockKind.PARALLEL if parallel else BlockKind.SERIAL
    return ModelConfig(
        "gpt_neox",
        fields.integer("vocab_size"),
        embed_dim,
        uniform_layers(LayerSpec(attention, mlp, norm, block), fields.integer("num_hidden_layers")),
        norm,
        context,
        tied=fields.flag("tie_word_embeddings", False),
    )


def _attention(fields: Fields, embed_dim: int) -> tuple[AttentionSpec, int]:
    """Returns (attention, the context in tokens)."""
    heads = fields.integer("num_attention_heads")
    if embed_dim % heads:
        raise ConfigError(
            f"num_attention_heads={heads} does not divide hidden_size={embed_dim}; "
            "gpt_neox heads share the width evenly"
        )
    head_dim = embed_dim // heads
    rope, context = read_rope(
        fields,
        head_dim,
        fields.integer("max_position_embeddings", 2048),
        # As transformers 4 named these two.
        theta=fields.number("rotary_emb_base", 10_000.0),
        partial=fields.number("rotary_pct", 0.25),
    )
    bias = fields.flag("attention_bias", True)
    spec = AttentionSpec(heads, heads, head_dim, rope=rope, qkv_bias=bias, out_bias=bias)
    return spec, context


def sources(config: ModelConfig) -> dict[str, Source]:
    """Returns where every weight comes from."""
    assert config.final_norm is not None
    width = config.embed_dim
    found = embedding_sources(config, "gpt_neox.embed_in", "embed_out")
    found |= norm_sources("final_norm", "gpt_neox.final_layer_norm", config.final_norm, width)
    for index, layer in enumerate(config.layers):
        found |= _layer(layer, width, f"layers.{index}", f"gpt_neox.layers.{index}")
    return found


def _layer(layer: LayerSpec, embed_dim: int, name: str, stored: str) -> dict[str, Source]:
    spec, ffn, embed = layer.attention, (layer.mlp.ffn_dim,), (embed_dim,)
    heads = (spec.num_heads, spec.head_dim)
    sources: dict[str, Source] = {}
    for norm, tensor in LLAMA_NORMS.items():
        sources |= norm_sources(f"{name}.{norm}", f"{stored}.{tensor}", layer.norm, embed_dim)
    fused = f"{stored}.attention.query_key_value"
    sources |= by_group_sources(f"{name}.attention", fused, spec, embed_dim)
    for own, tensor, outputs, inputs, bias in (
        ("attention.out", "attention.dense", embed, heads, spec.out_bias),
        ("mlp.up", "mlp.dense_h_to_4h", ffn, embed, True),
        ("mlp.down", "mlp.dense_4h_to_h", embed, ffn, True),
    ):
        sources |= with_bias(f"{name}.{own}", f"{stored}.{tensor}", outputs, inputs, bias)
    return sources


FAMILY = Family(
    "gpt_neox",
    ("GPTNeoXForCausalLM",),
    ("gpt_neox",),
    read,
    sources,
    # Masks and frequencies that older checkpoints have beside the weights.
    (
        r"gpt_neox\.layers\.\d+\.attention\.((masked_)?bias|rotary_emb\.inv_freq)",
        r"embed_out\.weight",
    ),
)
