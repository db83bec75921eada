"""Makes the golden files of this folder with Hugging Face's models; needs torch and transformers.

    python tests/golden/make.py [CASE ...]

A case is a folder: config.json and model.safetensors as Hugging Face saves them (float32, random,
tiny, sizes awkward on purpose), and golden.safetensors with two prompts i, each with

    prompt.i      int64[L]             token ids
    greedy.i      int64[32]            continuation by `generate` with its cache
    logprobs.i    float32[32]          log-probability of each of these tokens

and, of the first, all logits:

    logits        float32[L, V]        of the prompt
    bfloat16      bfloat16[L + 32, V]  of prompt and continuation, the model in bfloat16

Seeds are passed over where a greedy choice is a near-tie, so that the continuation is a property
of the model and not of the last bits of a sum; where it repeats itself; and where rounding to
bfloat16 changes the likeliest token, or might.
"""

from __future__ import annotations

import copy
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch  # pyright: ignore[reportMissingImports] - the extra `parity` brings it
import transformers
from safetensors.torch import save_file

HERE = Path(__file__).parent
NEW_TOKENS = 32
PROMPT_LENGTHS = (17, 6)
MARGIN = 2e-3  # of max|logit|, between the two likeliest tokens of every greedy step
DTYPES = (torch.float32, torch.bfloat16)
DISTINCT = 8  # tokens among the 32 of a continuation
BFLOAT16_MARGIN = 1.5e-2  # the same, for bfloat16; two positions may be closer

LLAMA = {
    "vocab_size": 61,
    "num_hidden_layers": 2,
    "intermediate_size": 28,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
}
GEMMA2 = {
    "vocab_size": 61,
    "intermediate_size": 28,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
FALCON = {
    "vocab_size": 61,
    "num_hidden_layers": 2,
    "ffn_hidden_size": 44,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
}


@dataclass(frozen=True)
class Case:
    """A tiny model.

    Attributes:
        config: name of the Hugging Face config class without "Config".
        values: its fields.
        distinct: least number of tokens in a continuation.
        rewrite: fields that config.json gets instead, None to drop one: older spellings.
    """

    config: str
    values: dict[str, Any]
    rewrite: dict[str, Any] = field(default_factory=dict)
    distinct: int = DISTINCT


def llama(**values: Any) -> Case:
    return Case("Llama", LLAMA | values)


def rope(**values: Any) -> dict[str, Any]:
    return {"rope_theta": 10_000.0} | values


def dense(config: str, **values: Any) -> Case:
    """Returns a case of a family whose fields are named as Llama's."""
    common = {"vocab_size": 61, "intermediate_size": 28, "max_position_embeddings": 64}
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return Case(config, common | tokens | {"num_hidden_layers": 2} | values)


def opt(**values: Any) -> Case:
    common = {"vocab_size": 61, "num_hidden_layers": 2, "ffn_dim": 44}
    positions = {"max_position_embeddings": 64, "dropout": 0.0}
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return Case("OPT", common | positions | tokens | values)


GPT2 = {
    "vocab_size": 61,
    "n_positions": 64,
    "n_layer": 2,
    "bos_token_id": None,
    "eos_token_id": None,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.2],
    "long_factor": [1.0, 2.5, 4.0, 9.0],
}

CASES = {
    # As plain as it gets: three heads with keys of their own.
    "llama-mha": llama(hidden_size=24, num_attention_heads=3),
    # Nine heads share three keys; heads wider than width/heads; tied.
    "llama-gqa-tied": llama(
        hidden_size=27,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=6,
        rope_parameters=rope(rope_type="default", rope_theta=500_000.0),
        tie_word_embeddings=True,
    ),
    "llama-bias": llama(
        hidden_size=28,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=10,
        attention_bias=True,
        mlp_bias=True,
    ),
    # config.json as transformers 4 wrote it.
    "llama-linear": Case(
        "Llama",
        LLAMA
        | {
            "hidden_size": 25,
            "num_attention_heads": 5,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "rope_parameters": rope(rope_type="linear", factor=2.5),
        },
        rewrite={
            "rope_parameters": None,
            "rope_theta": 10_000.0,
            "rope_scaling": {"type": "linear", "factor": 2.5},
            "dtype": None,
            "torch_dtype": "float32",
        },
    ),
    # The first prompt is longer than the original context, the second grows past it.
    "llama-dynamic": llama(
        hidden_size=28,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=12,
        rope_parameters=rope(rope_type="dynamic", factor=3.0),
    ),
    "llama-llama3": llama(
        hidden_size=25,
        num_attention_heads=5,
        num_key_value_heads=1,
        head_dim=10,
        rope_parameters=rope(
            rope_type="llama3",
            rope_theta=50.0,
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ),
    "llama-yarn": llama(
        hidden_size=27,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=12,
        rope_parameters=rope(
            rope_type="yarn",
            factor=4.0,
            beta_fast=4.0,
            beta_slow=1.0,
            original_max_position_embeddings=16,
        ),
    ),
    # Windows of 5 in every other layer; caps low enough to bend scores and logits.
    "gemma2": Case(
        "Gemma2",
        GEMMA2
        | {
            "hidden_size": 27,
            "num_hidden_layers": 4,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "head_dim": 10,
            "sliding_window": 5,
            "query_pre_attn_scalar": 7,
            "attn_logit_softcapping": 4.0,
            "final_logit_softcapping": 1.0,
        },
    ),
    # Windows where config.json says; biases; no caps; untied.
    "gemma2-plain": Case(
        "Gemma2",
        GEMMA2
        | {
            "hidden_size": 28,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 6,
            "sliding_window": 3,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "query_pre_attn_scalar": 6,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "attention_bias": True,
            "tie_word_embeddings": False,
        },
    ),
    # The window is shorter than either prompt.
    "mistral": dense(
        "Mistral",
        hidden_size=27,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=4,
    ),
    # Torch multiplies grouped rows in bfloat16 only where widths are multiples of eight.
    "mixtral": dense(
        "Mixtral",
        hidden_size=24,
        intermediate_size=40,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=8,
        num_local_experts=5,
    ),
    # The middle layer has one MLP; weights of experts are not made to add up to one.
    "qwen3_moe": dense(
        "Qwen3Moe",
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=6,
        num_experts_per_tok=3,
        moe_intermediate_size=16,
        mlp_only_layers=[1],
    ),
    # One layer sees all, the two above it a window.
    "qwen2": dense(
        "Qwen2",
        hidden_size=30,
        num_hidden_layers=3,
        num_attention_heads=5,
        num_key_value_heads=1,
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=1,
    ),
    "qwen3": dense(
        "Qwen3",
        hidden_size=27,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=10,
        tie_word_embeddings=True,
    ),
    "qwen3-bias": dense(
        "Qwen3",
        hidden_size=28,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=8,
        attention_bias=True,
    ),
    # Both prompts end before the original context.
    "phi3": dense(
        "Phi3",
        hidden_size=40,
        num_attention_heads=5,
        num_key_value_heads=1,
        original_max_position_embeddings=50,
        rope_parameters=LONGROPE | {"original_max_position_embeddings": 50},
    ),
    # Both begin after it; a part of each head turns; the window is shorter than either.
    "phi3-long": dense(
        "Phi3",
        hidden_size=36,
        num_attention_heads=3,
        num_key_value_heads=3,
        original_max_position_embeddings=5,
        sliding_window=7,
        rope_parameters=LONGROPE
        | {"original_max_position_embeddings": 5, "partial_rotary_factor": 0.67},
    ),
    "gemma": dense(
        "Gemma", hidden_size=27, num_attention_heads=3, num_key_value_heads=1, head_dim=10
    ),
    # config.json as the first release wrote it.
    "gemma-mha": Case(
        "Gemma",
        dense("Gemma", hidden_size=24, num_attention_heads=3, head_dim=8).values
        | {"num_key_value_heads": 3},
        rewrite={"hidden_act": "gelu", "rope_parameters": None, "rope_theta": 10_000.0},
    ),
    # Two layers with windows of 5 to one without, which turns by another base, stretched.
    "gemma3": dense(
        "Gemma3Text",
        hidden_size=27,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=10,
        sliding_window=5,
        query_pre_attn_scalar=7,
        layer_types=[f"{kind}_attention" for kind in ("sliding", "sliding", "full", "sliding")],
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    ),
    "gpt2": Case("GPT2", GPT2 | {"n_embd": 30, "n_head": 5}),
    # As published without its head: no prefix, and masks beside the weights.
    "gpt2-scaled": Case(
        "GPT2",
        GPT2
        | {
            "n_embd": 27,
            "n_head": 3,
            "n_inner": 44,
            "n_layer": 3,
            "scale_attn_by_inverse_layer_idx": True,
            "tie_word_embeddings": False,
        },
    ),
    "gpt_neox": dense("GPTNeoX", hidden_size=40, num_attention_heads=5),
    # Serial blocks, no biases on attention; older spellings.
    "gpt_neox-serial": Case(
        "GPTNeoX",
        dense("GPTNeoX", hidden_size=36, num_attention_heads=3).values
        | {
            "use_parallel_residual": False,
            "attention_bias": False,
            "rope_parameters": rope(rope_type="default", partial_rotary_factor=0.5),
        },
        rewrite={"rope_parameters": None, "rotary_pct": 0.5, "rotary_emb_base": 10_000},
    ),
    "opt": opt(hidden_size=30, num_attention_heads=5),
    # As the 350M, but untied: norms behind the sums, none at the end, embeddings of another width.
    "opt-sums": opt(
        hidden_size=27,
        num_attention_heads=3,
        do_layer_norm_before=False,
        word_embed_proj_dim=20,
        tie_word_embeddings=False,
    ),
    # A power of two of heads: transformers rounds other slopes to bfloat16, in that dtype alone.
    # Untied: behind the norm of embeddings a random tied model repeats its last token.
    "bloom": Case(
        "Bloom",
        {"vocab_size": 61, "hidden_size": 28, "n_layer": 2, "n_head": 4}
        | {"tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None},
        distinct=4,
    ),
    # Clipped low, so that it shows; heads that are no power of two.
    "mpt": Case(
        "Mpt",
        {"vocab_size": 61, "d_model": 36, "n_layers": 2, "n_heads": 9, "max_seq_len": 64}
        | {"attn_config": {"clip_qkv": 0.5}},
    ),
    "falcon-7b": Case("Falcon", FALCON | {"hidden_size": 30, "num_attention_heads": 5}),
    "falcon-40b": Case(
        "Falcon",
        FALCON
        | {
            "hidden_size": 36,
            "num_attention_heads": 6,
            "num_kv_heads": 3,
            "new_decoder_architecture": True,
            "tie_word_embeddings": False,
        },
    ),
    # The 11B: groups, but one norm; here with biases.
    "falcon-11b": Case(
        "Falcon",
        FALCON
        | {
            "hidden_size": 24,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "new_decoder_architecture": True,
            "num_ln_in_parallel_attn": 1,
            "bias": True,
        },
    ),
    # Nine heads: the ninth slope is no power of two, so that bfloat16 rounds its biases.
    "falcon-rw": Case(
        "Falcon",
        FALCON
        | {
            "hidden_size": 36,
            "num_attention_heads": 9,
            "alibi": True,
            "bias": True,
            "multi_query": False,
            "parallel_attn": False,
            "tie_word_embeddings": False,
        },
    ),
}


def randomise(model: transformers.PreTrainedModel, seed: int) -> None:
    """Draws every parameter; norms and biases move away from ones and zeros."""
    generator = torch.Generator().manual_seed(seed)
    # A large embedding that is the output head too would only repeat the last token.
    embedding = 0.1 if model.config.tie_word_embeddings else 1.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                is_norm = name.endswith("weight")
                centre = round(float(parameter.mean())) if is_norm else 0.0
                parameter.copy_(centre + 0.3 * noise)
            elif "embed" in name or ".wte." in name or ".wpe." in name:
                parameter.copy_(noise * embedding)
            else:
                parameter.copy_(noise * 1.5 / math.sqrt(parameter.shape[-1]))


def load(folder: Path, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    """Returns a fresh model; a used one may remember how far dynamic frequencies have grown."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def answers(folder: Path, seed: int, distinct: int) -> dict[str, torch.Tensor] | None:
    """Returns what golden.safetensors holds, or None where the seed will not do."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, torch.Tensor] = {}
    for index, length in enumerate(PROMPT_LENGTHS):
        prompt = torch.randint(load(folder).config.vocab_size, (1, length), generator=generator)
        continued = greedy(folder, prompt, distinct)
        if continued is None:
            return None
        found[f"prompt.{index}"] = prompt[0]
        found[f"greedy.{index}"], found[f"logprobs.{index}"] = continued
    prompt, whole = found["prompt.0"], torch.cat([found["prompt.0"], found["greedy.0"]])
    exact, rounded = (load(folder, dtype)(whole[None]).logits[0] for dtype in DTYPES)
    close = margins(exact) < BFLOAT16_MARGIN * exact.abs().max()
    if close.sum() > 2 or (exact.argmax(-1) != rounded.argmax(-1)).any():
        return None
    return found | {"logits": load(folder)(prompt[None]).logits[0], "bfloat16": rounded}


def margins(logits: torch.Tensor) -> torch.Tensor:
    """Returns how far the likeliest token of each row is ahead of the second."""
    best = logits.topk(2, dim=-1).values
    return best[:, 0] - best[:, 1]


def greedy(
    folder: Path, prompt: torch.Tensor, distinct: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Returns (likeliest tokens, their log-probabilities), or None where they will not do."""
    result = load(folder).generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        pad_token_id=0,
        use_cache=True,
        output_logits=True,
        return_dict_in_generate=True,
    )
    steps, tokens = torch.cat(result.logits), result.sequences[0, prompt.shape[1] :]
    if margins(steps).min() < MARGIN * steps.abs().max() or len(tokens.unique()) < distinct:
        return None
    return tokens.clone(), steps.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]


def rewrite(path: Path, changes: dict[str, Any]) -> None:
    """Changes fields of a config.json."""
    fields = json.loads(path.read_text()) | changes
    kept = {name: value for name, value in fields.items() if changes.get(name, 0) is not None}
    path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")


def make(name: str, case: Case) -> None:
    """Writes the folder of one case."""
    folder = HERE / name
    config_class = getattr(transformers, f"{case.config}Config")
    for seed in range(1000):
        model = transformers.AutoModelForCausalLM.from_config(
            config_class(**copy.deepcopy(case.values)), dtype=torch.float32
        )
        randomise(model, seed)
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink()
        rewrite(folder / "config.json", case.rewrite)
        found = answers(folder, seed, case.distinct)
        if found is not None:
            break
    else:
        raise SystemExit(
            f"{name}: no seed will do; lower {MARGIN=}, {DISTINCT=} or {BFLOAT16_MARGIN=}"
        )
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    save_file(found, folder / "golden.safetensors", versions | {"seed": str(seed)})
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{name}: seed {seed}, {size / 1e3:.0f} kB")


def main() -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in sys.argv[1:] or CASES:
        make(name, CASES[name])


if __name__ == "__main__":
    main()
