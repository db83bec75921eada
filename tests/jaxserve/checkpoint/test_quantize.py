"""Weights rounded to int8: by hand, from either format, on a mesh, and written out."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

from jaxserve.checkpoint import convert, inspect, load_params
from jaxserve.checkpoint.load import open_reader
from jaxserve.checkpoint.quantize import QuantizingReader, quantized_names
from jaxserve.cli import app
from jaxserve.config import Quantization
from jaxserve.errors import UsageError
from jaxserve.layers.decoder import Model
from jaxserve.layers.param import Declare, Orientation
from jaxserve.partitioning.layout import Ffn, Heads, PhaseLayout
from jaxserve.partitioning.mesh import MeshPlan, make_mesh, places
from jaxserve.serving.model_files import quantization

INT8 = Quantization.INT8


def rounded(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (int8[outputs, inputs], float32[outputs]) of a matrix."""
    wide = weight.astype(np.float32)
    scales = np.abs(wide).max(axis=1) / np.float32(127)
    return np.rint(wide / scales[:, None]).astype(np.int8), scales


def same(found: object, expected: object) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_channels_are_rounded_by_their_largest_weight(llama) -> None:
    declare = Declare("bfloat16", Orientation.OUT_IN, quantize=INT8)
    params = load_params(llama.path, Model(inspect(llama.path).config, declare))
    q = params["layers"][0]["attention"]["qkv"]["separate"]["q"]
    values, scales = rounded(llama.tensors["model.layers.0.self_attn.q_proj.weight"])
    np.testing.assert_array_equal(q["values"], values.reshape(8, 10, 48))
    np.testing.assert_allclose(q["scales"], scales.reshape(8, 10), rtol=1e-7)
    assert q["values"].dtype == jnp.int8 and q["scales"].dtype == jnp.float32
    assert np.abs(np.asarray(q["values"])).max(axis=2).min() == 127
    table = params["embedding"]
    values, scales = rounded(llama.tensors["model.embed_tokens.weight"])
    np.testing.assert_array_equal(table["values"], values)
    assert params["layers"][0]["mlp_norm"]["scale"].dtype == jnp.bfloat16


@pytest.mark.parametrize("ffn", [Ffn.WS1D, Ffn.WS2D])
def test_a_mesh_holds_parts_of_the_same_numbers(llama, ffn: Ffn) -> None:
    model = Model(inspect(llama.path).config, Declare("bfloat16", quantize=INT8))
    mesh = make_mesh(MeshPlan(2, 2, 2))
    on_mesh = load_params(llama.path, model, places(mesh, PhaseLayout(ffn, Heads.HEADS)))
    same(on_mesh, load_params(llama.path, model))


def test_fused_weights_keep_the_scales_of_each(llama) -> None:
    config = inspect(llama.path).config
    fused = load_params(llama.path, Model(config, Declare("bfloat16", fuse=True, quantize=INT8)))
    apart = load_params(llama.path, Model(config, Declare("bfloat16", quantize=INT8)))
    one = fused["layers"][1]["mlp"]["hidden"]["fused"]["scales"]
    each = apart["layers"][1]["mlp"]["hidden"]["separate"]
    expected = jnp.concatenate([each["gate"]["scales"], each["up"]["scales"]])
    np.testing.assert_array_equal(one, expected)


def test_a_channel_of_zeros_stays_zero(llama) -> None:
    llama.tensors["model.layers.0.mlp.down_proj.weight"][3] = 0
    llama.write_tensors()
    info = inspect(llama.path)
    names = quantized_names(Model(info.config, Declare(quantize=INT8)))
    reader = QuantizingReader(open_reader(info), names)
    assert not reader.read("layers.0.mlp.down", ())[3].any()
    assert reader.read("layers.0.mlp.down.scales", ())[3] == 1


def test_a_written_checkpoint_holds_what_loading_rounds(llama, tmp_path: Path) -> None:
    info = convert(llama.path, tmp_path / "small", quantize=INT8)
    assert (info.quantize, info.dtype) == ("int8", "bfloat16")
    assert info.num_parameters == inspect(llama.path).num_parameters
    assert info.nbytes < 0.6 * inspect(llama.path).nbytes
    model = Model(info.config, Declare("bfloat16", fuse=True, quantize=INT8))
    same(load_params(info, model), load_params(llama.path, model))


def test_a_rounded_checkpoint_is_not_loaded_as_another(llama, tmp_path: Path) -> None:
    info = convert(llama.path, tmp_path / "small", quantize=Quantization.W8A8)
    with pytest.raises(UsageError, match="holds weights rounded to int8"):
        load_params(info, Model(info.config, Declare("bfloat16")))


def test_what_was_asked_for_comes_before_what_a_checkpoint_says(llama, tmp_path: Path) -> None:
    plain = inspect(llama.path)
    written = convert(llama.path, tmp_path / "small", quantize=Quantization.W8A8)
    assert quantization(None, plain) is None
    assert quantization("int8", plain) is INT8
    assert quantization(None, written) is Quantization.W8A8
    assert quantization("int8", written) is INT8
    with pytest.raises(UsageError, match="quantize='int4' is not supported; use int8 or w8a8"):
        quantization("int4", plain)


def test_the_command_writes_a_checkpoint_that_runs_by_itself(tmp_path: Path) -> None:
    run, small = CliRunner(), str(tmp_path / "small")
    assert run.invoke(app, ["quantize", "tiny", small, "--method", "w8a8"]).exit_code == 0
    prompt = ["generate", "import ", "--max-tokens", "8", "--temperature", "0", "--json"]
    written = run.invoke(app, [*prompt, "--model", small])
    assert written.exit_code == 0, written.output
    loaded = run.invoke(app, [*prompt, "--quantize", "w8a8"])
    assert written.stdout == loaded.stdout
