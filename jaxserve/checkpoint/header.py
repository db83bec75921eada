"""The header of a safetensors file: eight bytes of length, JSON, then the data.

    header = read_header(Path("model.safetensors"))
    header["model.norm.weight"]                # TensorInfo: dtype, shape, offset, nbytes

Everything is checked against the file's size here, so a header that passes can be mapped and
read without a further look. The rules are those of the format's own description: tensors lie
end to end, from the first byte of the data to the last.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxserve.checkpoint.files import parse_object
from jaxserve.checkpoint.tensors import TensorInfo
from jaxserve.errors import CheckpointError

_LENGTH_BYTES = 8
# The format's own limit; a longer one is noise read as a length.
_MAX_HEADER_BYTES = 100_000_000

# Name in the file -> (NumPy's name, bits of an element).
_DTYPES = {
    "BOOL": ("bool", 8),
    "U8": ("uint8", 8),
    "I8": ("int8", 8),
    "U16": ("uint16", 16),
    "I16": ("int16", 16),
    "U32": ("uint32", 32),
    "I32": ("int32", 32),
    "U64": ("uint64", 64),
    "I64": ("int64", 64),
    "F4": ("float4_e2m1fn", 4),
    "F6_E2M3": ("float6_e2m3fn", 6),
    "F6_E3M2": ("float6_e3m2fn", 6),
    "F8_E4M3": ("float8_e4m3fn", 8),
    "F8_E5M2": ("float8_e5m2", 8),
    "F8_E8M0": ("float8_e8m0fnu", 8),
    "F16": ("float16", 16),
    "BF16": ("bfloat16", 16),
    "F32": ("float32", 32),
    "F64": ("float64", 64),
    "C64": ("complex64", 64),
}


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Returns the tensors of a safetensors file by name, in the order of their bytes.

    Raises:
        CheckpointError: the file is truncated, or its header does not describe it.
    """
    try:
        with path.open("rb") as file:
            return parse_header(path, os.fstat(file.fileno()).st_size, file.read)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def parse_header(path: Path, size: int, read: Callable[[int], bytes]) -> dict[str, TensorInfo]:
    """Returns the same of a file of `size` bytes, which `read` gives from its beginning."""
    text = _header_text(path, size, read(_LENGTH_BYTES), read)
    start = _LENGTH_BYTES + len(text)
    entries = parse_object(text, f"the header of {path}")
    entries.pop("__metadata__", None)
    tensors = [_tensor(path, name, entry, start) for name, entry in entries.items()]
    tensors.sort(key=lambda t: (t.offset, t.nbytes))
    _check_cover(path, tensors, start, size)
    return {tensor.name: tensor for tensor in tensors}


def _header_text(path: Path, size: int, length_bytes: bytes, read: Callable[[int], bytes]) -> bytes:
    if len(length_bytes) < _LENGTH_BYTES:
        raise CheckpointError(
            f"{path} has {size} bytes, which is no safetensors file; copy or download it again"
        )
    length = int.from_bytes(length_bytes, "little")
    if length > _MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path} is corrupt or no safetensors file: its header would have {length} bytes, "
            f"the format allows {_MAX_HEADER_BYTES}; copy or download it again"
        )
    if length > size - _LENGTH_BYTES:
        raise CheckpointError(
            f"{path} is truncated: its header has {length} bytes, the file {size}; "
            "copy or download it again"
        )
    return read(length)


def _tensor(path: Path, name: str, entry: Any, start: int) -> TensorInfo:
    where = f"the header of {path} is corrupt at tensor {name!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(
            f"{where}: found {entry!r:.200}, expected dtype, shape and data_offsets"
        )
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in _DTYPES:
        raise CheckpointError(
            f"{where}: dtype {entry['dtype']!r} is not one of {', '.join(_DTYPES)}"
        )
    if not _are_counts(shape):
        raise CheckpointError(f"{where}: shape {shape!r} is not a list of counts")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where}: data_offsets {offsets!r} is not a pair of counts")
    dtype, bits = _DTYPES[entry["dtype"]]
    needed, found = math.prod(shape) * bits, (offsets[1] - offsets[0]) * 8
    if needed != found:
        raise CheckpointError(
            f"{where}: {dtype}{shape} needs {needed / 8:g} bytes, its data_offsets {offsets} "
            f"span {found // 8}"
        )
    return TensorInfo(name, path, dtype, tuple(shape), found // 8, start + offsets[0])


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_cover(path: Path, tensors: list[TensorInfo], start: int, size: int) -> None:
    """Checks that the tensors lie end to end over the data, and the data in the file."""
    end = start
    for tensor in tensors:
        offset = tensor.offset or 0
        if offset != end:
            fault = "overlaps the one before it" if offset < end else "leaves a gap before it"
            raise CheckpointError(
                f"the header of {path} is corrupt: tensor {tensor.name!r} {fault} "
                f"(found offset {offset - start}, expected {end - start})"
            )
        end = offset + tensor.nbytes
        if end > size:
            raise CheckpointError(
                f"{path} is truncated at tensor {tensor.name!r}: expected at least {end} bytes, "
                f"found {size}; copy or download it again"
            )
    if end < size:
        raise CheckpointError(
            f"{path} has {size - end} bytes after its last tensor: expected {end} bytes, "
            f"found {size}; copy or download it again"
        )
