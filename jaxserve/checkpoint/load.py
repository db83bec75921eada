"""Loads the parameters of a model from either format of checkpoint, onto any devices."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax
from jax.experimental import layout

from jaxserve.checkpoint.hf import HfReader
from jaxserve.checkpoint.info import CheckpointInfo, Format, inspect
from jaxserve.checkpoint.orbax import OrbaxReader
from jaxserve.checkpoint.place import place
from jaxserve.checkpoint.quantize import QuantizingReader, quantized_names
from jaxserve.checkpoint.remote import Remote
from jaxserve.checkpoint.stored import Stored, stored_parameters
from jaxserve.checkpoint.tensors import Reader
from jaxserve.errors import UsageError
from jaxserve.layers.decoder import Model, Params
from jaxserve.layers.param import tree_of
from jaxserve.progress import Reporter, Silent

AHEAD_BYTES = 4 << 30
"""Of parameters read from afar, what may be under way on this host besides one of them."""

ShardingOf = Callable[[tuple[str, ...], tuple[int, ...]], jax.sharding.Sharding | layout.Format]


def load_params(
    checkpoint: CheckpointInfo | Path | str,
    model: Model,
    sharding: jax.sharding.Sharding | ShardingOf | None = None,
    progress: Reporter | None = None,
) -> Params:
    """Returns the parameters of `model`, each cast, turned and placed as the model declares it.

    Peak memory on the host is the weights that live there and, beyond them, two parameters; from
    an object store `AHEAD_BYTES` and one parameter.

    Args:
        checkpoint: a directory, or what `inspect` found in it.
        model: configuration and storage; its configuration is that of the checkpoint.
        sharding: of every parameter; a function is given (logical axes, shape) of each, such as
            `partitioning.mesh.places` makes. None puts all on the default device.
        progress: told the bytes placed; None is silent.

    Raises:
        CheckpointError: the checkpoint is damaged, or not of this model; or it lies in an object
            store and was replaced meanwhile.
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
        for stored, array in _placed(parameters, reader, sharding):
            if flat:
                # Bounds the host buffers that wait for an accelerator to take them.
                jax.block_until_ready(flat[-1][1])
            flat.append((stored.path, array))
            advance(stored.nbytes)
        jax.block_until_ready(flat[-1][1])
    if (remote := Remote.of(info.path)) is not None:
        remote.check()
    return tree_of(flat)


def _placed(
    parameters: Sequence[Stored],
    reader: Reader,
    sharding: jax.sharding.Sharding | ShardingOf | None,
) -> Iterator[tuple[Stored, jax.Array]]:
    """Yields parameters on their devices; from afar several are read at once."""
    if reader.parallel == 1:
        for stored in parameters:
            yield stored, place(stored, reader, _sharding_of(stored, sharding))
        return
    coming: deque[tuple[Stored, Future[jax.Array]]] = deque()
    with ThreadPoolExecutor(reader.parallel, "jaxserve-load") as pool:
        try:
            for stored in parameters:
                while coming and (
                    len(coming) >= 2 * reader.parallel or _bytes_of(coming) > AHEAD_BYTES
                ):
                    first, future = coming.popleft()
                    yield first, future.result()
                where = _sharding_of(stored, sharding)
                coming.append((stored, pool.submit(place, stored, reader, where)))
            for stored, future in coming:
                yield stored, future.result()
        finally:
            for _, future in coming:
                future.cancel()


def _bytes_of(coming: Iterable[tuple[Stored, Future[jax.Array]]]) -> int:
    """Returns what parameters under way take on this host, about."""
    return sum(stored.nbytes for stored, _ in coming) // jax.process_count()


def open_reader(info: CheckpointInfo) -> Reader:
    """Returns a reader of the checkpoint's logical weights."""
    if info.format is Format.SAFETENSORS:
        return HfReader(info.tensors, info.sources())
    return OrbaxReader(info.path, info.tensors)


def _sharding_of(
    stored: Stored, sharding: jax.sharding.Sharding | ShardingOf | None
) -> jax.sharding.Sharding | layout.Format | None:
    if sharding is None or isinstance(sharding, jax.sharding.Sharding):
        return sharding
    return sharding(stored.axes, stored.shape)
