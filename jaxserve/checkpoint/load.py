"""Loads the parameters of a model from either format of checkpoint, onto any devices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax

from jaxserve.checkpoint.hf import HfReader
from jaxserve.checkpoint.info import CheckpointInfo, Format, inspect
from jaxserve.checkpoint.orbax import OrbaxReader
from jaxserve.checkpoint.place import place
from jaxserve.checkpoint.quantize import QuantizingReader, quantized_names
from jaxserve.checkpoint.stored import Stored, stored_parameters
from jaxserve.checkpoint.tensors import Reader
from jaxserve.errors import UsageError
from jaxserve.layers.decoder import Model, Params
from jaxserve.layers.param import tree_of
from jaxserve.progress import Reporter, Silent

ShardingOf = Callable[[tuple[str, ...], tuple[int, ...]], jax.sharding.Sharding]


def load_params(
    checkpoint: CheckpointInfo | Path | str,
    model: Model,
    sharding: jax.sharding.Sharding | ShardingOf | None = None,
    progress: Reporter | None = None,
) -> Params:
    """Returns the parameters of `model`, each cast, turned and placed as the model declares it.

    Peak memory on the host is the weights that live there and, beyond them, two parameters.

    Args:
        checkpoint: a directory, or what `inspect` found in it.
        model: configuration and storage; its configuration is that of the checkpoint.
        sharding: of every parameter; a function is given (logical axes, shape) of each, such as
            `partitioning.mesh.places` makes. None puts all on the default device.
        progress: told the bytes placed; None is silent.

    Raises:
        CheckpointError: the checkpoint is damaged, or not of this model.
        UsageError: it is quantised, and the model is not.
    """
    info = checkpoint if isinstance(checkpoint, CheckpointInfo) else inspect(checkpoint)
    if info.quantize is not None and model.declare.quantize is None:
        raise UsageError(
            f"{info.path} holds weights rounded to int8; declare the model with "
            f"quantize={info.quantize!r}, or load the original checkpoint"
        )
    reader = open_reader(info)
    if model.declare.quantize is not None and info.quantize is None:
        reader = QuantizingReader(reader, quantized_names(model))
    parameters = stored_parameters(model)
    total = sum(stored.nbytes for stored in parameters)
    flat: list[tuple[tuple[str | int, ...], jax.Array]] = []
    with (progress or Silent()).task(f"loading {info.path.name}", total) as advance:
        for stored in parameters:
            array = place(stored, reader, _sharding_of(stored, sharding))
            if flat:
                # Bounds the host buffers that wait for an accelerator to take them.
                jax.block_until_ready(flat[-1][1])
            flat.append((stored.path, array))
            advance(stored.nbytes)
        jax.block_until_ready(flat[-1][1])
    return tree_of(flat)


def open_reader(info: CheckpointInfo) -> Reader:
    """Returns a reader of the checkpoint's logical weights."""
    if info.format is Format.SAFETENSORS:
        return HfReader(info.tensors, info.sources())
    return OrbaxReader(info.path, info.tensors)


def _sharding_of(
    stored: Stored, sharding: jax.sharding.Sharding | ShardingOf | None
) -> jax.sharding.Sharding | None:
    if sharding is None or isinstance(sharding, jax.sharding.Sharding):
        return sharding
    return sharding(stored.axes, stored.shape)
