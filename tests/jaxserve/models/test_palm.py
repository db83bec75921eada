"""PaLM against a forward written down from the paper, in float64, one token at a time.

Source: Chowdhery et al. 2022, section 2; norm, rotation and scaling of logits as in Google's
published inference code (google-research, scaling_transformer_inference_efficiency).
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from .conftest import Forward, Load

CONFIG: dict[str, Any] = {
    "architectures": ["PaLMForCausalLM"],
    "model_type": "palm",
    "vocab_size": 61,
    "hidden_size": 27,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "head_dim": 6,
    "max_position_embeddings": 64,
}
Tensors = dict[str, np.ndarray]


def random_tensors(config: dict[str, Any]) -> Tensors:
    """Returns weights, outputs first; norm scales away from one."""
    rng = np.random.default_rng(0)
    width, ffn = config["hidden_size"], config["intermediate_size"]
    heads, head = config["num_attention_heads"], config["head_dim"]
    shapes = {
        "self_attn.q_proj": (heads * head, width),
        "self_attn.k_proj": (head, width),
        "self_attn.v_proj": (head, width),
        "self_attn.o_proj": (width, heads * head),
        "mlp.gate_proj": (ffn, width),
        "mlp.up_proj": (ffn, width),
        "mlp.down_proj": (width, ffn),
    }
    tensors = {
        "model.embed_tokens.weight": rng.normal(size=(config["vocab_size"], width)),
        "model.norm.weight": 1 + 0.3 * rng.normal(size=width),
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        tensors[f"{prefix}.input_layernorm.weight"] = 1 + 0.3 * rng.normal(size=width)
        for name, (outputs, inputs) in shapes.items():
            weight = rng.normal(size=(outputs, inputs)) * 1.5 / np.sqrt(inputs)
            tensors[f"{prefix}.{name}.weight"] = weight
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}


def norm(x: np.ndarray, scale: np.ndarray, kind: str) -> np.ndarray:
    if kind == "layer_norm":
        x = x - x.mean()
    return x / np.sqrt((x**2).mean() + 1e-6) * scale


def rotate(x: np.ndarray, position: int) -> np.ndarray:
    """Turns feature i of each head together with feature i + half, slower for larger i."""
    half = x.shape[-1] // 2
    angles = position * 10_000.0 ** (-np.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    return np.concatenate(
        [
            first * np.cos(angles) - second * np.sin(angles),
            second * np.cos(angles) + first * np.sin(angles),
        ],
        axis=-1,
    )


def palm(tensors: Tensors, config: dict[str, Any], tokens: np.ndarray, kind: str) -> np.ndarray:
    """Returns float64[L, V], the logits of PaLM."""
    weights = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    head = config["head_dim"]
    embedding = weights["model.embed_tokens.weight"]
    keys: list[list[np.ndarray]] = [[] for _ in range(config["num_hidden_layers"])]
    values: list[list[np.ndarray]] = [[] for _ in range(config["num_hidden_layers"])]
    logits = []
    for position, token in enumerate(tokens):
        x = embedding[token]
        for layer in range(config["num_hidden_layers"]):

            def project(name: str, h: np.ndarray, prefix: str) -> np.ndarray:
                return weights[f"{prefix}.{name}_proj.weight"] @ h

            prefix = f"model.layers.{layer}"
            h = norm(x, weights[f"{prefix}.input_layernorm.weight"], kind)
            query = project("self_attn.q", h, prefix).reshape(-1, head)
            keys[layer].append(rotate(project("self_attn.k", h, prefix), position))
            values[layer].append(project("self_attn.v", h, prefix))
            scores = rotate(query, position) @ np.stack(keys[layer]).T / np.sqrt(head)
            chances = np.exp(scores - scores.max(axis=-1, keepdims=True))
            chances /= chances.sum(axis=-1, keepdims=True)
            attended = (chances @ np.stack(values[layer])).reshape(-1)
            gate = project("mlp.gate", h, prefix)
            fed = gate / (1 + np.exp(-gate)) * project("mlp.up", h, prefix)
            x = x + project("self_attn.o", attended, prefix) + project("mlp.down", fed, prefix)
        x = norm(x, weights["model.norm.weight"], kind)
        logits.append(embedding @ x / np.sqrt(len(x)))
    return np.stack(logits)


@pytest.mark.parametrize("kind", ["rms_norm", "layer_norm"])
def test_float32_logits_are_those_of_the_definition(
    kind: str, tmp_path: Path, load: Load, logits_of: Forward
) -> None:
    tensors = random_tensors(CONFIG)
    save_file(tensors, tmp_path / "model.safetensors")
    config = CONFIG | {"norm_type": kind}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tokens = np.random.default_rng(1).integers(CONFIG["vocab_size"], size=19)
    wanted = palm(tensors, CONFIG, tokens, kind)
    found = logits_of(load(tmp_path, "float32"), tokens)
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()
