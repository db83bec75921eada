"""Writes a trained model as a checkpoint directory that Hugging Face and jaxserve both load.

    python -m jaxserve.training.export --run DIR --to jaxserve/data/tiny

The directory holds bfloat16 `model.safetensors`, `config.json`, `generation_config.json` and the
tokenizer's two files.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from jaxserve.checkpoint.stored import stored_parameters
from jaxserve.errors import JaxserveError
from jaxserve.layers.decoder import Model, Params
from jaxserve.models.family import family_named
from jaxserve.training.shapes import TINY, TINY_DRAFT, Shape
from jaxserve.training.tokenizer import END, END_OF_TEXT, PAD, SPECIAL_TOKENS
from jaxserve.training.trainer import newest_params, training_model

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def export(shape: Shape, params: Params, tokenizer: Path, folder: Path) -> None:
    """Writes the checkpoint directory `folder`.

    Args:
        params: float32 tree of `training_model(shape)`.
        tokenizer: folder of the tokenizer's files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = named_tensors(training_model(shape), params)
    weights = folder / "model.safetensors"
    save_file(tensors, str(weights), metadata={"format": "pt"})
    weights.chmod(0o644)
    _write_json(folder / "config.json", llama_config(shape))
    _write_json(folder / "generation_config.json", generation_config())
    for name in TOKENIZER_FILES:
        shutil.copyfile(tokenizer / name, folder / name)


def named_tensors(model: Model, params: Params) -> dict[str, np.ndarray]:
    """Returns every weight in bfloat16, by its name and in its shape in a Llama checkpoint."""
    sources = family_named(model.config.family).sources(model.config)
    tensors: dict[str, np.ndarray] = {}
    for stored in stored_parameters(model):
        value: Any = params
        for key in stored.path:
            value = value[key]
        (piece,) = stored.pieces  # a model in training keeps every weight apart
        source = sources[piece.name]
        whole = np.asarray(value).reshape(source.shape)
        tensors[source.tensor] = whole.astype(ml_dtypes.bfloat16)
    return tensors


def llama_config(shape: Shape) -> dict[str, Any]:
    """Returns the config.json of a shape."""
    config = shape.config()
    assert config.final_norm is not None
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": shape.embed_dim,
        "intermediate_size": shape.ffn_dim,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.final_norm.eps,
        "rope_theta": 10_000.0,
        "max_position_embeddings": config.max_context_tokens,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": SPECIAL_TOKENS.index(END_OF_TEXT),
        "eos_token_id": SPECIAL_TOKENS.index(END_OF_TEXT),
        "pad_token_id": SPECIAL_TOKENS.index(PAD),
        "torch_dtype": "bfloat16",
    }


def generation_config() -> dict[str, Any]:
    """Returns the generation_config.json: moderate sampling, ends of text and of a chat turn."""
    return {
        "bos_token_id": SPECIAL_TOKENS.index(END_OF_TEXT),
        "eos_token_id": [SPECIAL_TOKENS.index(END_OF_TEXT), SPECIAL_TOKENS.index(END)],
        "pad_token_id": SPECIAL_TOKENS.index(PAD),
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.95,
    }


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code of the command."""
    parser = argparse.ArgumentParser(prog="python -m jaxserve.training.export")
    parser.add_argument("--run", type=Path, required=True, help="folder of a training run")
    parser.add_argument("--data", type=Path, help="tokenizer files; default RUN/data")
    parser.add_argument("--to", type=Path, required=True, help="checkpoint directory to write")
    parser.add_argument("--draft", action="store_true", help="the run trained the draft model")
    options = parser.parse_args(arguments)
    shape = TINY_DRAFT if options.draft else TINY
    try:
        params = newest_params(shape, options.run / "checkpoints")
        export(shape, params, options.data or options.run / "data", options.to)
    except JaxserveError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
