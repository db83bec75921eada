"""Puts logical weights onto devices in the form in which a model stores them.

    array = place(stored, reader, sharding)

Only the slices that this process's devices hold are read, each once. Memory: every slice is
copied into a buffer of its own, cast on the way, and given to JAX. A parameter therefore never
shares memory with a file, which may be replaced afterwards. On CPU, JAX adopts the buffer
instead of copying it (it is aligned for that) and treats it as constant: donating such an array
is safe, the program writes elsewhere. Inputs are turned to the front by JAX while it copies:
NumPy is several times slower at that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import jax
import numpy as np
from jax.experimental.layout import Format

from jaxserve.checkpoint.stored import Piece, Stored
from jaxserve.checkpoint.tensors import Index, Reader
from jaxserve.errors import CheckpointError
from jaxserve.layers.param import Axes, Axis, Joined, size_of

# XLA on CPU adopts memory with this alignment.
_ALIGNMENT = 64


def place(
    stored: Stored, reader: Reader, sharding: jax.sharding.Sharding | Format | None
) -> jax.Array:
    """Returns the parameter on its devices; None means the default device.

    Raises:
        CheckpointError: the checkpoint's weight has another shape or does not fit the dtype.
    """
    for piece in stored.pieces:
        _check_shape(stored, piece, reader)
    whole = tuple(slice(0, size) for size in stored.shape)
    if sharding is None:
        return jax.device_put(host_values(stored, reader, whole))
    read: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def values(index: Index | None) -> np.ndarray:
        part = whole if index is None else index
        # Replicas ask for the same slice again.
        key = tuple((cut.start, cut.stop) for cut in stored.canonical(part))
        if key not in read:
            read[key] = host_values(stored, reader, part)
        return read[key]

    return jax.make_array_from_callback(stored.shape, sharding, values)


def host_values(stored: Stored, reader: Reader, index: Index) -> np.ndarray:
    """Returns a slice of the stored form: a view, in stored order, of a buffer of its own."""
    canonical = stored.canonical(index)
    buffer = aligned(tuple(part.stop - part.start for part in canonical), stored.dtype)
    if stored.padded:
        buffer[...] = 0
    if stored.turns is None:
        _fill(buffer, stored, 0, reader, canonical)
    else:
        turns, inner = canonical[0], canonical[1:]
        for turn in range(turns.start, turns.stop):
            _fill(buffer[turn - turns.start], stored, turn, reader, inner)
    return buffer.transpose(stored.order)


def _fill(buffer: np.ndarray, stored: Stored, turn: int, reader: Reader, canonical: Index) -> None:
    """Fills buffer with a slice of the canonical form of one turn, but for its zeros."""
    pieces = stored.of_turn(turn)
    if stored.joined is not None:
        _fill_rows(buffer, stored.joined, pieces, reader, canonical)
        return
    (piece,) = pieces
    axes = stored.outputs + stored.inputs
    overlaps = (_overlaps(axis, part) for axis, part in zip(axes, canonical, strict=True))
    for parts in product(*overlaps):
        here, there = tuple(part[0] for part in parts), tuple(part[1] for part in parts)
        _cast(buffer[here], reader.read(piece.name, there), reader, piece.name)


def _overlaps(axis: Axis, part: slice) -> list[tuple[slice, slice]]:
    """Returns where a slice of an axis holds something: within the slice, and in the checkpoint."""
    found: list[tuple[slice, slice]] = []
    for start, real, length in axis.spans():
        first, last = max(part.start, start), min(part.stop, start + length)
        if first < last:
            here = slice(first - part.start, last - part.start)
            found.append((here, slice(first - start + real, last - start + real)))
    return found


def _fill_rows(
    buffer: np.ndarray, joined: Joined, pieces: Sequence[Piece], reader: Reader, canonical: Index
) -> None:
    """Fills buffer[rows, *inputs] from the pieces whose flattened outputs lie in these rows."""
    rows, inputs = canonical[0], canonical[1:]
    start = 0
    for share in range(joined.shares):
        for piece, (_, axes), size in zip(pieces, joined.members, joined.widths, strict=True):
            first, last = max(rows.start, start), min(rows.stop, start + size)
            if first < last:
                # A row of the array, and the row of the member that it is.
                shift = start - share * size
                target = buffer[first - rows.start : last - rows.start]
                _fill_member(target, piece, axes, reader, first - shift, inputs)
            start += size


def _fill_member(
    target: np.ndarray, piece: Piece, axes: Axes, reader: Reader, first: int, inputs: Index
) -> None:
    """Fills target with flattened outputs of a piece from `first` on, reading what it must."""
    # Rows may begin within a head: whole heads are taken, then trimmed.
    step, last = size_of(axes[1:]), first + len(target)
    outer = slice(first // step, -(-last // step))
    inner = tuple(slice(0, axis.size) for axis in axes[1:])
    for here, there in _overlaps(axes[0], outer):
        block = reader.read(piece.name, (there, *inner, *inputs))
        flat = block.reshape((there.stop - there.start) * step, *block.shape[len(axes) :])
        begin = (outer.start + here.start) * step
        top, end = max(first, begin), min(last, begin + len(flat))
        _cast(
            target[top - first : end - first], flat[top - begin : end - begin], reader, piece.name
        )


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns an empty array whose memory JAX on CPU can adopt."""
    nbytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + nbytes].view(dtype).reshape(shape)


def _cast(target: np.ndarray, values: np.ndarray, reader: Reader, name: str) -> None:
    """Copies values into target.

    Raises:
        CheckpointError: float16 cannot hold a value; the wider dtypes hold all.
    """
    with np.errstate(over="ignore"):
        np.copyto(target, values, casting="unsafe")
    if target.dtype == np.float16 and values.dtype != np.float16:
        lost = np.isinf(target) & np.isfinite(values)
        if lost.any():
            raise CheckpointError(
                f"{reader.where(name)}: {lost.sum()} values exceed float16's limit of 65504, "
                f"for example {values[lost][0]}; load in bfloat16 or float32"
            )


def _check_shape(stored: Stored, piece: Piece, reader: Reader) -> None:
    found = reader.shape(piece.name)
    if found is None:
        raise CheckpointError(
            f"the checkpoint has no weight {piece.name!r}, expected {list(piece.shape)}; the "
            "model was made from another config than the checkpoint's"
        )
    if found != piece.shape:
        raise CheckpointError(
            f"{reader.where(piece.name)}: weight {piece.name!r} is {list(found)} outputs first, "
            f"the model expects {list(piece.shape)}; it was made from another config"
        )
