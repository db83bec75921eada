"""Sizes of the int8 matmul's blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace

from jaxserve.pallas_kernels.int8_matmul import Mode
from jaxserve.pallas_kernels.tuning import TWO_CORES, UNTUNED, current_chip, tuned

LANES = 128

ROWS = (16, 256)
"""Numbers of rows that the table is tuned at: decoding, and a prompt's chunk."""


@dataclass(frozen=True)
class Tile:
    """Sizes of one kernel's blocks.

    Attributes:
        rows, channels, inputs: of activations, of outputs, of the contraction.
        origin: where the sizes come from.
        cores: of a device, which share the output channels.
    """

    rows: int
    channels: int
    inputs: int
    origin: str = UNTUNED
    cores: int = 1

    def within(self, rows: int, inputs: int, channels: int) -> Tile:
        """Returns the tile with no side longer than the operands, in whole registers."""
        return replace(
            self,
            rows=min(self.rows, _whole(rows, 16)),
            channels=min(self.channels, _whole(channels, LANES)),
            inputs=min(self.inputs, _whole(inputs, LANES)),
        )


def _whole(size: int, step: int) -> int:
    return -(-size // step) * step


def tile_for(rows: int, inputs: int, channels: int, mode: Mode, chip: str | None = None) -> Tile:
    """Returns the tile of a shape, tuned for the chip where the table has it.

    Args:
        chip: see `tuning.current_chip`, which None asks.
    """
    chip = chip or current_chip()
    few, cores = rows <= 64, 2 if chip in TWO_CORES else 1
    row = tuned(
        "int8_matmul", chip, mode=mode.value, rows=ROWS[0] if few else ROWS[1],
        inputs=inputs, channels=channels,
    )  # fmt: skip
    if row is not None:
        return Tile(*row["tile"], origin=row["origin"], cores=cores)
    if few:
        return Tile(64, 1024, _even(inputs, 1024), cores=cores)
    most = 2048 if mode is Mode.W8A16 else 1024
    return Tile(256, 512, _even(inputs, most), cores=cores)


def _even(size: int, most: int) -> int:
    """Returns the size of equal parts, none longer than asked for, in whole rows of lanes."""
    return _whole(-(-size // -(-size // most)), LANES)
