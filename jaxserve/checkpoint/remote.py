"""Checkpoints in object stores: the small files come here, weights are read by ranges of bytes.

    path = mirror("gs://models/llama")       # a folder here with everything but the weights
    remote = Remote.of(path)                 # None of a folder that has its weights, too
    remote.header("model.safetensors")       # first bytes of a file
    remote.read(tensor, dtype, lambda whole: whole[:8])      # of a tensor what the function keeps

What fsspec knows by an address is read through it: `gs://` with gcsfs, `s3://` with s3fs.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from jaxserve import compile_cache
from jaxserve.checkpoint.files import COMPANIONS, read_json
from jaxserve.checkpoint.tensors import TensorInfo
from jaxserve.errors import CheckpointError

NAME = "remote.json"
TIMES = ".times.json"
"""When each file was written: of this store alone, so no part of what ranks compare."""
HEADERS = "headers"
GAP_BYTES = 1 << 20
"""Bytes between two that are wanted, up to which both come with one request."""
PIECE_BYTES = 16 << 20
"""Largest part that one request reads."""
THREADS = 32
AT_ONCE = 8
"""So many parameters are read at once."""
HEADER_BYTES = 1 << 16
"""So much of a file is read at first; its header is longer if it has many tensors."""

_ADDRESS = re.compile(r"[a-z][a-z0-9+]+://.+")
_SMALL = (*COMPANIONS, "*.safetensors.index.json", "jaxserve.json", "adapter_config.json")
_MARKS = ("etag", "ETag", "generation", "md5Hash")
_TIMES = ("LastModified", "updated", "last_modified", "mtime", "created")
_REMEDIES = {
    "gs": "pip install 'jaxserve[remote]', or gcsfs alone",
    "gcs": "pip install 'jaxserve[remote]', or gcsfs alone",
    "s3": "pip install 'jaxserve[remote]', or s3fs alone",
}


def is_address(name: str | Path) -> bool:
    """Returns whether a model is called by an address such as gs://bucket/folder."""
    return isinstance(name, str) and _ADDRESS.fullmatch(name) is not None


def mirror(address: str) -> Path:
    """Returns a folder here with the small files of a checkpoint, and the headers of large ones.

    It lies in jaxserve's cache, under a name that follows from what is in it.

    Raises:
        CheckpointError: there is no such folder, it cannot be read, or a package is missing.
    """
    files, root = _open(address)
    sizes, marks, times = _listed(address, files, root)
    if not sizes:
        raise CheckpointError(f"there are no files below {address}; see whether its name is right")
    listing = {"url": address.rstrip("/"), "sizes": sizes, "marks": marks}
    caches = _caches()
    try:
        caches.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=caches, ignore_cleanup_errors=True) as work:
            made = Path(work) / "made"
            own = made / root.rpartition("/")[2]
            own.mkdir(parents=True)
            (own / NAME).write_text(json.dumps(listing, sort_keys=True))
            (own / TIMES).write_text(json.dumps(times, sort_keys=True))
            _fetch_small(address, files, root, sizes, own)
            target = caches / _digest(own)
            with suppress(OSError):  # it is there already
                made.rename(target)
            return target / own.name
    except OSError as error:
        raise CheckpointError(
            f"the small files of {address} cannot be kept in {caches}: {error.strerror}; "
            "set JAXSERVE_CACHE_DIR to a writable folder"
        ) from error


class Listing(NamedTuple):
    """The files of a checkpoint, by their path below it.

    Attributes:
        sizes: in bytes.
        marks: what the store calls each file's content: entity tag, generation, or hash.
        times: when each was written.
    """

    sizes: dict[str, int]
    marks: dict[str, str]
    times: dict[str, str]


def _listed(address: str, files: Any, root: str) -> Listing:
    """Returns what lies in a store now, whatever was known of it before."""
    with _told(address):
        files.invalidate_cache()
        found = files.find(root, detail=True)
    entries = {name: entry for path, entry in found.items() if (name := _below(root, path))}

    def told(fields: tuple[str, ...]) -> dict[str, str]:
        return {
            name: str(next((entry[field] for field in fields if entry.get(field)), None))
            for name, entry in entries.items()
        }

    sizes = {name: int(entry["size"] or 0) for name, entry in entries.items()}
    return Listing(sizes, told(_MARKS), told(_TIMES))


def _caches() -> Path:
    return compile_cache.directory().parent / "remote"


def _digest(folder: Path) -> str:
    """Returns a hash of all files in a folder."""
    made = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        made.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
        made.update(path.read_bytes())
    return made.hexdigest()[:32]


def _fetch_small(address: str, files: Any, root: str, sizes: dict[str, int], target: Path) -> None:
    """Copies what is small, and the headers of safetensors files, into a folder."""
    small = [name for name in sizes if any(fnmatch(name, wanted) for wanted in _SMALL)]
    large = [name for name in sizes if "/" not in name and name.endswith(".safetensors")]
    (target / HEADERS).mkdir()

    def copy(name: str) -> None:
        with _told(f"{address}/{name}"):
            if name in small:
                (target / name).write_bytes(files.cat_file(f"{root}/{name}"))
                return
            data = files.cat_file(f"{root}/{name}", start=0, end=min(sizes[name], HEADER_BYTES))
            end = min(8 + int.from_bytes(data[:8], "little"), sizes[name], 100_000_008)
            if end > len(data):
                data += files.cat_file(f"{root}/{name}", start=len(data), end=end)
        (target / HEADERS / name).write_bytes(data[:end])

    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(copy, [name for name in small if "/" not in name] + large):
            pass


@dataclass(frozen=True)
class Remote:
    """The weights of a checkpoint whose small files lie in a folder here.

    Attributes:
        url: where they lie.
        folder: of the small files.
        sizes: of all files there, by their path below the checkpoint.
    """

    url: str
    folder: Path
    sizes: dict[str, int] = field(repr=False)

    @classmethod
    def of(cls, directory: Path) -> Self | None:
        """Returns where the weights of a directory lie; None where they lie in it."""
        # What others call so is a file like any other.
        if directory.parent.parent != _caches() or not (directory / NAME).is_file():
            return None
        listing = read_json(directory / NAME)
        return cls(listing["url"], directory, listing["sizes"])

    def check(self) -> None:
        """Checks that nothing was replaced since the small files were fetched.

        Raises:
            CheckpointError: a file is another one, is gone, or is new.
        """
        listing = read_json(self.folder / NAME)
        before = Listing(listing["sizes"], listing["marks"], read_json(self.folder / TIMES))
        now = _listed(self.url, self._files, self._root)
        for noun, old, new in zip(("size", "tag", "time"), before, now, strict=True):
            for name in sorted({*old, *new}):
                was, found = old.get(name, "none"), new.get(name, "none")
                if was != found:
                    raise CheckpointError(
                        f"{self.url}/{name} was replaced while it was loaded: its {noun} was {was} "
                        f"and is {found}; start again when nobody writes there"
                    )

    def header(self, name: str) -> bytes:
        """Returns the first bytes of a safetensors file: the length of its header, and that."""
        return (self.folder / HEADERS / name).read_bytes()

    def read(
        self, tensor: TensorInfo, dtype: np.dtype, cut: Callable[[np.ndarray], np.ndarray]
    ) -> np.ndarray:
        """Returns what a function keeps of a tensor; what it does not keep is not read.

        Memory for the whole tensor is asked of the system, which gives what is written to.

        Args:
            cut: returns views of its argument; of one that copies all is read.
        """
        data = np.empty(tensor.nbytes, np.uint8)
        whole = data.view(dtype).reshape(tensor.shape)
        kept = cut(whole)
        if np.may_share_memory(kept, data):
            self._fill(tensor, data, runs(kept, data, GAP_BYTES))
            return kept
        self._fill(tensor, data, [(0, tensor.nbytes)])
        return cut(whole)

    def _fill(self, tensor: TensorInfo, data: np.ndarray, parts: list[tuple[int, int]]) -> None:
        """Reads parts of a tensor into the array of its bytes, all at once."""
        place = f"{self._root}/{tensor.file.name}"
        begin = tensor.offset or 0
        pieces = [
            (at, min(at + PIECE_BYTES, stop))
            for start, stop in parts
            for at in range(start, stop, PIECE_BYTES)
        ]

        def fetch(piece: tuple[int, int]) -> None:
            start, stop = piece
            with _told(f"{self.url}/{tensor.file.name}"):
                found = self._files.cat_file(place, start=begin + start, end=begin + stop)
            if len(found) != stop - start:
                raise CheckpointError(
                    f"{self.url}/{tensor.file.name} gave {len(found)} bytes from "
                    f"{begin + start}, expected {stop - start}; was it replaced meanwhile?"
                )
            data[start:stop] = memoryview(found)

        if len(pieces) == 1:
            fetch(pieces[0])
            return
        with ThreadPoolExecutor(THREADS, "jaxserve-remote") as pool:
            for _ in pool.map(fetch, pieces):
                pass

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        return _open(self.url)

    @property
    def _files(self) -> Any:
        return self._opened[0]

    @property
    def _root(self) -> str:
        return self._opened[1]


def runs(kept: np.ndarray, data: np.ndarray, gap_bytes: int) -> list[tuple[int, int]]:
    """Returns where a view's elements lie in an array of bytes, as [start, stop).

    Args:
        gap_bytes: what lies between two runs counts as wanted up to so many bytes.
    """
    if not kept.size:
        return []
    start, length = kept.ctypes.data - data.ctypes.data, kept.itemsize
    dims: list[tuple[int, int]] = []
    for size, stride in zip(kept.shape, kept.strides, strict=True):
        if size == 1 or stride == 0:
            continue
        if stride < 0:
            start += (size - 1) * stride
        dims.append((abs(stride), size))
    dims.sort()
    while dims and dims[0][0] - length <= gap_bytes:
        stride, size = dims.pop(0)
        length = (size - 1) * stride + length
    starts = np.array([start])
    for stride, size in dims:
        starts = (starts[:, None] + stride * np.arange(size)).reshape(-1)
    starts = np.sort(starts)
    # The last piece of one row and the first of the next may meet.
    apart = np.flatnonzero(np.diff(starts) - length > gap_bytes)
    firsts, lasts = starts[np.r_[0, apart + 1]], starts[np.r_[apart, starts.size - 1]]
    return [(int(a), int(b) + length) for a, b in zip(firsts, lasts, strict=True)]


def _below(root: str, name: str) -> str:
    """Returns a file's path below a folder."""
    return name.removeprefix("/").removeprefix(root.strip("/")).strip("/")


def _open(address: str) -> tuple[Any, str]:
    """Returns a file system and the path of an address in it.

    Raises:
        CheckpointError: it is not known here, or a package is missing.
    """
    scheme = address.partition("://")[0]
    remedy = _REMEDIES.get(scheme, "install the package that it names")
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise CheckpointError(
            f"{address} is read through fsspec, which is not installed: "
            "pip install 'jaxserve[remote]'"
        ) from error
    if "::" in address:
        raise CheckpointError(f"{address} names more than one place; give one, such as gs://...")
    try:
        files, root = url_to_fs(address)
    except ImportError as error:
        raise CheckpointError(f"{address} cannot be read: {error}; {remedy}") from error
    except ValueError as error:
        raise CheckpointError(f"{address} cannot be read: {error}") from error
    return files, root.rstrip("/")


@contextmanager
def _told(place: str) -> Iterator[None]:
    """Raises what the store has against a request as our own error.

    Each store has classes of its own, which are nothing but exceptions.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{place} cannot be read ({type(error).__name__}: {error!s:.300}); see its name, the "
            "network, and the credentials of this machine"
        ) from error
