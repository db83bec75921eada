"""Which config.json is taken, and what is refused by name."""

import json
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.config import (
    Activation,
    AlibiSpec,
    BlockKind,
    ExpertsSpec,
    ModelConfig,
    NormKind,
    NormPlace,
    RopeScaling,
    RopeSpec,
)
from jaxserve.errors import ConfigError, UnsupportedError
from jaxserve.layers.rope import rotation
from jaxserve.models.family import families, family_for, family_named

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "vocab_size": 61,
}
GEMMA2 = LLAMA | {
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "num_key_value_heads": 1,
    "head_dim": 10,
}
FALCON = {
    "architectures": ["FalconForCausalLM"],
    "model_type": "falcon",
    "hidden_size": 24,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 61,
}
PALM = LLAMA | {"architectures": ["PaLMForCausalLM"], "model_type": "palm"}
MINIMAL = {"llama": LLAMA, "gemma2": GEMMA2, "falcon": FALCON, "palm": PALM}
MINIMAL |= {
    model_type.removesuffix("_text"): LLAMA
    | {"architectures": [f"{name}ForCausalLM"], "model_type": model_type, "num_key_value_heads": 1}
    for model_type, name in {
        "mistral": "Mistral",
        "qwen2": "Qwen2",
        "qwen3": "Qwen3",
        "phi3": "Phi3",
        "gemma": "Gemma",
        "gemma3_text": "Gemma3",
        "mixtral": "Mixtral",
        "qwen3_moe": "Qwen3Moe",
        "gpt_neox": "GPTNeoX",
    }.items()
}
del MINIMAL["gpt_neox"]["num_key_value_heads"]
MINIMAL["baichuan"] = LLAMA | {
    "architectures": ["BaichuanForCausalLM"],
    "model_type": "baichuan",
    "max_position_embeddings": 64,
}
MINIMAL["decilm"] = LLAMA | {
    "architectures": ["DeciLMForCausalLM"],
    "model_type": "deci",
    "num_key_value_heads_per_layer": [3, 1],
}
MINIMAL["opt"] = {
    "architectures": ["OPTForCausalLM"],
    "model_type": "opt",
    "hidden_size": 24,
    "ffn_dim": 28,
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "vocab_size": 61,
}
OTHERS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_embd": 24,
        "n_head": 3,
        "n_layer": 2,
        "vocab_size": 61,
    },
    "bloom": {
        "architectures": ["BloomForCausalLM"],
        "model_type": "bloom",
        "hidden_size": 24,
        "n_head": 3,
        "vocab_size": 61,
    },
    "mpt": {
        "architectures": ["MPTForCausalLM"],
        "model_type": "mpt",
        "d_model": 24,
        "n_heads": 3,
        "n_layers": 2,
        "vocab_size": 61,
    },
    "chatglm": {
        "architectures": ["ChatGLMModel"],
        "model_type": "chatglm",
        "hidden_size": 24,
        "ffn_hidden_size": 28,
        "kv_channels": 8,
        "multi_query_group_num": 1,
        "num_attention_heads": 3,
        "num_layers": 2,
        "padded_vocab_size": 61,
        "seq_length": 64,
    },
}
"""Those that call common fields otherwise."""

SMALL = MINIMAL | OTHERS


def read(hf: dict[str, Any]) -> ModelConfig:
    return family_for(hf).config(hf)


def test_every_family_has_a_small_config_here() -> None:
    assert SMALL.keys() == {family.name for family in families()}


@pytest.mark.parametrize("name", SMALL)
def test_the_architecture_decides_the_family(name: str) -> None:
    hf = SMALL[name]
    assert family_for(hf).name == name
    assert read(hf).family == name
    without = {key: value for key, value in hf.items() if key != "architectures"}
    assert family_for(without).name == name


@pytest.mark.parametrize(
    "change",
    [{"architectures": ["MambaForCausalLM"]}, {"architectures": None, "model_type": "mamba"}],
)
def test_an_unknown_architecture_is_refused_with_the_supported_ones(
    change: dict[str, Any],
) -> None:
    with pytest.raises(UnsupportedError, match=r"(?i)mamba.*LlamaForCausalLM.*FalconForCausalLM"):
        family_for(LLAMA | {"model_type": None} | change)


def test_another_head_on_a_known_model_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="LlamaForSequenceClassification"):
        family_for(LLAMA | {"architectures": ["LlamaForSequenceClassification"]})


def test_a_config_without_an_architecture_is_refused() -> None:
    with pytest.raises(ConfigError, match="neither architectures nor model_type"):
        family_for({"hidden_size": 24})


def test_contradicting_names_are_refused() -> None:
    with pytest.raises(ConfigError, match="model_type='mistral' contradicts"):
        family_for(LLAMA | {"model_type": "mistral"})


def test_an_unknown_family_is_refused_with_the_supported_ones() -> None:
    with pytest.raises(UnsupportedError, match=r"'mamba'.*llama, mistral, .*falcon, .*palm"):
        family_named("mamba")


@pytest.mark.parametrize("name", SMALL)
def test_an_unknown_field_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=f"qk_norm_scale=3.*{name} family"):
        read(SMALL[name] | {"qk_norm_scale": 3})


@pytest.mark.parametrize("name", MINIMAL)
@pytest.mark.parametrize("field", ["hidden_size", "num_hidden_layers", "vocab_size"])
def test_a_missing_field_is_refused_by_name(name: str, field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field} is missing"):
        read({key: value for key, value in MINIMAL[name].items() if key != field})


@pytest.mark.parametrize(
    ("base", "change", "message"),
    [
        (LLAMA, {"hidden_act": "mish"}, "hidden_act='mish' is not supported.*silu.*gelu"),
        (LLAMA, {"is_encoder_decoder": True}, "is_encoder_decoder=True is not supported"),
        (LLAMA, {"quantization_config": {"bits": 4}}, "quantized.*bfloat16"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        (GEMMA2, {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        (GEMMA2, {"hidden_act": "relu"}, "hidden_act='relu' is not supported"),
        (GEMMA2, {"sliding_window_size": 7}, "sliding_window_size=7 is not supported"),
        (FALCON, {"apply_residual_connection_post_layernorm": True}, "post_layernorm=True"),
        (FALCON, {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn=2"),
        (FALCON, {"num_kv_heads": 2}, "num_kv_heads=2 is not supported"),
        (
            FALCON,
            {"new_decoder_architecture": True, "parallel_attn": False},
            "parallel_attn=False",
        ),
        (FALCON, {"ff_factor": 3}, "ff_factor=3 is not supported"),
        (
            FALCON,
            {"alibi": True, "rope_scaling": {"type": "linear", "factor": 2.0}},
            "'linear' with alibi=True",
        ),
        (
            MINIMAL["mistral"],
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "rope_parameters.partial_rotary_factor=0.5 is not supported",
        ),
        (MINIMAL["gemma3"], {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (MINIMAL["phi3"], {"attention_bias": True}, "attention_bias=True is not supported"),
        (MINIMAL["opt"], {"layer_norm_elementwise_affine": False}, "elementwise_affine=False"),
        (OTHERS["mpt"], {"attn_config": {"qk_ln": True}}, "attn_config.qk_ln=True"),
        (OTHERS["mpt"], {"attn_config": {"alibi": False}}, "attn_config.alibi=False"),
        (OTHERS["mpt"], {"logit_scale": 2.0}, "logit_scale is not supported"),
        (OTHERS["bloom"], {"apply_residual_connection_post_layernorm": True}, "layernorm=True"),
        (OTHERS["chatglm"], {"quantization_bit": 4}, "quantization_bit=4"),
        (OTHERS["chatglm"], {"rmsnorm": False}, "rmsnorm=False"),
        (MINIMAL["qwen3_moe"], {"use_sliding_window": True}, "use_sliding_window=True"),
        (PALM, {"tie_word_embeddings": False}, "tie_word_embeddings=False is not supported"),
        (PALM, {"norm_type": "batch_norm"}, "norm_type='batch_norm'.*rms_norm, layer_norm"),
    ],
)
def test_an_unsupported_value_is_refused_by_name(
    base: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        read(base | change)


@pytest.mark.parametrize(
    ("base", "change", "message"),
    [
        (LLAMA, {"hidden_size": "24"}, "hidden_size='24' must be a positive integer"),
        (LLAMA, {"hidden_size": True}, "hidden_size=True must be a positive integer"),
        (LLAMA, {"num_hidden_layers": 0}, "num_hidden_layers=0 must be a positive integer"),
        (LLAMA, {"rms_norm_eps": "tiny"}, "rms_norm_eps='tiny' must be a number"),
        (LLAMA, {"rms_norm_eps": -1e-5}, "rms_norm_eps=-1e-05 must be a positive"),
        (LLAMA, {"attention_bias": 1}, "attention_bias=1 must be true or false"),
        (LLAMA, {"head_dim": 7}, "rotary_dim=7 must be positive and even"),
        (LLAMA, {"num_key_value_heads": 2}, "num_kv_heads=2 does not divide num_heads=3"),
        (LLAMA, {"rope_scaling": "linear"}, "rope_scaling='linear' must be an object"),
        (LLAMA, {"temperature": 0.6}, "temperature=0.6.*generation_config.json"),
        (GEMMA2, {"layer_types": ["full_attention"]}, "layer_types=.*num_hidden_layers=2"),
        (GEMMA2, {"layer_types": ["full_attention", "x"]}, "layer_types=.*sliding_attention"),
        (GEMMA2, {"sliding_window": None}, "sliding_window is null"),
        (FALCON, {"num_attention_heads": 5}, "num_attention_heads=5 does not divide"),
        (
            MINIMAL["qwen2"],
            {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types has 'sliding_attention', but sliding_window is null",
        ),
        (
            MINIMAL["phi3"],
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
            "rope_scaling.original_max_position_embeddings is missing",
        ),
        (
            MINIMAL["phi3"] | {"original_max_position_embeddings": 8},
            {"rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [1.0]}},
            "1 short and 1 long factors.*rotary_dim=8 needs 4 of each",
        ),
        (MINIMAL["phi3"], {"partial_rotary_factor": -1}, "partial_rotary_factor=-1 must be"),
    ],
)
def test_an_inconsistent_config_is_refused_by_name(
    base: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read(base | change)


def test_fields_that_do_not_matter_are_taken() -> None:
    extra = {
        "_name_or_path": "somewhere",
        "auto_map": {"AutoModelForCausalLM": "modeling_x.Evil"},
        "torch_dtype": "bfloat16",
        "transformers_version": "4.40.0",
        "use_cache": False,
        "initializer_range": 0.02,
        "attention_dropout": 0.1,
        "pretraining_tp": 2,
        "eos_token_id": [1, 2],
        "is_decoder": False,
        "pruned_heads": {},
        "quantization_config": None,
        "never_heard_of": None,
    }
    assert read(LLAMA | extra) == read(LLAMA)


def test_llama_takes_what_its_config_leaves_out_from_hugging_faces_defaults() -> None:
    config = read(LLAMA)
    attention = config.layers[0].attention
    assert (attention.num_kv_heads, attention.head_dim) == (3, 8)
    assert config.layers[0].norm.eps == 1e-6
    assert config.max_context_tokens == 2048
    assert not config.tied


def test_gemma2_slides_in_every_other_layer_unless_it_says_otherwise() -> None:
    windows = [layer.attention.window for layer in read(GEMMA2 | {"num_hidden_layers": 4}).layers]
    assert windows == [4096, None, 4096, None]
    types = ["full_attention", "sliding_attention"]
    chosen = read(GEMMA2 | {"layer_types": types, "sliding_window": 8})
    assert [layer.attention.window for layer in chosen.layers] == [None, 8]


def test_gemma2_null_turns_a_cap_off() -> None:
    assert read(GEMMA2).logits_soft_cap == 30.0
    assert read(GEMMA2 | {"final_logit_softcapping": None}).logits_soft_cap is None


def test_mistral_slides_in_every_layer_unless_the_window_is_null() -> None:
    def windows(**changes: Any) -> set[int | None]:
        return {layer.attention.window for layer in read(MINIMAL["mistral"] | changes).layers}

    assert windows() == {4096}
    assert windows(sliding_window=7) == {7}
    assert windows(sliding_window=None) == {None}


def test_qwen_2_slides_in_upper_layers_only_where_it_is_told_to() -> None:
    four = MINIMAL["qwen2"] | {"num_hidden_layers": 4, "max_window_layers": 3}
    assert {layer.attention.window for layer in read(four).layers} == {None}
    told = read(four | {"use_sliding_window": True, "sliding_window": 8})
    assert [layer.attention.window for layer in told.layers] == [None, None, None, 8]
    attention = told.layers[0].attention
    assert attention.qkv_bias and not attention.out_bias


def test_qwen_3_norms_heads_of_a_size_of_their_own() -> None:
    attention = read(MINIMAL["qwen3"]).layers[0].attention
    assert attention.head_dim == 128
    assert attention.qk_norm == read(MINIMAL["qwen3"]).final_norm


def test_gemma_means_the_approximation_where_it_says_gelu() -> None:
    def activation(**changes: Any) -> Activation:
        return read(MINIMAL["gemma"] | changes).layers[0].mlp.activation

    assert activation() is activation(hidden_act="gelu") is Activation.GELU_TANH
    assert activation(hidden_act="gelu", hidden_activation="relu") is Activation.RELU


def test_gemma_3_has_a_rotation_for_each_kind_of_layer() -> None:
    older = {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_local_base_freq": 20.0}
    newer = {
        "full_attention": {"rope_type": "linear", "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
    }
    config = read(MINIMAL["gemma3"] | older | {"num_hidden_layers": 12})
    assert config == read(MINIMAL["gemma3"] | {"rope_parameters": newer, "num_hidden_layers": 12})
    kinds = [layer.attention for layer in config.layers]
    assert [a.window for a in kinds] == ([4096] * 5 + [None]) * 2
    local, whole = kinds[0].rope, kinds[5].rope
    assert local == RopeSpec(256, 20.0)
    assert whole == RopeSpec(256, 1e6, scaling=RopeScaling.LINEAR, factor=8.0)


def test_longrope_turns_by_the_length_of_the_sequence() -> None:
    table = {"type": "su", "short_factor": [1.0, 2, 3, 4], "long_factor": [5.0, 6, 7, 8]}
    extra = {"original_max_position_embeddings": 64, "max_position_embeddings": 128}
    rope = read(MINIMAL["phi3"] | extra | {"rope_scaling": table}).layers[0].attention.rope
    assert rope is not None and rope.by_length
    assert (rope.short_factors, rope.long_factors) == ((1, 2, 3, 4), (5, 6, 7, 8))
    assert rope.attention_factor == pytest.approx(math.sqrt(1 + math.log(2) / math.log(64)))
    plain = 10_000.0 ** -(np.arange(4) / 4)
    lengths = jnp.array([64, 65])
    cos, _ = rotation(rope, jnp.array([3, 3]), lengths)
    for row, factors in enumerate((rope.short_factors, rope.long_factors)):
        wanted = np.cos(3 * plain / np.asarray(factors)) * rope.attention_factor
        np.testing.assert_allclose(cos[row, 0], wanted, rtol=1e-6)


def test_gpt_2_scales_scores_by_the_layer_where_it_is_told_to() -> None:
    config = read(OTHERS["gpt2"] | {"scale_attn_by_inverse_layer_idx": True})
    scales = [layer.attention.score_scale for layer in config.layers]
    assert scales == pytest.approx([8**-0.5, 8**-0.5 / 2])
    assert config.num_positions == config.max_context_tokens == 1024


def test_opt_350m_norms_sums_and_has_a_table_of_another_width() -> None:
    plain = read(MINIMAL["opt"])
    assert (plain.layers[0].norm_place, plain.table_dim) == (NormPlace.INPUT, None)
    assert plain.final_norm is not None
    small = read(MINIMAL["opt"] | {"do_layer_norm_before": False, "word_embed_proj_dim": 16})
    assert (small.layers[0].norm_place, small.table_dim) == (NormPlace.SUM, 16)
    assert small.final_norm is None


def test_positions_of_opt_begin_at_row_2() -> None:
    family = family_named("opt")
    table = family.sources(read(MINIMAL["opt"] | {"max_position_embeddings": 5}))
    source = table["entrance.positions.table"]
    assert source.shape == (7, 24)
    rows = np.broadcast_to(np.arange(7)[:, None], (7, 24))
    np.testing.assert_array_equal(source.select(rows)[:, 0], [2, 3, 4, 5, 6])


def test_baichuan_has_alibi_where_its_context_has_another_name() -> None:
    seven = read(MINIMAL["baichuan"])
    assert seven.unit_head and seven.layers[0].attention.rope is not None
    hf = {key: value for key, value in MINIMAL["baichuan"].items() if "max_pos" not in key}
    thirteen = read(hf | {"model_max_length": 64}).layers[0].attention
    assert thirteen.rope is None and thirteen.alibi == AlibiSpec()


def test_key_heads_of_decilm_vary_by_layer() -> None:
    config = read(MINIMAL["decilm"])
    assert [layer.attention.num_kv_heads for layer in config.layers] == [3, 1]
    assert len(config.cache_groups("bfloat16")) == 2
    with pytest.raises(ConfigError, match=r"per_layer=\[3\] must have num_hidden_layers=2"):
        read(MINIMAL["decilm"] | {"num_key_value_heads_per_layer": [3]})


def test_qwen_3_takes_experts_out_of_layers() -> None:
    hf = MINIMAL["qwen3_moe"] | {"num_hidden_layers": 4, "decoder_sparse_step": 2}
    experts = [layer.mlp.experts for layer in read(hf | {"mlp_only_layers": [3]}).layers]
    assert experts == [None, ExpertsSpec(128, 8, renormalised=False), None, None]


def test_weights_of_experts_come_from_a_tensor_each() -> None:
    family = family_named("mixtral")
    source = family.sources(read(MINIMAL["mixtral"]))["layers.1.mlp.down"]
    assert source.shape == (24, 28)
    assert source.tensors == tuple(
        f"model.layers.1.block_sparse_moe.experts.{index}.w2.weight" for index in range(8)
    )


@pytest.mark.parametrize("name", ["gpt2", "opt", "bloom"])
def test_tensors_of_a_model_without_its_head_get_their_prefix(name: str) -> None:
    family = family_named(name)
    assert family.full_names({"h.0.x": 1}) == {f"{family.base}h.0.x": 1}
    whole = {f"{family.base}h.0.x": 1, "lm_head.weight": 2}
    assert family.full_names(whole) == whole


def test_falcon_variants_differ_in_block_norms_and_heads() -> None:
    small = read(FALCON | {"num_kv_heads": 4}).layers[0]
    assert (small.block, small.mlp_norm) == (BlockKind.PARALLEL, False)
    assert small.attention.num_kv_heads == 1
    large = read(FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}).layers[0]
    assert (large.block, large.mlp_norm) == (BlockKind.PARALLEL, True)
    assert large.attention.num_kv_heads == 2
    serial = read(
        FALCON | {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}
    ).layers[0]
    assert (serial.block, serial.mlp.bias) == (BlockKind.SERIAL, True)
    assert serial.attention.rope is None
    assert serial.attention.alibi == AlibiSpec(scale=1 / math.sqrt(6), bfloat16=True)
    assert serial.attention.num_kv_heads == 4


def test_palm_is_a_parallel_block_with_one_key_head_and_scaled_logits() -> None:
    config = read(PALM)
    layer = config.layers[0]
    assert (layer.block, layer.mlp_norm, layer.attention.num_kv_heads) == (
        BlockKind.PARALLEL,
        False,
        1,
    )
    assert (layer.norm.kind, layer.norm.bias) == (NormKind.RMS, False)
    assert (layer.mlp.activation, layer.mlp.gated) == (Activation.SILU, True)
    assert config.tied
    assert config.logits_scale == 24**-0.5


def test_fused_rows_are_taken_apart_by_group() -> None:
    # 4 heads over 2 key heads, 6 features each: rows q0 q1 k0 v0 q2 q3 k1 v1.
    family = family_for(FALCON)
    hf = FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}
    sources = family.sources(family.config(hf))
    owners = np.repeat(["q0", "q1", "k0", "v0", "q2", "q3", "k1", "v1"], 6)
    for member, wanted in {
        "q": ["q0", "q1", "q2", "q3"],
        "k": ["k0", "k1"],
        "v": ["v0", "v1"],
    }.items():
        bias = sources[f"layers.1.attention.{member}.bias"]
        assert bias.shape == owners.shape
        np.testing.assert_array_equal(bias.select(owners)[:, 0], wanted)
        weight = sources[f"layers.1.attention.{member}"]
        assert weight.shape == (48, 24)
        taken = weight.select(np.broadcast_to(owners[:, None], (48, 24)))
        assert taken.shape == (len(wanted), 6, 24)
        np.testing.assert_array_equal(taken[:, 5, 23], wanted)


@pytest.mark.parametrize(
    ("family", "name", "ignored"),
    [
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq", True),
        ("llama", "lm_head.weight", True),
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq2", False),
        ("llama", "model.layers.0.self_attn.q_norm.weight", False),
        ("falcon", "lm_head.weight", True),
        ("falcon", "lm_head.bias", False),
    ],
)
def test_only_tensors_without_weights_of_their_own_are_ignored(
    family: str, name: str, ignored: bool
) -> None:
    assert family_named(family).ignored(name) is ignored


def test_every_family_is_named_by_its_module_and_documented() -> None:
    page = (Path(__file__).parents[3] / "docs" / "models.md").read_text(encoding="utf-8")
    for family in families():
        for architecture in family.architectures:
            assert architecture in page


def test_golden_configs_survive_a_round_trip_through_json() -> None:
    for path in sorted((Path(__file__).parents[2] / "golden").glob("*/config.json")):
        hf = json.loads(path.read_text(encoding="utf-8"))
        assert read(hf) == read(json.loads(json.dumps(hf)))
