"""What `inspect` finds, and what it refuses, without reading a weight."""

import subprocess
import sys

import numpy as np
import pytest

from jaxserve.checkpoint import Format, inspect
from jaxserve.checkpoint.hf import SINGLE
from jaxserve.errors import CheckpointError, ConfigError, JaxserveError, UnsupportedError


def refused(checkpoint, kind: type[JaxserveError] = CheckpointError) -> str:
    with pytest.raises(kind) as caught:
        inspect(checkpoint.path)
    assert str(checkpoint.path) in str(caught.value)
    return str(caught.value)


def test_inspect_tells_what_the_directory_holds(llama):
    info = inspect(str(llama.path))
    assert (info.format, info.family, info.dtype) == (Format.SAFETENSORS, "llama", "bfloat16")
    assert info.config.num_layers == 2
    assert info.hf_config == llama.config
    assert info.generation.eos_token_ids == (2,)
    # By hand: embedding and head 2*104*48; a layer: q, out 2*80*48, k, v 2*40*48, three of
    # 56*48 and two norms of 48; a last norm.
    assert info.num_parameters == 9984 + 2 * (7680 + 3840 + 8064 + 96) + 48
    assert info.nbytes == 2 * info.num_parameters
    assert info.tensors["model.norm.weight"].shape == (48,)


def test_inspect_loads_no_jax(llama):
    code = (
        "import sys; from jaxserve.checkpoint import inspect; inspect(sys.argv[1]);"
        "sys.exit(bool({'jax', 'flax', 'orbax', 'tensorstore'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code, llama.path]).returncode == 0


def test_a_path_that_is_no_directory_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is not there"):
        inspect(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        inspect(tmp_path / "file")


def test_a_directory_without_config_is_refused(llama):
    (llama.path / "config.json").unlink()
    assert "has no config.json" in refused(llama)


@pytest.mark.parametrize("text", ["", "{", "3", '{"model_type": "llama", "model_type": "llama"}'])
def test_a_broken_config_is_refused(llama, text: str):
    (llama.path / "config.json").write_text(text)
    assert "config.json" in refused(llama)


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"architectures": ["T5Model"], "model_type": "t5"}, UnsupportedError, "T5Model"),
        ({"architectures": [], "model_type": None}, ConfigError, "architectures"),
        ({"hidden_act": "mish"}, UnsupportedError, "hidden_act"),
        ({"shiny": 1}, ConfigError, "shiny"),
        ({"hidden_size": None}, ConfigError, "hidden_size"),
    ],
)
def test_what_is_wrong_in_the_config_is_named_with_its_file(llama, changes, kind, words: str):
    llama.write_config(**changes)
    message = refused(llama, kind)
    assert "config.json" in message
    assert words in message


def test_quantised_checkpoints_are_refused_by_name(llama):
    llama.write_config(quantization_config={"quant_method": "gptq", "bits": 4})
    message = refused(llama, UnsupportedError)
    assert "quantization_config" in message
    assert "'gptq'" in message


def test_a_missing_tensor_is_named_with_its_shape(llama):
    del llama.tensors["model.layers.1.mlp.up_proj.weight"]
    llama.write_tensors()
    message = refused(llama)
    assert "'model.layers.1.mlp.up_proj.weight' is missing" in message
    assert "[56, 48]" in message
    assert SINGLE in message


def test_missing_tensors_are_counted(llama):
    llama.write_config(num_hidden_layers=3)
    assert "9 such" in refused(llama)


def test_an_extra_tensor_is_named(llama):
    llama.tensors["model.layers.0.self_attn.q_norm.weight"] = np.zeros(10, np.float32)
    llama.write_tensors()
    message = refused(llama)
    assert f"{llama.path / SINGLE}" in message
    assert "'model.layers.0.self_attn.q_norm.weight' float32[10]" in message


def test_layers_that_the_config_does_not_count_are_extra(llama):
    llama.write_config(num_hidden_layers=1)
    assert "'model.layers.1." in refused(llama)


def test_only_what_the_family_knows_is_passed_over(llama):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    llama.tensors[name] = np.zeros(5, np.float32)
    llama.write_tensors()
    info = inspect(llama.path)
    assert info.ignored == (name,)
    assert name not in info.tensors


def test_a_wrongly_shaped_tensor_names_both_shapes(llama):
    name = "model.layers.0.mlp.down_proj.weight"
    llama.tensors[name] = np.ascontiguousarray(llama.tensors[name].T)
    llama.write_tensors()
    message = refused(llama)
    assert f"{name!r}" in message
    assert "expected [48, 56]" in message
    assert "found [56, 48]" in message


def test_a_dtype_that_cannot_be_loaded_is_named(make):
    checkpoint = make(dtype="float64")
    message = refused(checkpoint, UnsupportedError)
    assert "float64" in message
    assert "bfloat16" in message


def test_a_truncated_file_is_found_without_reading_it(llama):
    with (llama.path / SINGLE).open("r+b") as file:
        file.truncate((llama.path / SINGLE).stat().st_size - 100)
    assert "truncated" in refused(llama)


def test_an_unsupported_generation_config_is_refused(llama):
    llama.write_json("generation_config.json", {"num_beams": 4})
    assert "num_beams=4" in refused(llama, UnsupportedError)
