"""Traced steps on disk, found again without tracing them.

    store = ProgramStore.of(parts, device)               # None where nothing may be kept
    exported = store.load("decode of 8 rows") or store.save("decode of 8 rows", trace())
    jax.jit(exported.call).lower(*arguments).compile()

JAX's own cache of compiled programs is keyed by the lowered program, which has to be traced first;
for a small model that is most of a warm start. Here the key is everything that a program follows
from: our sources, versions, device, options of JAX, and the model. What is kept is the portable
form of `jax.export`, which JAX checks as it reads it.

The folder is used only where it belongs to this user alone.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import re
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import jax
from jax import export

import jaxserve
from jaxserve import compile_cache

MAX_BYTES = 2 << 30
"""The oldest programs beyond are removed."""

_log = logging.getLogger(__name__)


class ProgramStore:
    """A folder of programs that follow from the same things.

    Args:
        folder: private to this user.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @classmethod
    def of(cls, parts: Sequence[str], device: Any) -> Self | None:
        """Returns the store of programs that follow from `parts`; None where none may be kept.

        Args:
            parts: what they follow from besides sources, versions and device.
        """
        if find_spec("flatbuffers") is None:  # an optional part of JAX's export
            return None
        if jax.config.jax_compilation_cache_dir is None or not compile_cache.wanted():
            return None
        root = Path(jax.config.jax_compilation_cache_dir).parent / "programs"
        name = _digest([*_surroundings(device), *map(_without_addresses, parts)])
        try:
            (root / name).mkdir(mode=0o700, parents=True, exist_ok=True)
            if not (_private(root) and _private(root / name)):
                _log.warning("programs are not kept in %s, which others may write to", root)
                return None
        except OSError as error:
            _log.warning("programs cannot be kept in %s: %s", root, error)
            return None
        return cls(root / name)

    def load(self, name: str) -> export.Exported | None:
        """Returns a program that was saved under a name; None if there is none that works here."""
        path = self._path(name)
        try:
            data = path.read_bytes()
        except OSError:
            return None
        digest, payload = data[:32], data[32:]
        if hashlib.sha256(payload).digest() != digest:  # a write that was cut short
            return None
        try:
            found = export.deserialize(bytearray(payload))
            path.touch()
        except Exception as error:  # whatever JAX has against it, tracing still works
            _log.warning("a stored program cannot be used: %s", error)
            return None
        return found

    def save(self, name: str, exported: export.Exported) -> export.Exported:
        """Returns a program as a later start will find it.

        Where it cannot be kept, the next start traces again.
        """
        path = self._path(name)
        try:
            payload = bytes(exported.serialize())
            partial = path.with_suffix(f".{os.getpid()}")
            partial.write_bytes(hashlib.sha256(payload).digest() + payload)
            partial.replace(path)
        except (OSError, ValueError) as error:
            _log.warning("a program cannot be kept: %s", error)
        return exported

    def prune(self) -> None:
        """Removes the programs that were not used for longest, of all stores beside this one."""
        files = [
            (stat.st_mtime, stat.st_size, path)
            for path in self._folder.parent.glob("*/*")
            if (stat := _stat(path)) is not None
        ]
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= MAX_BYTES:
                return
            path.unlink(missing_ok=True)
            total -= size

    def _path(self, name: str) -> Path:
        return self._folder / hashlib.sha256(name.encode()).hexdigest()[:32]


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:  # another process has just removed it
        return None


def _private(path: Path) -> bool:
    """Returns whether a folder is this user's, and nobody else may write to it."""
    stat = path.stat()
    return stat.st_uid == os.getuid() and not stat.st_mode & 0o022


def _surroundings(device: Any) -> list[str]:
    """Returns what every program follows from: sources, versions, device, options."""
    options = {
        name: value
        for name, value in jax.config.values.items()
        if "cache" not in name and "dir" not in name
    }
    flags = [f"{name}={os.environ.get(name)}" for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
    client = device.client
    return [
        _sources(),
        *(jax.__version__, metadata.version("jaxlib"), platform.python_version()),
        *(device.platform, device.device_kind, client.platform_version, _processor()),
        str(jax.device_count()),
        *flags,
        repr(sorted((name, repr(value)) for name, value in options.items())),
    ]


@cache
def _sources() -> str:
    """Returns a digest of the package's own sources."""
    digest = hashlib.sha256()
    root = Path(jaxserve.__file__).parent
    for folder in (root, *sorted(p.resolve() for p in root.iterdir() if p.is_dir())):
        pattern = "*.py" if folder == root else "**/*.py"
        for path in sorted(folder.glob(pattern)):
            digest.update(path.name.encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


@cache
def _processor() -> str:
    """Returns what the processor can do: programs for a CPU use all of it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "model name"))}))


def _without_addresses(text: str) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def _digest(parts: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)}:{part}".encode())
    return digest.hexdigest()[:32]
