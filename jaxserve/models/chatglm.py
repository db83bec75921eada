"""ChatGLM 2 and 3: half of each head turns, in neighbouring pairs; two key heads."""

from __future__ import annotations

from jaxserve.config import (
    Activation,
    AttentionSpec,
    LayerSpec,
    MlpSpec,
    ModelConfig,
    NormKind,
    NormSpec,
    RopePairs,
    RopeSpec,
    uniform_layers,
)
from jaxserve.models.family import Family, Source
from jaxserve.models.fields import Fields
from jaxserve.models.tensors import (
    LLAMA_NORMS,
    embedding_sources,
    norm_sources,
    stacked_sources,
    with_bias,
)

# Another program's arithmetic (dividing scores by the layer's number cancels out), prompts in
# front of prompts that checkpoints do not have, dropout.
_IRRELEVANT = (
    "apply_query_key_layer_scaling",
    "attention_softmax_in_fp32",
    "bias_dropout_fusion",
    "fp32_residual_connection",
    "interleaved_qkv",
    "prefix_projection",
)


def read(fields: Fields) -> ModelConfig:
    """Returns the architecture described by `fields`."""
    embed_dim = fields.integer("hidden_size")
    _fixed(fields)
    norm = NormSpec(NormKind.RMS, fields.number("layernorm_epsilon", 1e-5))
    mlp = MlpSpec(fields.integer("ffn_hidden_size"), Activation.SILU, gated=True)
    layers = uniform_layers(LayerSpec(_attention(fields), mlp, norm), fields.integer("num_layers"))
    vocab_size = fields.integer("padded_vocab_size")
    fields.irrelevant("vocab_size")
    return ModelConfig("chatglm", vocab_size, embed_dim, layers, norm, fields.integer("seq_length"))


def _fixed(fields: Fields) -> None:
    """Checks what other values of fields no published model has."""
    fields.irrelevant(*_IRRELEVANT)
    for name, value in (
        ("add_bias_linear", False),
        ("apply_residual_connection_post_layernorm", False),
        ("multi_query_attention", True),
        ("original_rope", True),
        ("post_layer_norm", True),
        ("rmsnorm", True),
        ("tie_word_embeddings", False),
    ):
        fields.only(name, (value,), "published models have it so")
    fields.only("quantization_bit", (0,), "use weights that are not quantized")
    fields.only("pre_seq_len", (0,), "prompts are tokens alone")


def _attention(fields: Fields) -> AttentionSpec:
    head_dim = fields.integer("kv_channels")
    rope = RopeSpec(
        head_dim // 2, 10_000.0 * fields.number("rope_ratio", 1.0), RopePairs.NEIGHBOURS
    )
    return AttentionSpec(
        fields.integer("num_attention_heads"),
        fields.integer("multi_query_group_num"),
        head_dim,
        rope=rope,
        qkv_bias=fields.flag("add_qkv_bias", False),
    )


def sources(config: ModelConfig) -> dict[str, Source]:
    """Returns where every weight comes from."""
    assert config.final_norm is not None
    width, top = config.embed_dim, "transformer.encoder"
    found = embedding_sources(
        config, "transformer.embedding.word_embeddings", "transformer.output_layer"
    )
    found |= norm_sources("final_norm", f"{top}.final_layernorm", config.final_norm, width)
    for index, layer in enumerate(config.layers):
        found |= _layer(layer, width, f"layers.{index}", f"{top}.layers.{index}")
    return found


def _layer(layer: LayerSpec, embed_dim: int, name: str, stored: str) -> dict[str, Source]:
    spec, ffn, embed = layer.attention, (layer.mlp.ffn_dim,), (embed_dim,)
    heads, kv_heads = (spec.num_heads, spec.head_dim), (spec.num_kv_heads, spec.head_dim)
    qkv = dict(zip("qkv", (heads, kv_heads, kv_heads), strict=True))
    sources: dict[str, Source] = {}
    for norm, tensor in LLAMA_NORMS.items():
        sources |= norm_sources(f"{name}.{norm}", f"{stored}.{tensor}", layer.norm, embed_dim)
    attention = f"{stored}.self_attention"
    sources |= stacked_sources(
        {f"{name}.attention.{member}": outputs for member, outputs in qkv.items()},
        f"{attention}.query_key_value",
        embed,
        spec.qkv_bias,
    )
    sources |= with_bias(f"{name}.attention.out", f"{attention}.dense", embed, heads, False)
    sources |= stacked_sources(
        {f"{name}.mlp.gate": ffn, f"{name}.mlp.up": ffn}, f"{stored}.mlp.dense_h_to_4h", embed
    )
    return sources | with_bias(f"{name}.mlp.down", f"{stored}.mlp.dense_4h_to_h", embed, ffn, False)


FAMILY = Family(
    "chatglm",
    ("ChatGLMModel", "ChatGLMForConditionalGeneration"),
    ("chatglm",),
    read,
    sources,
    (r"transformer\.rotary_pos_emb\.inv_freq",),
)
