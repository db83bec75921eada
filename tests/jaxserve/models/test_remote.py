"""Models whose code is not in transformers, against forwards written down in float64.

Sources: Yang et al. 2023, Baichuan 2 (section 2.2 and 2.3); Press et al. 2022 for its 13B's ALiBi;
the model card of ChatGLM2-6B with Su et al. 2021, neighbouring pairs, on half of each head; the
model card of DeciLM-6B, which is Llama with key heads in numbers that vary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxserve.api import LLM

from .conftest import Forward, Load

WIDTH, FFN, VOCAB, HEADS, LAYERS = 24, 28, 61, 4, 3
HEAD = WIDTH // HEADS
NEW_TOKENS = 32
SEEDS = {"baichuan-rope": 0, "baichuan-alibi": 1, "chatglm": 0, "decilm": 0}
"""Weights whose likeliest tokens are no near-ties and do not repeat."""
PROMPT = np.random.default_rng(1).integers(VOCAB, size=13)

Tensors = dict[str, np.ndarray]
Rotate = Callable[[np.ndarray, int], np.ndarray]


@dataclass
class Layer:
    """Weights of a layer, outputs first, in float64; of fused ones the parts."""

    norms: tuple[np.ndarray, np.ndarray]
    qkv: tuple[np.ndarray, np.ndarray, np.ndarray]
    biases: tuple[np.ndarray | float, ...]
    out: np.ndarray
    gate: np.ndarray
    up: np.ndarray
    down: np.ndarray


def rms(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2) + eps) * scale


def halves(x: np.ndarray, position: int) -> np.ndarray:
    """Turns feature i of each head with feature i + half."""
    half = x.shape[-1] // 2
    angles = position * 10_000.0 ** (-np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def neighbours_of_half(x: np.ndarray, position: int) -> np.ndarray:
    """Turns features 0 and 1, 2 and 3, ... of the first half of each head."""
    pairs = x.shape[-1] // 4
    angles = position * 10_000.0 ** (-np.arange(pairs) / pairs)
    turned = (x[..., : 2 * pairs : 2] + 1j * x[..., 1 : 2 * pairs : 2]) * np.exp(1j * angles)
    found = x.copy()
    found[..., : 2 * pairs : 2], found[..., 1 : 2 * pairs : 2] = turned.real, turned.imag
    return found


def as_it_is(x: np.ndarray, position: int) -> np.ndarray:
    return x


@dataclass
class Reference:
    """A model token by token; slopes are of ALiBi, one a head."""

    embedding: np.ndarray
    layers: Sequence[Layer]
    final: np.ndarray
    head: np.ndarray
    rotate: Rotate
    eps: float
    slopes: Sequence[float] = (0.0,) * HEADS
    head_dim: int = WIDTH // HEADS

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Returns float64[L, V]."""
        cache: list[tuple[list[np.ndarray], list[np.ndarray]]] = [([], []) for _ in self.layers]
        found = []
        for position, token in enumerate(tokens):
            x = self.embedding[token]
            for layer, kept in zip(self.layers, cache, strict=True):
                x = self.block(x, layer, kept, position)
            found.append(self.head @ rms(x, self.final, self.eps))
        return np.stack(found)

    def block(self, x: np.ndarray, layer: Layer, kept: Any, position: int) -> np.ndarray:
        h = rms(x, layer.norms[0], self.eps)
        q, k, v = (
            (w @ h + bias).reshape(-1, self.head_dim)
            for w, bias in zip(layer.qkv, layer.biases, strict=True)
        )
        keys, values = kept
        keys.append(self.rotate(k, position))
        values.append(v)
        q, group = self.rotate(q, position), HEADS // len(k)
        heads = []
        for head in range(HEADS):
            own = np.stack([key[head // group] for key in keys])
            distance = position - np.arange(position + 1)
            scores = own @ q[head] / np.sqrt(self.head_dim) - self.slopes[head] * distance
            chances = np.exp(scores - scores.max())
            chances /= chances.sum()
            heads.append(chances @ np.stack([value[head // group] for value in values]))
        x = x + layer.out @ np.concatenate(heads)
        h = rms(x, layer.norms[1], self.eps)
        gate = layer.gate @ h
        return x + layer.down @ (gate / (1 + np.exp(-gate)) * (layer.up @ h))


@dataclass
class Model:
    """A checkpoint and what it should compute."""

    config: dict[str, Any]
    tensors: Tensors
    reference: Reference


def draw(shapes: dict[str, tuple[int, ...]], seed: int) -> Tensors:
    """Returns weights by their names in the checkpoint; norms about one, biases about zero."""
    rng, found = np.random.default_rng(seed), {}
    for name, shape in shapes.items():
        values = rng.normal(size=shape)
        if len(shape) > 1:
            values *= 1.0 if "embed" in name else 1.5 / np.sqrt(shape[-1])
        else:
            values = 0.3 * values + ("bias" not in name)
        found[name] = values.astype(np.float32)
    return found


def baichuan(alibi: bool, seed: int) -> Model:
    config = {
        "architectures": ["BaichuanForCausalLM"],
        "model_type": "baichuan",
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "rms_norm_eps": 1e-6,
        "model_max_length" if alibi else "max_position_embeddings": 64,
    }
    shapes: dict[str, tuple[int, ...]] = {"self_attn.W_pack": (3 * WIDTH, WIDTH)}
    shapes |= {"self_attn.o_proj": (WIDTH, WIDTH), **GATED}
    tensors = draw(llama_names([shapes] * LAYERS), seed)
    wide = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    layers = [
        llama_layer(wide, index, np.split(wide[f"model.layers.{index}.self_attn.W_pack.weight"], 3))
        for index in range(LAYERS)
    ]
    head = wide["lm_head.weight"]
    reference = Reference(
        wide["model.embed_tokens.weight"],
        layers,
        wide["model.norm.weight"],
        head / np.linalg.norm(head, axis=1, keepdims=True),
        as_it_is if alibi else halves,
        1e-6,
        # Four heads: 2 ** -2, 2 ** -4, 2 ** -6, 2 ** -8.
        [2.0 ** (-2 * head - 2) if alibi else 0.0 for head in range(HEADS)],
    )
    return Model(config, tensors, reference)


def decilm(seed: int) -> Model:
    kv_heads = [4, 1, 2]
    config = {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": "deci",
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads_per_layer": kv_heads,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64,
    }
    shapes = [
        {
            "self_attn.q_proj": (WIDTH, WIDTH),
            "self_attn.k_proj": (number * HEAD, WIDTH),
            "self_attn.v_proj": (number * HEAD, WIDTH),
            "self_attn.o_proj": (WIDTH, WIDTH),
            **GATED,
        }
        for number in kv_heads
    ]
    tensors = draw(llama_names(shapes), seed)
    wide = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    layers = [
        llama_layer(
            wide,
            index,
            [wide[f"model.layers.{index}.self_attn.{name}_proj.weight"] for name in "qkv"],
        )
        for index in range(LAYERS)
    ]
    outer = (wide["model.embed_tokens.weight"], layers, wide["model.norm.weight"])
    return Model(config, tensors, Reference(*outer, wide["lm_head.weight"], halves, 1e-5))


GATED = {
    "mlp.gate_proj": (FFN, WIDTH),
    "mlp.up_proj": (FFN, WIDTH),
    "mlp.down_proj": (WIDTH, FFN),
}


def llama_names(layers: Sequence[dict[str, tuple[int, ...]]]) -> dict[str, tuple[int, ...]]:
    """Returns shapes by the names of a whole checkpoint."""
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, WIDTH),
        "model.norm.weight": (WIDTH,),
        "lm_head.weight": (VOCAB, WIDTH),
    }
    for index, shapes in enumerate(layers):
        stored = f"model.layers.{index}"
        found |= {f"{stored}.{name}.weight": shape for name, shape in shapes.items()}
        found |= {
            f"{stored}.{norm}.weight": (WIDTH,)
            for norm in ("input_layernorm", "post_attention_layernorm")
        }
    return found


def llama_layer(wide: Tensors, index: int, qkv: Sequence[np.ndarray]) -> Layer:
    stored = f"model.layers.{index}"
    q, k, v = qkv
    return Layer(
        (
            wide[f"{stored}.input_layernorm.weight"],
            wide[f"{stored}.post_attention_layernorm.weight"],
        ),
        (q, k, v),
        (0.0, 0.0, 0.0),
        wide[f"{stored}.self_attn.o_proj.weight"],
        *(wide[f"{stored}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down")),
    )


def chatglm(seed: int) -> Model:
    head, kv_heads = 8, 2
    config = {
        "architectures": ["ChatGLMModel"],
        "model_type": "chatglm",
        "padded_vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "ffn_hidden_size": FFN,
        "num_layers": LAYERS,
        "num_attention_heads": HEADS,
        "kv_channels": head,
        "multi_query_attention": True,
        "multi_query_group_num": kv_heads,
        "add_qkv_bias": True,
        "layernorm_epsilon": 1e-5,
        "seq_length": 64,
        "vocab_size": VOCAB - 1,
        "apply_query_key_layer_scaling": True,
    }
    rows = (HEADS * head, kv_heads * head, kv_heads * head)
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.embedding.word_embeddings.weight": (VOCAB, WIDTH),
        "transformer.encoder.final_layernorm.weight": (WIDTH,),
        "transformer.output_layer.weight": (VOCAB, WIDTH),
    }
    for index in range(LAYERS):
        stored = f"transformer.encoder.layers.{index}"
        shapes |= {
            f"{stored}.input_layernorm.weight": (WIDTH,),
            f"{stored}.post_attention_layernorm.weight": (WIDTH,),
            f"{stored}.self_attention.query_key_value.weight": (sum(rows), WIDTH),
            f"{stored}.self_attention.query_key_value.bias": (sum(rows),),
            f"{stored}.self_attention.dense.weight": (WIDTH, HEADS * head),
            f"{stored}.mlp.dense_h_to_4h.weight": (2 * FFN, WIDTH),
            f"{stored}.mlp.dense_4h_to_h.weight": (WIDTH, FFN),
        }
    tensors = draw(shapes, seed)
    wide = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}

    def layer(index: int) -> Layer:
        stored = f"transformer.encoder.layers.{index}"
        ends = np.cumsum(rows)[:-1]
        fused = f"{stored}.self_attention.query_key_value"
        q, k, v = np.split(wide[f"{fused}.weight"], ends)
        gate, up = np.split(wide[f"{stored}.mlp.dense_h_to_4h.weight"], 2)
        return Layer(
            (
                wide[f"{stored}.input_layernorm.weight"],
                wide[f"{stored}.post_attention_layernorm.weight"],
            ),
            (q, k, v),
            tuple(np.split(wide[f"{fused}.bias"], ends)),
            wide[f"{stored}.self_attention.dense.weight"],
            gate,
            up,
            wide[f"{stored}.mlp.dense_4h_to_h.weight"],
        )

    reference = Reference(
        wide["transformer.embedding.word_embeddings.weight"],
        [layer(index) for index in range(LAYERS)],
        wide["transformer.encoder.final_layernorm.weight"],
        wide["transformer.output_layer.weight"],
        neighbours_of_half,
        1e-5,
        head_dim=head,
    )
    return Model(config, tensors, reference)


MODELS: dict[str, Callable[[int], Model]] = {
    "baichuan-rope": lambda seed: baichuan(False, seed),
    "baichuan-alibi": lambda seed: baichuan(True, seed),
    "chatglm": chatglm,
    "decilm": decilm,
}


def checkpoint(directory: Path, model: Model) -> Path:
    save_file(model.tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(model.config), encoding="utf-8")
    return directory


@pytest.mark.parametrize("name", MODELS)
def test_float32_logits_are_those_of_the_definition(
    name: str, tmp_path: Path, load: Load, logits_of: Forward
) -> None:
    model = MODELS[name](0)
    wanted = model.reference.logits(PROMPT.tolist())
    found = logits_of(load(checkpoint(tmp_path, model), "float32"), PROMPT)
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()


@pytest.mark.parametrize("name", MODELS)
def test_the_engine_gives_the_likeliest_tokens_of_the_definition(
    name: str, tmp_path: Path, load: Load
) -> None:
    model = MODELS[name](SEEDS[name])
    tokens = PROMPT.tolist()
    for _ in range(NEW_TOKENS):
        last = model.reference.logits(tokens)[-1]
        first, second = np.sort(last)[:-3:-1]
        assert first - second > 2e-3 * np.abs(last).max(), "a near-tie: take another seed"
        tokens.append(int(last.argmax()))
    wanted = tokens[len(PROMPT) :]
    assert len(set(wanted)) >= 8
    program, params = load(checkpoint(tmp_path, model), "float32")
    llm = LLM(program.model.config, params, declare=program.model.declare)
    found = llm.generate(PROMPT.tolist(), temperature=0.0, max_tokens=NEW_TOKENS)
    assert list(found.token_ids) == wanted
