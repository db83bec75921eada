"""Sizes of the int8 matmul's blocks."""

from __future__ import annotations

from dataclasses import dataclass

from jaxserve.pallas_kernels.int8_matmul import Mode

LANES = 128


@dataclass(frozen=True)
class Tile:
    """Sizes of one kernel's blocks: rows of activations, output channels, inputs."""

    rows: int
    channels: int
    inputs: int

    def within(self, rows: int, inputs: int, channels: int) -> Tile:
        """Returns the tile with no side longer than the operands, in whole registers."""
        return Tile(
            min(self.rows, _whole(rows, 32)),
            min(self.channels, _whole(channels, LANES)),
            min(self.inputs, _whole(inputs, LANES)),
        )


def _whole(size: int, step: int) -> int:
    return -(-size // step) * step


def tile_for(rows: int, inputs: int, channels: int, mode: Mode) -> Tile:
    """Returns the tile of a shape."""
    if rows <= 64:
        return Tile(64, 1024, 1024)
    return Tile(256, 512, 2048 if mode is Mode.W8A16 else 1024)
