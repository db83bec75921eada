"""Orbax checkpoints of logical weights: written once, loaded onto any mesh.

    convert("llama-3.2-1b", "llama-orbax")     # as `jaxserve convert` does

The directory holds:

    jaxserve.json                   what is here (`manifest.py`)
    config.json, tokenizer.json, …  copied
    params/                         an Orbax PyTree checkpoint: {logical name: array}

Weights are stored as they came, outputs first, none fused, uncompressed and in chunks, so that
they depend neither on a backend nor on a mesh and a slice can be read by itself. They are read
back through TensorStore, the library Orbax itself reads arrays with: slices go straight into the
same placement as those of safetensors, and Orbax, slow to import, is needed for writing alone.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

import jaxserve
from jaxserve.checkpoint import manifest
from jaxserve.checkpoint.files import companions, expanded
from jaxserve.checkpoint.hf import HfReader
from jaxserve.checkpoint.info import CheckpointInfo, Format, inspect
from jaxserve.checkpoint.quantize import SCALES, QuantizingReader, quantized_names
from jaxserve.checkpoint.remote import AT_ONCE, Remote
from jaxserve.checkpoint.tensors import Index, TensorInfo
from jaxserve.config import Quantization
from jaxserve.errors import CheckpointError, UsageError
from jaxserve.layers.decoder import Model
from jaxserve.layers.param import Declare
from jaxserve.progress import Reporter, Silent

_DRIVERS = {"gs": "gcs", "gcs": "gcs", "s3": "s3"}
_OF_S3 = {
    "AWS_ENDPOINT_URL": "endpoint",
    "AWS_DEFAULT_REGION": "aws_region",
    "AWS_REGION": "aws_region",
}
_CHUNK_BYTES = 16 * 2**20
CACHE_BYTES = 256 << 20
"""Chunks kept for a while, as devices of one host want parts of the same ones."""
# Orbax copies arrays before it writes them, up to this many gigabytes at a time.
_SAVE_GB = 1


def convert(
    source: str | Path,
    out: str | Path,
    progress: Reporter | None = None,
    quantize: Quantization | None = None,
) -> CheckpointInfo:
    """Returns what the Orbax checkpoint holds that was written to `out`.

    It appears under its name only when it is complete.

    Args:
        source: directory of a Hugging Face checkpoint.
        out: a directory that does not exist yet, or is empty.
        progress: told the bytes written; None is silent.
        quantize: round weights to int8, for activations as they are or rounded too.

    Raises:
        UsageError: `out` holds something, or `source` is no Hugging Face checkpoint.
        CheckpointError: `source` is damaged, or `out` cannot be written.
    """
    info, target = inspect(source), expanded(out)
    if info.format is not Format.SAFETENSORS:
        raise UsageError(
            f"{info.path} is an Orbax checkpoint already; convert takes a Hugging Face directory"
        )
    _check_target(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, so that renaming moves no data; Orbax wants absolute paths.
        work = target.parent.resolve() / f".{target.name}-{uuid4().hex[:8]}"
        work.mkdir()
        try:
            with (progress or Silent()).task(f"converting {info.path.name}", info.nbytes) as done:
                _write(info, work, quantize)
                done(info.nbytes)
            work.rename(target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error.strerror or error}") from error
    return inspect(target)


def _check_target(target: Path) -> None:
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists() or target.is_symlink():
        held = "is not empty" if target.is_dir() else "is a file"
        raise UsageError(f"{target} {held}; give a new or empty directory")


def _write(info: CheckpointInfo, directory: Path, quantize: Quantization | None) -> None:
    """Writes the whole content of a converted checkpoint into `directory`."""
    reader, names = HfReader(info.tensors, info.sources()), list(info.sources())
    if quantize is not None:
        rounded = quantized_names(Model(info.config, Declare(info.dtype, quantize=quantize)))
        reader = QuantizingReader(reader, rounded)
        names += [name + SCALES for name in rounded]
    arrays = {name: reader.read(name, ()) for name in sorted(names)}
    _save(directory / manifest.PARAMS, arrays)
    for path in companions(info.path):
        shutil.copyfile(path, directory / path.name)
    data = sorted(path for path in (directory / manifest.PARAMS).rglob("*") if path.is_file())
    manifest.Manifest(
        version=manifest.VERSION,
        jaxserve=jaxserve.__version__,
        family=info.family,
        dtype=info.dtype,
        tensors={
            name: manifest.Entry(array.dtype.name, array.shape) for name, array in arrays.items()
        },
        files={path.relative_to(directory).as_posix(): path.stat().st_size for path in data},
        quantize=None if quantize is None else quantize.value,
    ).write(directory)


def _save(directory: Path, arrays: Mapping[str, np.ndarray]) -> None:
    import orbax.checkpoint as ocp  # slow to import, and needed here alone

    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=True, use_zarr3=False, use_compression=False, save_concurrent_gb=_SAVE_GB
    )
    chunks = {name: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES) for name in arrays}
    try:
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(directory, ocp.args.PyTreeSave(dict(arrays), save_args=chunks))
    except ValueError as error:
        # What TensorStore meets on disk, such as no space left, comes as a ValueError.
        raise CheckpointError(
            f"{directory} cannot be written; TensorStore says: {error!s:.300}"
        ) from error


def kvstore(directory: Path, remote: Remote | None) -> dict[str, str]:
    """Returns where TensorStore finds the arrays of a checkpoint.

    Raises:
        CheckpointError: they lie in a store that it does not read.
    """
    if remote is None:
        place = str((directory / manifest.PARAMS).resolve())
        return {"driver": "file", "path": f"{place}/"}
    scheme, _, rest = remote.url.partition("://")
    if scheme == "file":
        return {"driver": "file", "path": f"{rest}/{manifest.PARAMS}/"}
    if scheme not in _DRIVERS:
        raise CheckpointError(
            f"{remote.url} is a converted checkpoint, which is read from gs:// or s3:// alone; "
            "keep it there, or as safetensors"
        )
    bucket, _, path = rest.partition("/")
    path = "/".join(part for part in (path, manifest.PARAMS) if part)
    spec = {"driver": _DRIVERS[scheme], "bucket": bucket, "path": f"{path}/"}
    if scheme == "s3":  # where fsspec looks, too
        spec |= {field: os.environ[name] for name, field in _OF_S3.items() if name in os.environ}
    return spec


class OrbaxReader:
    """Logical weights of a converted checkpoint, read slice by slice."""

    def __init__(self, directory: Path, tensors: Mapping[str, TensorInfo]) -> None:
        import tensorstore  # comes with Orbax, and is needed for its checkpoints alone

        self._directory = directory
        self._tensors = tensors
        self._tensorstore = tensorstore
        self._context = tensorstore.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})
        self._open: dict[str, Any] = {}
        self._remote = Remote.of(directory)
        self._base = kvstore(directory, self._remote)

    @property
    def parallel(self) -> int:
        """Returns how many parameters are best read at once."""
        return AT_ONCE if self._remote is not None else 1

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Returns the shape of a logical weight, outputs first; None where there is none."""
        return self._tensors[name].shape if name in self._tensors else None

    def where(self, name: str) -> str:
        """Returns the place of a logical weight, for messages."""
        return f"{self._directory / manifest.PARAMS}, array {name!r}"

    def read(self, name: str, index: Index) -> np.ndarray:
        """Returns a slice of a logical weight.

        Raises:
            CheckpointError: the array is missing, damaged, or not as the manifest says.
        """
        try:
            return self._array(name)[index].read().result()
        except (ValueError, OSError) as error:
            # TensorStore reports as ValueError whatever it finds on disk.
            raise CheckpointError(
                f"{self.where(name)} cannot be read; copy or convert the checkpoint again. "
                f"TensorStore says: {error!s:.300}"
            ) from error

    def _array(self, name: str) -> Any:
        if name not in self._open:
            database = {"driver": "ocdbt", "base": self._base, "path": f"{name}/"}
            spec = {"driver": "zarr", "kvstore": database}
            array = self._tensorstore.open(spec, open=True, context=self._context).result()
            expected = self._tensors[name]
            found = (array.dtype.name, tuple(array.shape))
            if found != (expected.dtype, expected.shape):
                raise CheckpointError(
                    f"{self.where(name)} is {found[0]}{list(found[1])}, expected "
                    f"{expected.dtype}{list(expected.shape)} by {manifest.NAME}"
                )
            self._open[name] = array
        return self._open[name]
