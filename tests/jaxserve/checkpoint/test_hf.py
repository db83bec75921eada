"""Which files of a Hugging Face directory are its weights."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxserve.checkpoint.hf import INDEX, SINGLE, tensor_table
from jaxserve.errors import CheckpointError, JaxserveError, UnsupportedError


def refused(checkpoint, kind: type[JaxserveError] = CheckpointError) -> str:
    with pytest.raises(kind) as caught:
        tensor_table(checkpoint.path)
    return str(caught.value)


@pytest.mark.parametrize("shards", [1, 3])
def test_the_table_lists_every_tensor_of_every_file(make, shards: int):
    checkpoint = make(shards=shards)
    table = tensor_table(checkpoint.path)
    assert {name: info.shape for name, info in table.items()} == {
        name: array.shape for name, array in checkpoint.tensors.items()
    }
    assert len({info.file for info in table.values()}) == shards


def test_a_missing_shard_is_named(make):
    checkpoint = make(shards=3)
    (checkpoint.path / "model-00002-of-00003.safetensors").unlink()
    message = refused(checkpoint)
    assert INDEX in message
    assert "'model-00002-of-00003.safetensors'" in message


def test_a_tensor_that_its_shard_lacks_is_named(make):
    checkpoint = make(shards=2)
    names = checkpoint.index()
    checkpoint.write_json(INDEX, {"weight_map": {**names, "ghost": names["lm_head.weight"]}})
    message = refused(checkpoint)
    assert "'ghost'" in message
    assert names["lm_head.weight"] in message


def test_a_tensor_that_the_index_lacks_is_named(make):
    checkpoint = make(shards=2)
    names = checkpoint.index()
    shard = names.pop("lm_head.weight")
    checkpoint.write_json(INDEX, {"weight_map": names})
    message = refused(checkpoint)
    assert "'lm_head.weight'" in message
    assert shard in message


def test_a_tensor_in_another_shard_than_the_index_says_is_refused(make):
    checkpoint = make(shards=2)
    names = checkpoint.index()
    there = names["lm_head.weight"]
    elsewhere = next(name for name in names.values() if name != there)
    checkpoint.write_json(INDEX, {"weight_map": {**names, "lm_head.weight": elsewhere}})
    message = refused(checkpoint)
    assert "'lm_head.weight'" in message
    assert there in message
    assert elsewhere in message


def test_a_tensor_in_two_shards_is_refused(make):
    checkpoint = make(shards=2)
    shard = "model-00001-of-00002.safetensors"
    held = {n: checkpoint.tensors[n] for n, s in checkpoint.index().items() if s == shard}
    other = next(n for n, s in checkpoint.index().items() if s != shard)
    save_file({**held, other: np.zeros(1, np.float32)}, checkpoint.path / shard)
    message = refused(checkpoint)
    assert f"tensor {other!r} is both in" in message
    assert "model-00002-of-00002.safetensors" in message


def test_a_shard_of_another_checkpoint_is_not_passed_over(make):
    checkpoint = make(shards=2)
    first = checkpoint.path / "model-00001-of-00002.safetensors"
    shutil.copy(first, checkpoint.path / "model-00003-of-00003.safetensors")
    assert "'model-00003-of-00003.safetensors'" in refused(checkpoint)


def test_an_index_cannot_lead_out_of_the_directory(make):
    checkpoint = make(shards=2)
    names = checkpoint.index()
    for outside in ("../model.safetensors", "/etc/passwd", 3, ""):
        checkpoint.write_json(INDEX, {"weight_map": {**names, "lm_head.weight": outside}})
        assert f"{outside!r}" in refused(checkpoint)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}'])
def test_a_broken_index_is_named(make, text: str):
    checkpoint = make(shards=2)
    (checkpoint.path / INDEX).write_text(text)
    assert INDEX in refused(checkpoint)


def test_one_file_and_shards_together_are_ambiguous(make):
    checkpoint = make(shards=2)
    save_file(checkpoint.tensors, checkpoint.path / SINGLE)
    assert "both" in refused(checkpoint)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt", "weights.pkl"]
)
def test_pickles_are_refused_with_the_reason(llama, name: str):
    (llama.path / SINGLE).rename(llama.path / name)
    message = refused(llama, UnsupportedError)
    assert f"{name!r}" in message
    assert "runs any code" in message
    assert "safe_serialization=True" in message


def test_pickles_beside_safetensors_are_never_opened(llama):
    (llama.path / "pytorch_model.bin").write_bytes(b"not a pickle")
    assert tensor_table(llama.path)


def test_other_safetensors_files_are_not_taken_for_the_weights(llama):
    (llama.path / SINGLE).rename(llama.path / "consolidated.safetensors")
    message = refused(llama)
    assert "'consolidated.safetensors'" in message
    assert SINGLE in message
    (llama.path / "consolidated.safetensors").unlink()
    assert "no .safetensors file at all" in refused(llama)


def test_an_adapter_is_not_passed_over(llama):
    (llama.path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    assert "adapter" in refused(llama, UnsupportedError)
