"""Experts of int8 in whole models, from a checkpoint to logits, beside the unrounded ones."""

from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxserve as js
from jaxserve.pallas_kernels import BACKENDS

GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("quantize", "limit"), [("int8", 0.005), ("w8a8", 0.01)])
@pytest.mark.parametrize("model", ["mixtral", "qwen3_moe"])
def test_rounding_costs_little_of_what_a_model_predicts(
    model: str, quantize: str, limit: float, backend: str
) -> None:
    golden = load_file(GOLDEN / model / "golden.safetensors")
    llm = js.load(GOLDEN / model, dtype="float32", quantize=quantize, backend=backend)
    wanted = np.asarray(jax.nn.log_softmax(golden["logits"]))
    found = np.asarray(jax.nn.log_softmax(np.asarray(llm.logits(golden["prompt.0"]))))
    whole = -(np.exp(wanted) * wanted).sum(axis=-1).mean()
    loss = -(np.exp(wanted) * found).sum(axis=-1).mean()
    assert 1e-5 < loss / whole - 1 < limit
    expert = llm.params["layers"][0]["mlp"]["up"]
    assert expert["values"].dtype == np.int8
    assert expert["scales"].shape == expert["values"].shape[:2]
    assert llm.params["layers"][0]["mlp"]["router"]["values"].dtype == np.float32
