"""The checkpoint of the decode benchmark: a 135M-parameter Llama with random weights.

    python -m benchmarks.peers.model DIR

The shape is that of a real small model, so the time of a step is real; the weights are noise, so
nothing needs to be downloaded. There is no tokenizer: prompts are token ids.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "dtype": "bfloat16",
    "eos_token_id": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.02,
    "intermediate_size": 1536,
    "max_position_embeddings": 2048,
    "mlp_bias": False,
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "use_cache": True,
    "vocab_size": 49152,
}
GENERATION_CONFIG = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields each weight's Hugging Face name and shape, linear weights as [out, in]."""
    D, F, H = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["head_dim"]
    N, K = CONFIG["num_attention_heads"], CONFIG["num_key_value_heads"]
    yield "model.embed_tokens.weight", (CONFIG["vocab_size"], D)
    for layer in range(CONFIG["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (D,)
        yield prefix + "self_attn.q_proj.weight", (N * H, D)
        yield prefix + "self_attn.k_proj.weight", (K * H, D)
        yield prefix + "self_attn.v_proj.weight", (K * H, D)
        yield prefix + "self_attn.o_proj.weight", (D, N * H)
        yield prefix + "post_attention_layernorm.weight", (D,)
        yield prefix + "mlp.gate_proj.weight", (F, D)
        yield prefix + "mlp.up_proj.weight", (F, D)
        yield prefix + "mlp.down_proj.weight", (D, F)
    yield "model.norm.weight", (D,)


def write_checkpoint(directory: Path, seed: int = 0) -> Path:
    """Returns `directory`, after writing the checkpoint there unless it stands already.

    Matrices are normal with standard deviation 0.02 in bfloat16, norms are one; `seed` fixes every
    bit.
    """
    config = directory / "config.json"
    if config.exists():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in shapes():
        if len(shape) == 1:
            weights[name] = np.ones(shape, ml_dtypes.bfloat16)
        else:
            values = rng.standard_normal(shape, np.float32) * CONFIG["initializer_range"]
            weights[name] = values.astype(ml_dtypes.bfloat16)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    generation = json.dumps(GENERATION_CONFIG, indent=2)
    (directory / "generation_config.json").write_text(generation + "\n")
    # Last, because its presence says that the checkpoint is whole.
    config.write_text(json.dumps(CONFIG, indent=2) + "\n")
    return directory


if __name__ == "__main__":
    print(write_checkpoint(Path(sys.argv[1])))
