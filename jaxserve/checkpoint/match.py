"""Whether the tensors of a checkpoint are those that its config asks for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from jaxserve.checkpoint.tensors import LOADABLE, TensorInfo, listed
from jaxserve.errors import CheckpointError, UnsupportedError
from jaxserve.models.family import Family, Source


def used_tensors(
    directory: Path,
    family: Family,
    sources: Mapping[str, Source],
    tensors: Mapping[str, TensorInfo],
) -> dict[str, TensorInfo]:
    """Returns the tensors that the model is made of, without those known to carry nothing.

    Raises:
        CheckpointError: a tensor is missing, not expected, or of another shape.
        UnsupportedError: a tensor's dtype cannot be loaded.
    """
    wanted = {tensor: one.shape for one in sources.values() for tensor in one.tensors}
    _check_missing(directory, wanted, tensors)
    extra = [name for name in tensors if name not in wanted and not family.ignored(name)]
    if extra:
        first = tensors[extra[0]]
        raise CheckpointError(
            f"{first.file}: tensor {first.name!r} {first.dtype}{list(first.shape)} has no place "
            f"in the {family.name} model that config.json describes ({_counted(extra)}); "
            "config.json and weights belong to different models, or the config lacks a field"
        )
    for name, shape in wanted.items():
        _check_tensor(tensors[name], shape)
    return {name: tensor for name, tensor in tensors.items() if name in wanted}


def _check_missing(
    directory: Path, wanted: Mapping[str, tuple[int, ...]], tensors: Mapping[str, TensorInfo]
) -> None:
    missing = [name for name in wanted if name not in tensors]
    if missing:
        files = sorted({tensor.file.name for tensor in tensors.values()})
        raise CheckpointError(
            f"{directory}: tensor {missing[0]!r} is missing ({_counted(missing)}): expected shape "
            f"{list(wanted[missing[0]])}, found no tensor of that name in {listed(files)}"
        )


def _check_tensor(tensor: TensorInfo, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name!r} has the wrong shape: expected {list(shape)} "
            f"by config.json, found {list(tensor.shape)}"
        )
    if tensor.dtype not in LOADABLE:
        raise UnsupportedError(
            f"{tensor.file}: tensor {tensor.name!r} is {tensor.dtype}, expected one of "
            f"{', '.join(LOADABLE)}; use a checkpoint in one of these"
        )


def _counted(names: list[str]) -> str:
    return "the only one" if len(names) == 1 else f"{len(names)} such: {listed(names)}"
