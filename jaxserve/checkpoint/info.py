"""What a checkpoint directory holds, found out without reading its weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

from jaxserve.checkpoint import hf, manifest
from jaxserve.checkpoint.files import expanded, read_json
from jaxserve.checkpoint.generation_config import GenerationDefaults, read_generation_defaults
from jaxserve.checkpoint.match import used_tensors
from jaxserve.checkpoint.tensors import TensorInfo, listed
from jaxserve.config import ModelConfig
from jaxserve.errors import CheckpointError, JaxserveError, UnsupportedError
from jaxserve.models.family import Family, Source, family_for

T = TypeVar("T")

_ORBAX_MARKS = ("_CHECKPOINT_METADATA", "_METADATA", manifest.PARAMS)


class Format(StrEnum):
    """How the weights are stored."""

    SAFETENSORS = "safetensors"
    ORBAX = "orbax"


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint whose config, tensors and file sizes have been checked.

    Attributes:
        path: its directory.
        format: how the weights are stored.
        family: name of the model family.
        config: the architecture.
        hf_config: config.json as it stands.
        generation: sampling defaults and special tokens.
        tensors: every tensor the model is made of, by its name in the checkpoint.
        ignored: tensors that carry no weights of their own (rotary frequencies, ...).
        quantize: what its weights were rounded for, "int8" or "w8a8"; None if they are as trained.
        unrounded_dtype: dtype that quantised weights had.
    """

    path: Path
    format: Format
    family: str
    config: ModelConfig = field(repr=False)
    hf_config: Mapping[str, Any] = field(repr=False)
    generation: GenerationDefaults
    tensors: Mapping[str, TensorInfo] = field(repr=False)
    ignored: tuple[str, ...] = ()
    quantize: str | None = None
    unrounded_dtype: str | None = None

    @property
    def num_parameters(self) -> int:
        """Returns the number of weights, scales of quantised ones aside."""
        return sum(t.size for name, t in self.tensors.items() if not _is_scales(name, self.tensors))

    @property
    def nbytes(self) -> int:
        """Returns the bytes of all weights as they are stored."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def dtype(self) -> str:
        """Returns the dtype that most of the weights have; had, where they are quantised."""
        if self.unrounded_dtype is not None:
            return self.unrounded_dtype
        sizes: Counter[str] = Counter()
        for tensor in self.tensors.values():
            sizes[tensor.dtype] += tensor.size
        return sizes.most_common(1)[0][0]

    def sources(self) -> dict[str, Source]:
        """Returns where every logical weight lies in a safetensors checkpoint."""
        return family_for(self.hf_config).sources(self.config)


def inspect(path: str | Path) -> CheckpointInfo:
    """Returns what the checkpoint in a directory holds; headers and sizes are read, no weights.

    Raises:
        CheckpointError: something is missing, truncated, corrupt, or not as config.json says.
        ConfigError: config.json or generation_config.json has a wrong or unknown field.
        UnsupportedError: they ask for something that is not supported.
    """
    directory = expanded(path)
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory} is {'a file' if directory.exists() else 'not there'}; "
            "give the directory that holds config.json and the weights"
        )
    is_orbax = (directory / manifest.NAME).exists()
    if not is_orbax and any((directory / mark).exists() for mark in _ORBAX_MARKS):
        raise CheckpointError(
            f"{directory} is an Orbax checkpoint without {manifest.NAME}: it is incomplete, or "
            "was not written by `jaxserve convert`; convert the original again"
        )
    file = directory / "config.json"
    hf_config = read_json(file)
    _refuse_quantized(file, hf_config)
    family = _naming(file, lambda: family_for(hf_config))
    config = _naming(file, lambda: family.config(hf_config))
    quantize = unrounded_dtype = None
    if is_orbax:
        listing = manifest.read_manifest(directory)
        tensors, ignored = _orbax_tensors(directory, listing, family, config), ()
        if listing.quantize is not None:
            quantize, unrounded_dtype = listing.quantize, listing.dtype
    else:
        found = family.full_names(hf.tensor_table(directory))
        tensors = used_tensors(directory, family, family.sources(config), found)
        ignored = tuple(name for name in found if name not in tensors)
    return CheckpointInfo(
        path=directory,
        format=Format.ORBAX if is_orbax else Format.SAFETENSORS,
        family=family.name,
        config=config,
        hf_config=hf_config,
        generation=read_generation_defaults(directory, hf_config),
        tensors=tensors,
        ignored=ignored,
        quantize=quantize,
        unrounded_dtype=unrounded_dtype,
    )


def _naming(file: Path, action: Callable[[], T]) -> T:
    """Returns what `action` returns; its errors name `file`."""
    try:
        return action()
    except JaxserveError as error:
        raise type(error)(f"{file}: {error}") from error


def _refuse_quantized(file: Path, hf_config: Mapping[str, Any]) -> None:
    for name in ("quantization_config", "compression_config"):
        quantized = hf_config.get(name)
        if quantized:
            method = quantized.get("quant_method") if isinstance(quantized, dict) else None
            raise UnsupportedError(
                f"{file}: {name} with quant_method={method!r}: quantised checkpoints are not "
                "supported; use the original one in bfloat16, float16 or float32"
            )


def _is_scales(name: str, tensors: Mapping[str, TensorInfo]) -> bool:
    """Returns whether a tensor holds the scales of another one."""
    base = name.removesuffix(".scales")
    return base != name and base in tensors and tensors[base].dtype == "int8"


def _orbax_tensors(
    directory: Path, listing: manifest.Manifest, family: Family, config: ModelConfig
) -> Mapping[str, TensorInfo]:
    """Returns the weights that a manifest lists, checked against the config."""
    where = directory / manifest.NAME
    if listing.family != family.name:
        raise CheckpointError(
            f"{where}: family {listing.family!r}, but config.json describes {family.name!r}; "
            "one of them was changed: convert the original again"
        )
    tensors = listing.table(directory)
    sources = family.sources(config)
    if missing := sorted(sources.keys() - tensors.keys()):
        raise CheckpointError(f"{where}: {listed(missing)} missing, expected by config.json")
    extra = sorted(tensors.keys() - sources.keys())
    if extra := [name for name in extra if not _is_scales(name, tensors)]:
        raise CheckpointError(f"{where}: {listed(extra)} found, not expected by config.json")
    for name, source in sources.items():
        expected, found = hf.logical_shape(source), tensors[name].shape
        if expected != found:
            raise CheckpointError(
                f"{where}: weight {name!r} has the wrong shape: expected {list(expected)} by "
                f"config.json, found {list(found)}"
            )
    return tensors
