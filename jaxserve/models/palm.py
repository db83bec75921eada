"""PaLM, in a checkpoint format of our own: no weights and no Hugging Face class were published.

Fields of config.json and names of tensors follow Llama's; a block has one norm,
`input_layernorm`. Choices the paper leaves open follow Google's published inference code for
PaLM (google-research, scaling_transformer_inference_efficiency): the norm divides by the root
mean square with epsilon 1e-6, rotation pairs are halves, logits are divided by sqrt(embed).
"""

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
from jaxserve.models.activations import ACTIVATIONS
from jaxserve.models.family import Family, Source
from jaxserve.models.fields import Fields
from jaxserve.models.rope import read_rope
from jaxserve.models.tensors import projection_sources

NORMS = {"rms_norm": NormKind.RMS, "layer_norm": NormKind.LAYER}


def read(fields: Fields) -> ModelConfig:
    """Returns the architecture described by `fields`."""
    embed_dim = fields.integer("hidden_size")
    head_dim = fields.integer("head_dim", 256)
    rope, context = read_rope(fields, head_dim, fields.integer("max_position_embeddings", 2048))
    norm = NormSpec(
        fields.choice("norm_type", "rms_norm", NORMS), fields.number("norm_epsilon", 1e-6)
    )
    fields.only("tie_word_embeddings", (True,), "its logits come from the embedding")
    layer = LayerSpec(
        attention=AttentionSpec(
            fields.integer("num_attention_heads"),
            fields.integer("num_key_value_heads", 1),
            head_dim,
            rope=rope,
        ),
        mlp=MlpSpec(
            fields.integer("intermediate_size", 4 * embed_dim),
            fields.choice("hidden_act", "silu", ACTIVATIONS),
            gated=True,
        ),
        norm=norm,
        block=BlockKind.PARALLEL,
        mlp_norm=False,
    )
    return ModelConfig(
        "palm",
        fields.integer("vocab_size"),
        embed_dim,
        uniform_layers(layer, fields.integer("num_hidden_layers")),
        norm,
        context,
        tied=True,
        logits_scale=embed_dim**-0.5,
    )


def sources(config: ModelConfig) -> dict[str, Source]:
    """Returns where every weight comes from."""
    return projection_sources(config, {"attention_norm": "input_layernorm"})


FAMILY = Family("palm", ("PaLMForCausalLM",), ("palm",), read, sources, (r"lm_head\.weight",))
