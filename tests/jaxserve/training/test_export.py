from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
from ml_dtypes import bfloat16
from safetensors.numpy import load_file

from jaxserve.models.family import family_for
from jaxserve.training.export import export, llama_config
from jaxserve.training.shapes import TINY_DRAFT, Shape
from jaxserve.training.tokenizer import train_tokenizer, write_tokenizer
from jaxserve.training.trainer import training_model

SMALL = Shape("small", 32, 2, 4, 2, 8, 48)


def test_an_exported_directory_describes_the_model_that_was_trained(tmp_path: Path) -> None:
    params = training_model(SMALL).init(jax.random.key(0))
    write_tokenizer(train_tokenizer(["a b"], 300), tmp_path / "data")
    export(SMALL, params, tmp_path / "data", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    family = family_for(found)
    config = family.config(found)
    assert config == SMALL.config()
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    expected = {source.tensor: source.shape for source in family.sources(config).values()}
    assert {name: tensor.shape for name, tensor in tensors.items()} == expected
    np.testing.assert_array_equal(
        tensors["model.layers.1.self_attn.o_proj.weight"],
        np.asarray(params["layers"][1]["attention"]["out"]["values"])
        .reshape(32, 32)
        .astype(bfloat16),
    )


def test_configs_of_the_embedded_models_are_read_without_loss() -> None:
    found = llama_config(TINY_DRAFT)
    assert family_for(found).config(found) == TINY_DRAFT.config()
