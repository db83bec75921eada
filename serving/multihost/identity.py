"""What the ranks of a group compare before they begin.

identity = identity_of(start, files.info.path, num_processes=4)
"""

from __future__ import annotations

import dataclasses
import hashlib
import platform
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import msgspec

import jaxserve
from jaxserve.serving.multihost.messages import Identity
from jaxserve.serving.options import EngineOptions

if TYPE_CHECKING:
    from jaxserve.serving.wire import Start

WHOLE_BYTES = 1 << 20
"""Files up to this size are hashed whole; of larger ones samples."""
SAMPLES = 32
"""Evenly spaced, the first at the beginning and the last at the end."""
SAMPLE_BYTES = 1 << 14
MOST_HEADER_BYTES = 100_000_000
SHOWN = 16

_OWN = {"model": "", "log_json": True, "launched_s": 0.0, "devices": None, "group": None}
"""Fields of `Start` in which ranks may differ; of the model the files are compared."""

_DEFAULTS = EngineOptions()
_QUEUES = {
    name: getattr(_DEFAULTS, name)
    for name in (
        "prefix_cache",
        "policy",
        "client_weights",
        "max_prefill_tokens",
        "max_queued_requests",
        "max_queued_tokens",
        "max_in_flight",
        "strict",
    )
}
"""Fields of `EngineOptions` that rank 0 alone acts by, or that no program depends on."""


def identity_of(start: Start, checkpoint: Path, num_processes: int) -> Identity:
    """Returns what this rank has to have in common with the others."""
    return Identity(
        jaxserve.__version__,
        jax.__version__,
        _version("jaxlib"),
        _version("libtpu"),
        ".".join(platform.python_version_tuple()[:2]),
        layout_hash(start),
        model_hash(checkpoint),
        num_processes,
    )


def _version(package: str) -> str:
    """Returns the version of an installed package, or "none"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def layout_hash(start: Start) -> str:
    """Returns a hash of layout, sizes, dtype and kernels: all of a start that shapes a step."""
    options = dataclasses.replace(start.options, **_QUEUES)
    shared = msgspec.structs.replace(start, **_OWN, options=options)
    return hashlib.sha256(msgspec.json.encode(shared, order="sorted")).hexdigest()[:SHOWN]


def model_hash(checkpoint: Path) -> str:
    """Returns a hash of a checkpoint's files: names, sizes, small files, samples of large ones.

    Headers of safetensors files and configuration count whole, of the weights what is cheap to
    read: a model that was trained further is another one, a single changed weight may not be seen.
    When files were written does not count.
    """
    made = hashlib.sha256()
    for path in sorted(p for p in checkpoint.rglob("*") if p.is_file()):
        name = path.relative_to(checkpoint)
        if any(part.startswith(".") for part in name.parts):
            continue
        size = path.stat().st_size
        made.update(f"{name.as_posix()}\0{size}\0".encode())
        with path.open("rb") as file:
            if size <= WHOLE_BYTES:
                made.update(file.read())
                continue
            if path.suffix == ".safetensors":
                made.update(file.read(_header_bytes(file.read(8))))
            for index in range(SAMPLES):
                file.seek((size - SAMPLE_BYTES) * index // (SAMPLES - 1))
                made.update(file.read(SAMPLE_BYTES))
    return made.hexdigest()[:SHOWN]


def _header_bytes(length: bytes) -> int:
    """Returns how long a file says that its header is; loading refuses what cannot be true."""
    return min(int.from_bytes(length, "little"), MOST_HEADER_BYTES)
