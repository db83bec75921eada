"""The weights of a Hugging Face directory: one safetensors file, or shards and their index.

    tensors = tensor_table(Path("llama"))     # name -> TensorInfo; headers read, no data
    reader = HfReader(tensors, sources)       # logical weights as views of the mapped files
    reader.read("layers.0.attention.q", (slice(0, 2),))

Pickle formats (.bin, .pt, .pth, .ckpt, .pkl) are refused: reading one runs whatever code its
author put in.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatch
from io import BytesIO
from pathlib import Path, PurePath

import ml_dtypes
import numpy as np

from jaxserve.checkpoint.files import read_json
from jaxserve.checkpoint.header import parse_header, read_header
from jaxserve.checkpoint.remote import AT_ONCE, Remote
from jaxserve.checkpoint.tensors import Index, TensorInfo, listed
from jaxserve.errors import CheckpointError, JaxserveError, UnsupportedError
from jaxserve.models.family import Source

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_NUMPY = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


def tensor_table(directory: Path) -> dict[str, TensorInfo]:
    """Returns every tensor of the directory by name, from the headers alone.

    Raises:
        CheckpointError: a file is missing, truncated or corrupt, or index and shards disagree.
        UnsupportedError: the weights are pickled, or are an adapter.
    """
    single, index = directory / SINGLE, directory / INDEX
    remote = Remote.of(directory)
    if (directory / "adapter_config.json").exists():
        raise UnsupportedError(
            f"{directory / 'adapter_config.json'}: adapters are not supported; merge the adapter "
            "into its base model and give the directory of the result"
        )
    has_single = SINGLE in remote.sizes if remote else single.exists()
    if has_single and index.exists():
        raise CheckpointError(
            f"{directory} has both {SINGLE} and {INDEX}, so which weights are meant is unclear; "
            "move one of them away"
        )
    if index.exists():
        return _sharded(index, remote)
    if has_single:
        return _header(single, remote)
    raise _no_weights(directory, remote)


def _header(path: Path, remote: Remote | None) -> dict[str, TensorInfo]:
    if remote is None:
        return read_header(path)
    return parse_header(path, remote.sizes[path.name], BytesIO(remote.header(path.name)).read)


def _sharded(index: Path, remote: Remote | None) -> dict[str, TensorInfo]:
    weight_map = _weight_map(index)
    names = sorted(set(weight_map.values()))
    there = _files(index.parent, remote)
    if lost := [name for name in names if name not in there]:
        raise CheckpointError(
            f"{index} names {listed(lost)}, which {remote.url if remote else index.parent} does "
            "not have; copy or download the missing files"
        )
    strays = {name for name in there if fnmatch(name, "model-*-of-*.safetensors")} - set(names)
    if strays:
        raise CheckpointError(
            f"{index} does not name {listed(sorted(strays))}, which lie beside it; "
            "move away what belongs to another checkpoint"
        )
    table: dict[str, TensorInfo] = {}
    for shard in names:
        for name, tensor in _header(index.parent / shard, remote).items():
            if name in table:
                raise CheckpointError(
                    f"tensor {name!r} is both in {table[name].file} and in {tensor.file}; "
                    "expected it once"
                )
            table[name] = tensor
    _check_index(index, weight_map, table)
    return table


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map; expected tensor name -> file name")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or PurePath(name).name != name:
            raise CheckpointError(
                f"{index} puts tensor {tensor!r} into {name!r}; expected the name of a file "
                "in the same directory"
            )
    return weight_map


def _check_index(index: Path, weight_map: dict[str, str], table: dict[str, TensorInfo]) -> None:
    for name, shard in weight_map.items():
        if name not in table:
            raise CheckpointError(
                f"{index} puts tensor {name!r} into {shard}, which does not have it; "
                "copy or download both again"
            )
        if table[name].file.name != shard:
            raise CheckpointError(
                f"{index} puts tensor {name!r} into {shard}, but it lies in "
                f"{table[name].file.name}; copy or download the index again"
            )
    if unnamed := sorted(table.keys() - weight_map.keys()):
        raise CheckpointError(
            f"{table[unnamed[0]].file} holds {listed(unnamed)}, which {index} does not name; "
            "copy or download the index again"
        )


def _files(directory: Path, remote: Remote | None) -> list[str]:
    """Returns the names of all files of a checkpoint, wherever they lie."""
    if remote is not None:
        return sorted(name for name in remote.sizes if "/" not in name)
    return sorted(path.name for path in directory.iterdir() if path.is_file())


def _no_weights(directory: Path, remote: Remote | None) -> JaxserveError:
    files = _files(directory, remote)
    if pickles := [name for name in files if name.endswith(_PICKLES)]:
        return UnsupportedError(
            f"{directory} has its weights as {listed(pickles)}: these are Python pickles, and "
            "reading a pickle runs any code its author put in, so they are never opened; get the "
            "model as safetensors, or save it so where you trust it: "
            "save_pretrained(DIR, safe_serialization=True)"
        )
    others = [name for name in files if name.endswith(".safetensors")]
    found = f"it has {listed(others)}" if others else "it has no .safetensors file at all"
    return CheckpointError(
        f"{directory} has no weights: expected {SINGLE}, or {INDEX} and its shards; {found}"
    )


def logical_shape(source: Source) -> tuple[int, ...]:
    """Returns the shape of what a source selects, outputs first; nothing is read."""
    shape = source.select(np.broadcast_to(np.zeros((), np.int8), source.shape)).shape
    return (len(source.stacked), *shape) if source.stacked else shape


class HfReader:
    """Logical weights as views of memory-mapped files; a file is mapped once, on first use.

    Those of an object store are read part by part.
    """

    def __init__(self, tensors: Mapping[str, TensorInfo], sources: Mapping[str, Source]) -> None:
        self._tensors = tensors
        self._sources = sources
        self._maps: dict[Path, np.ndarray] = {}
        folders = {tensor.file.parent for tensor in tensors.values()}
        self._remotes = {folder: Remote.of(folder) for folder in folders}

    @property
    def parallel(self) -> int:
        """Returns how many parameters are best read at once."""
        return AT_ONCE if any(self._remotes.values()) else 1

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Returns the shape of a logical weight, outputs first; None where there is none."""
        return logical_shape(self._sources[name]) if name in self._sources else None

    def where(self, name: str) -> str:
        """Returns the place of a logical weight, for messages."""
        tensor = self._tensors[self._sources[name].tensor]
        return f"{tensor.file}, tensor {tensor.name!r}"

    def read(self, name: str, index: Index) -> np.ndarray:
        """Returns a slice of a logical weight, a read-only view of the file where possible."""
        source = self._sources[name]
        if not source.stacked:
            return self._selected(source, source.tensor, index)
        first, rest = (index[0], index[1:]) if index else (slice(None), ())
        return np.stack([self._selected(source, name, rest) for name in source.stacked[first]])

    def _selected(self, source: Source, name: str, index: Index) -> np.ndarray:
        tensor = self._tensors[name]
        remote = self._remotes[tensor.file.parent]
        if remote is None:
            return source.select(self._view(tensor))[index]
        return remote.read(tensor, _NUMPY[tensor.dtype], lambda whole: source.select(whole)[index])

    def _view(self, tensor: TensorInfo) -> np.ndarray:
        if tensor.file not in self._maps:
            self._maps[tensor.file] = np.memmap(tensor.file, dtype=np.uint8, mode="r")
        start = tensor.offset or 0
        data = self._maps[tensor.file][start : start + tensor.nbytes]
        return data.view(_NUMPY[tensor.dtype]).reshape(tensor.shape)
