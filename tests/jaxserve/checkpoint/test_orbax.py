"""Converted checkpoints: whole or not there, and the same numbers on any mesh."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxserve.checkpoint import Format, convert, inspect, load_params
from jaxserve.checkpoint import orbax as orbax_module
from jaxserve.checkpoint.manifest import NAME
from jaxserve.errors import CheckpointError, UsageError
from jaxserve.layers.decoder import Model
from jaxserve.layers.param import Declare, Orientation
from jaxserve.partitioning.layout import Ffn, Heads, PhaseLayout
from jaxserve.partitioning.mesh import MeshPlan, make_mesh, places

MESHES = [(1, 1, 1), (2, 2, 2), (8, 1, 1), (1, 2, 4)]


def on_mesh(*sizes: int):
    return places(make_mesh(MeshPlan(*sizes)), PhaseLayout(Ffn.WS2D, Heads.HEADS))


@pytest.fixture
def converted(llama, tmp_path: Path) -> Path:
    llama.write_json("generation_config.json", {"temperature": 0.5})
    llama.write_json("tokenizer.json", {"version": "1.0"})
    (llama.path / "pytorch_model.bin").write_bytes(b"left behind")
    convert(llama.path, tmp_path / "out")
    return tmp_path / "out"


def same_bits(a, b) -> None:
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_both_formats_load_by_the_same_call_to_the_same_bits(make, tmp_path: Path, dtype: str):
    source = make(dtype=dtype)
    found = convert(source.path, tmp_path / "out")
    original = inspect(source.path)
    assert (found.format, found.dtype) == (Format.ORBAX, dtype)
    assert (found.config, found.num_parameters) == (original.config, original.num_parameters)
    for declare in (Declare(dtype, Orientation.OUT_IN, True), Declare("float32")):
        model = Model(original.config, declare)
        jax.tree.map(same_bits, load_params(found, model), load_params(original, model))


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("declare", [Declare("bfloat16", Orientation.OUT_IN, True), Declare()])
@pytest.mark.parametrize("form", Format)
def test_every_mesh_holds_the_same_bits(llama, converted: Path, mesh, declare, form: Format):
    path = converted if form is Format.ORBAX else llama.path
    info = inspect(path)
    assert info.format is form
    model = Model(info.config, declare)
    one = load_params(llama.path, model)
    many = load_params(info, model, on_mesh(*mesh))
    jax.tree.map(same_bits, many, one)
    ffn = many["layers"][0]["mlp"]["down"]["values"]
    x, y, z = mesh
    assert len(ffn.sharding.device_set) == x * y * z
    assert ffn.addressable_shards[0].data.size == ffn.size // (x * y * z)


def test_the_directory_stands_alone(llama, converted: Path):
    names = {path.name for path in converted.iterdir()}
    companions = {"config.json", "generation_config.json", "tokenizer.json"}
    assert names == {NAME, "params"} | companions
    assert inspect(converted).generation.temperature == 0.5
    manifest = json.loads((converted / NAME).read_text())
    assert manifest["family"] == "llama"
    assert manifest["dtype"] == "bfloat16"
    assert manifest["tensors"]["layers.1.attention.q"] == {
        "dtype": "bfloat16",
        "shape": [8, 10, 48],
    }


def test_orbax_itself_reads_what_was_written(llama, converted: Path):
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        tree = checkpointer.restore(converted / "params")
    assert tree.keys() == inspect(converted).tensors.keys()
    same_bits(tree["embedding"], llama.tensors["model.embed_tokens.weight"])
    q = llama.tensors["model.layers.0.self_attn.q_proj.weight"]
    same_bits(tree["layers.0.attention.q"], q.reshape(8, 10, 48))


def test_loading_does_not_import_orbax(converted: Path):
    code = (
        "import sys; from jaxserve.checkpoint import inspect, load_params;"
        "from jaxserve.layers.decoder import Model; from jaxserve.layers.param import Declare;"
        "info = inspect(sys.argv[1]); load_params(info, Model(info.config, Declare()));"
        "sys.exit('orbax.checkpoint' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, converted]).returncode == 0


def test_a_directory_with_odd_characters_loads(llama, tmp_path: Path):
    out = tmp_path / "a b %20 é#?"
    info = convert(llama.path, out)
    load_params(info, Model(info.config, Declare()))


def test_a_large_array_is_cut_so_that_slices_are_read_alone(llama, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(orbax_module, "_CHUNK_BYTES", 1000)
    info = convert(llama.path, tmp_path / "out")
    model = Model(info.config, Declare("bfloat16", Orientation.OUT_IN, True))
    mesh = on_mesh(2, 2, 2)
    jax.tree.map(same_bits, load_params(info, model, mesh), load_params(llama.path, model))
    reader = orbax_module.OrbaxReader(info.path, info.tensors)
    chunk = reader._array("embedding").chunk_layout.read_chunk.shape
    assert np.prod(chunk) * 2 <= 1000


@pytest.mark.parametrize("how", ["file", "full directory", "link"])
def test_nothing_is_overwritten(llama, tmp_path: Path, how: str):
    out = tmp_path / "out"
    if how == "file":
        out.write_text("mine")
    elif how == "link":
        out.symlink_to(tmp_path / "nowhere")
    else:
        out.mkdir()
        (out / "mine").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match="give a new or empty directory"):
        convert(llama.path, out)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_empty_directory_and_missing_parents_are_fine(llama, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    convert(llama.path, tmp_path / "empty")
    convert(llama.path, tmp_path / "new" / "deep" / "out")


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), ValueError("No space left on device")]
)
def test_a_failed_conversion_leaves_nothing(llama, tmp_path: Path, monkeypatch, error):
    import orbax.checkpoint as ocp

    def fail(*args):
        raise error

    monkeypatch.setattr(ocp.Checkpointer, "save", fail)
    with pytest.raises(CheckpointError, match="No space left"):
        convert(llama.path, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [llama.path.name]


def test_a_damaged_source_is_not_converted(llama, tmp_path: Path):
    del llama.tensors["model.norm.weight"]
    llama.write_tensors()
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        convert(llama.path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_converting_a_converted_checkpoint_is_refused(converted: Path, tmp_path: Path):
    with pytest.raises(UsageError, match="already"):
        convert(converted, tmp_path / "again")


def test_the_result_can_be_read_like_any_new_directory(converted: Path):
    mask = os.umask(0)
    os.umask(mask)
    assert converted.stat().st_mode & 0o777 == 0o777 & ~mask


def data_file(converted: Path) -> Path:
    return max((converted / "params").rglob("d/*"), key=lambda path: path.stat().st_size)


def refused(converted: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        inspect(converted)
    return str(caught.value)


def test_a_missing_data_file_is_named(converted: Path):
    data_file(converted).unlink()
    message = refused(converted)
    assert "missing" in message
    assert f"{converted / 'params'}" in message


def test_a_truncated_data_file_is_found_without_reading_it(converted: Path):
    path = data_file(converted)
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size - 10)
    message = refused(converted)
    assert str(path) in message
    assert f"expected {size} bytes, found {size - 10}" in message


def test_a_damaged_array_is_an_error_of_the_checkpoint(converted: Path):
    for path in (converted / "params").rglob("manifest.ocdbt"):
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 0xFF
        path.write_bytes(raw)
    info = inspect(converted)
    with pytest.raises(CheckpointError, match="embedding"):
        load_params(info, Model(info.config, Declare()))


def test_an_array_that_the_manifest_describes_otherwise_is_refused(converted: Path):
    manifest = json.loads((converted / NAME).read_text())
    manifest["tensors"]["embedding"]["dtype"] = "float32"
    (converted / NAME).write_text(json.dumps(manifest))
    info = inspect(converted)
    with pytest.raises(
        CheckpointError, match=r"'embedding' is bfloat16\[104, 48\], expected float32"
    ):
        load_params(info, Model(info.config, Declare()))


def test_a_directory_without_its_manifest_is_incomplete(converted: Path):
    (converted / NAME).unlink()
    assert "incomplete" in refused(converted)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 2}, "version 2 cannot be read, expected 1"),
        ({"version": None}, "version None"),
        ({"tensors": []}, "damaged"),
        ({"files": None}, "damaged"),
        ({"shiny": 1}, "shiny"),
        ({"family": "falcon"}, "family 'falcon'"),
    ],
)
def test_a_wrong_manifest_is_named(converted: Path, change, words: str):
    manifest = json.loads((converted / NAME).read_text())
    (converted / NAME).write_text(json.dumps({**manifest, **change}))
    message = refused(converted)
    assert NAME in message
    assert words in message


def test_manifest_and_config_must_agree(converted: Path):
    path = converted / "config.json"
    config = json.loads(path.read_text())
    for change, words in (
        ({"num_hidden_layers": 3}, "'layers.2.attention.k'"),
        ({"num_hidden_layers": 1}, "'layers.1.attention.k'"),
        ({"vocab_size": 105}, "'embedding' has the wrong shape: expected [105, 48]"),
    ):
        path.write_text(json.dumps(config | change))
        assert words in refused(converted)
