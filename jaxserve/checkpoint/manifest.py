"""jaxserve.json: what a converted checkpoint holds, so that it can be checked without reading it.

It lists every weight with dtype and shape, and every data file with its size: Orbax itself
reads a missing piece of an array as zeros.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jaxserve.checkpoint.files import read_json
from jaxserve.checkpoint.remote import Remote
from jaxserve.checkpoint.tensors import LOADABLE, TensorInfo
from jaxserve.config import dtype_bytes
from jaxserve.errors import CheckpointError

NAME = "jaxserve.json"
VERSION = 1
PARAMS = "params"


@dataclass(frozen=True)
class Entry:
    """dtype and shape of one weight, outputs first."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Manifest:
    """The content of jaxserve.json.

    Attributes:
        version: of this format.
        jaxserve: version of jaxserve that wrote it.
        family: model family.
        dtype: of most of the weights.
        tensors: logical name -> dtype and shape.
        files: path below the checkpoint -> bytes, of everything that holds weights.
        quantize: what weights were rounded for; those of int8 have scales beside them.
    """

    version: int
    jaxserve: str
    family: str
    dtype: str
    tensors: dict[str, Entry]
    files: dict[str, int]
    quantize: str | None = None

    def write(self, directory: Path) -> None:
        """Writes jaxserve.json."""
        text = json.dumps(asdict(self), indent=1)
        (directory / NAME).write_text(text + "\n", encoding="utf-8")

    def table(self, directory: Path) -> dict[str, TensorInfo]:
        """Returns the weights by logical name."""
        return {
            name: TensorInfo(
                name,
                directory / PARAMS,
                entry.dtype,
                entry.shape,
                math.prod(entry.shape) * dtype_bytes(entry.dtype),
            )
            for name, entry in self.tensors.items()
        }


def read_manifest(directory: Path) -> Manifest:
    """Returns the manifest of a converted checkpoint, its files checked by size.

    Raises:
        CheckpointError: jaxserve.json is damaged or of a later version, or a file is missing or
            has another size.
    """
    path = directory / NAME
    raw = read_json(path)
    if raw.get("version") != VERSION:
        raise CheckpointError(
            f"{path}: version {raw.get('version')!r} cannot be read, expected {VERSION}; "
            "use the jaxserve that wrote it, or convert the original again"
        )
    try:
        manifest = _parsed(raw)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is damaged ({type(error).__name__}: {error}); convert the original again"
        ) from error
    remote = Remote.of(directory)
    for name, size in manifest.files.items():
        _check_file(directory / name, size, remote.sizes.get(name) if remote else None)
    return manifest


def _parsed(raw: dict[str, Any]) -> Manifest:
    tensors = {
        str(name): Entry(str(entry["dtype"]), tuple(int(size) for size in entry["shape"]))
        for name, entry in raw.pop("tensors").items()
    }
    if unknown := {entry.dtype for entry in tensors.values()} - {*LOADABLE, "int8"}:
        raise ValueError(f"unknown dtypes {sorted(unknown)}")
    files = {str(name): int(size) for name, size in raw.pop("files").items()}
    return Manifest(tensors=tensors, files=files, **raw)


def _check_file(path: Path, size: int, found: int | None) -> None:
    """Checks the size of a file; `found` is that of one in an object store."""
    try:
        found = path.stat().st_size if found is None else found
    except OSError:
        raise CheckpointError(
            f"{path} is missing: expected {size} bytes; copy or convert the checkpoint again"
        ) from None
    if found != size:
        raise CheckpointError(
            f"{path} is truncated or changed: expected {size} bytes, found {found}; "
            "copy or convert the checkpoint again"
        )
