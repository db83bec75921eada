"""Rounds weights to int8 while they are read: symmetric, a scale per output channel, to nearest.

    reader = QuantizingReader(reader, quantized_names(model))
    reader.read("layers.0.attention.q", ())           # int8[heads, head, embed]
    reader.read("layers.0.attention.q.scales", ())    # float32[heads, head]

Only what a device holds is rounded, but a channel's scale is that of the whole channel, so every
weight is read once for its scales. They are the same on any mesh.
"""

from __future__ import annotations

import math

import numpy as np

from jaxserve.checkpoint.stored import stored_parameters
from jaxserve.checkpoint.tensors import Index, Reader
from jaxserve.layers.decoder import Model
from jaxserve.pallas_kernels.int8_matmul.reference import LIMIT

SCALES = ".scales"
_BLOCK_BYTES = 64 * 2**20


def quantized_names(model: Model) -> dict[str, int]:
    """Returns the logical weights that a model stores as int8, with their number of outputs."""
    return {
        piece.name.removesuffix(SCALES): len(piece.outputs)
        for stored in stored_parameters(model)
        if stored.path[-1] == "scales"
        for piece in stored.pieces
    }


class QuantizingReader:
    """A reader whose weights are int8, each with a logical weight of its scales beside it."""

    def __init__(self, reader: Reader, num_outputs: dict[str, int]) -> None:
        self._reader = reader
        self._num_outputs = num_outputs
        self._scales: dict[str, np.ndarray] = {}

    @property
    def parallel(self) -> int:
        """Returns how many parameters are best read at once."""
        return self._reader.parallel

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Returns the shape of a logical weight, outputs first; None where there is none."""
        base = name.removesuffix(SCALES)
        shape = self._reader.shape(base)
        if base == name or shape is None:
            return shape
        return shape[: self._num_outputs[base]]

    def where(self, name: str) -> str:
        """Returns the place of a logical weight, for messages."""
        return self._reader.where(name.removesuffix(SCALES))

    def read(self, name: str, index: Index) -> np.ndarray:
        """Returns a slice of a logical weight."""
        base = name.removesuffix(SCALES)
        if base not in self._num_outputs:
            return self._reader.read(name, index)
        scales = self._scales_of(base)
        if base != name:
            return scales[index]
        outputs = self._num_outputs[base]
        values = np.asarray(self._reader.read(name, index))
        kept = scales[index[:outputs]]
        kept = kept.reshape(*kept.shape, *[1] * (values.ndim - outputs))
        rounded = np.empty(values.shape, np.int8)
        for part in _blocks(values):
            # As on a device: float32 divided by float32, to the nearest, ties to even.
            rounded[part] = np.rint(values[part].astype(np.float32) / kept[part])
        return rounded

    def _scales_of(self, name: str) -> np.ndarray:
        """Returns float32[*outputs], kept: they are small, and each slice needs them."""
        if name not in self._scales:
            outputs = self._num_outputs[name]
            values = np.asarray(self._reader.read(name, ()))
            dims = tuple(range(outputs, values.ndim))
            largest = np.empty(values.shape[:outputs], np.float32)
            for part in _blocks(values):
                block = values[part].astype(np.float32)
                largest[part] = np.maximum(block.max(axis=dims), -block.min(axis=dims))
            unit = (largest / np.float32(LIMIT)).astype(np.float32)
            self._scales[name] = np.where(largest > 0, unit, np.float32(1))
        return self._scales[name]


def _blocks(values: np.ndarray) -> list[slice]:
    """Returns slices of the first dimension that bound what is widened to float32 at a time."""
    row_bytes = 4 * math.prod(values.shape[1:])
    rows = max(1, _BLOCK_BYTES // max(1, row_bytes))
    return [slice(start, start + rows) for start in range(0, len(values), rows)]
