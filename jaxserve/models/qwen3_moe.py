"""Qwen 3 with experts: 128 small MLPs, of which a token takes eight."""

from __future__ import annotations

from dataclasses import replace

from jaxserve.config import ExpertsSpec, LayerSpec, MlpSpec, ModelConfig
from jaxserve.models.family import Family, Source
from jaxserve.models.fields import Fields
from jaxserve.models.gated import read_mlp
from jaxserve.models.qwen3 import read_attention
from jaxserve.models.tensors import IGNORABLE, ExpertNames, projection_sources


def read(fields: Fields) -> ModelConfig:
    """Returns the architecture described by `fields`."""
    attention, norm, context = read_attention(fields, num_kv_heads=4)
    fields.only("use_sliding_window", (False,), "no published one has windows")
    fields.irrelevant("sliding_window", "max_window_layers", "router_aux_loss_coef")
    return ModelConfig(
        "qwen3_moe",
        fields.integer("vocab_size"),
        fields.integer("hidden_size"),
        tuple(LayerSpec(attention, mlp, norm) for mlp in _mlps(fields)),
        norm,
        context,
        tied=fields.flag("tie_word_embeddings", False),
    )


def _mlps(fields: Fields) -> list[MlpSpec]:
    """Returns the MLP of each layer: experts, but for layers that the config takes out."""
    plain = read_mlp(fields)
    experts = ExpertsSpec(
        # The second name is that of transformers 5.
        fields.integer("num_experts", fields.integer("num_local_experts", 128)),
        fields.integer("num_experts_per_tok", 8),
        renormalised=fields.flag("norm_topk_prob", False),
    )
    several = replace(plain, ffn_dim=fields.integer("moe_intermediate_size", 768), experts=experts)
    step = fields.integer("decoder_sparse_step", 1)
    without = fields.integers("mlp_only_layers", [])
    return [
        plain if index in without or (index + 1) % step else several
        for index in range(fields.integer("num_hidden_layers"))
    ]


def sources(config: ModelConfig) -> dict[str, Source]:
    """Returns where every weight comes from."""
    names = ExpertNames("mlp", gate="gate_proj", up="up_proj", down="down_proj")
    return projection_sources(config, experts=names)


FAMILY = Family("qwen3_moe", ("Qwen3MoeForCausalLM",), ("qwen3_moe",), read, sources, IGNORABLE)
