"""Reading and refusing the headers of safetensors files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxserve.checkpoint.header import read_header
from jaxserve.errors import CheckpointError

Raw = Callable[..., None]


def tensor(start: int, stop: int, dtype: Any = "U8", shape: list[Any] | None = None):
    return {"dtype": dtype, "shape": shape or [stop - start], "data_offsets": [start, stop]}


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_a_header_of_the_safetensors_library_is_read_exactly(tmp_path: Path):
    path = tmp_path / "a.safetensors"
    arrays = {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a": np.arange(4).astype(ml_dtypes.bfloat16),
        "scalar": np.array(1.5, np.float16),
        "empty": np.zeros((0, 3), np.int64),
        "flag": np.ones(3, bool),
    }
    save_file(arrays, path, metadata={"format": "pt"})
    found = read_header(path)
    assert set(found) == set(arrays)
    data = path.read_bytes()
    for name, array in arrays.items():
        info = found[name]
        assert (info.dtype, info.shape, info.nbytes) == (
            array.dtype.name,
            array.shape,
            array.nbytes,
        )
        assert info.offset is not None
        assert data[info.offset : info.offset + info.nbytes] == array.tobytes()


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_a_truncated_file_names_the_tensor_and_both_sizes(tmp_path: Path, raw: Raw, cut: int):
    path = tmp_path / "a"
    header = json.dumps({"one": tensor(0, 20), "two": tensor(20, 24)}).encode()
    raw(path, header, bytes(24 - min(cut, 24)))
    message = refused(path)
    assert "truncated" in message
    assert f"{'two' if cut <= 4 else 'one'!r}" in message
    assert f"found {path.stat().st_size}" in message


def test_bytes_after_the_last_tensor_are_refused(tmp_path: Path, raw: Raw):
    raw(tmp_path / "a", json.dumps({"one": tensor(0, 20)}).encode(), bytes(23))
    assert "3 bytes after its last tensor" in refused(tmp_path / "a")


@pytest.mark.parametrize("size", [0, 7])
def test_a_file_without_a_length_is_refused(tmp_path: Path, size: int):
    (tmp_path / "a").write_bytes(bytes(size))
    assert f"{size} bytes" in refused(tmp_path / "a")


def test_a_header_longer_than_the_file_is_a_truncated_file(tmp_path: Path):
    (tmp_path / "a").write_bytes((1000).to_bytes(8, "little") + b"{}")
    assert "truncated" in refused(tmp_path / "a")


def test_noise_is_not_taken_for_a_header(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"\xff" * 200)
    assert "corrupt or no safetensors file" in refused(tmp_path / "a")


@pytest.mark.parametrize("header", [b"{", b"\xff\xfe", b"[1]", b'{"a": NaN', b"[" * 100_000])
def test_a_header_that_is_no_json_object_is_refused(tmp_path: Path, raw: Raw, header: bytes):
    raw(tmp_path / "a", header)
    assert "the header of" in refused(tmp_path / "a")


def test_a_tensor_named_twice_in_one_file_is_refused(tmp_path: Path, raw: Raw):
    one = json.dumps(tensor(0, 4))
    raw(tmp_path / "a", f'{{"w": {one}, "w": {one}}}'.encode(), bytes(4))
    assert "'w' stands twice" in refused(tmp_path / "a")


@pytest.mark.parametrize(
    ("second", "fault"),
    [
        (tensor(3, 7), "overlaps the one before it (found offset 3, expected 4)"),
        (tensor(5, 9), "leaves a gap before it (found offset 5, expected 4)"),
        (tensor(4, 7, "F32", [1]), "needs 4 bytes, its data_offsets [4, 7] span 3"),
        (tensor(8, 4, shape=[1]), "needs 1 bytes, its data_offsets [8, 4] span -4"),
        (tensor(4, 8, "F99"), "dtype 'F99' is not one of"),
        (tensor(4, 8, ["F32"]), "dtype ['F32'] is not one of"),
        (tensor(4, 8, shape=[-4]), "shape [-4] is not a list of counts"),
        (tensor(4, 8, shape=[True, 4]), "shape [True, 4] is not a list of counts"),
        ({"dtype": "U8", "shape": [4], "data_offsets": [4]}, "[4] is not a pair of counts"),
        ({"dtype": "U8", "shape": [4]}, "expected dtype, shape and data_offsets"),
        ({**tensor(4, 8), "stride": [1]}, "expected dtype, shape and data_offsets"),
        ([1, 2], "expected dtype, shape and data_offsets"),
    ],
)
def test_a_corrupt_entry_is_named(tmp_path: Path, raw: Raw, second: Any, fault: str):
    raw(tmp_path / "a", json.dumps({"one": tensor(0, 4), "two": second}).encode(), bytes(8))
    message = refused(tmp_path / "a")
    assert "corrupt" in message
    assert "'two'" in message
    assert fault in message


def test_offsets_that_wrap_do_not_reach_outside(tmp_path: Path, raw: Raw):
    huge = {"dtype": "U8", "shape": [2**63], "data_offsets": [0, 2**63]}
    raw(tmp_path / "a", json.dumps({"one": huge}).encode(), bytes(8))
    assert "truncated" in refused(tmp_path / "a")
