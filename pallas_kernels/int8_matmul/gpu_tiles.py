"""Sizes of the int8 matmul's blocks on Hopper."""

from __future__ import annotations

from dataclasses import dataclass

from jaxserve.pallas_kernels.hopper import NUM_CORES, ROWS
from jaxserve.pallas_kernels.int8_matmul import Mode

ORIGIN = "by rule; compiled for sm_90a without spills, never timed"
"""Origin of every size here."""

FEW = 64
"""Up to so many rows the weight is the left operand: wgmma has at least 64 rows there."""

HALF = 104 * 1024
"""Shared memory of a block of threads that leaves room for a second one, and for its results."""


@dataclass(frozen=True)
class Tile:
    """Sizes of one block of threads.

    Attributes:
        left: rows of the left operand that one group of threads multiplies; a multiple of 64.
        right: rows of the right operand, for all groups; a multiple of 8, at most 256.
        inputs: of the contraction, in a step.
        stages: steps that are copied ahead.
        groups: groups of 128 threads that multiply; one more copies.
        splits: shares of the contraction, each a block of threads of its own.
        origin: where the sizes come from.
    """

    left: int
    right: int
    inputs: int = 128
    stages: int = 4
    groups: int = 2
    splits: int = 1
    origin: str = ORIGIN


def swapped(rows: int, mode: Mode) -> bool:
    """Returns whether the weight is the left operand.

    A weight that becomes bfloat16 passes through registers, which only the left operand may.
    """
    return mode is Mode.W8A16 or rows <= FEW


def tile_for(rows: int, inputs: int, channels: int, mode: Mode) -> Tile:
    """Returns the sizes for a shape."""
    right = next(n for n in (8, 16, 32, 64, 128, 256) if rows <= n or n == 256)
    if not swapped(rows, mode):
        return Tile(128, 128, stages=3)
    if right > FEW:
        return Tile(ROWS, right, inputs=64, stages=3)
    # Enough blocks for two on every multiprocessor, and enough steps that copying pays.
    blocks = -(-channels // (2 * ROWS)) * -(-rows // right)
    steps = -(-inputs // 128)
    splits = 1
    while blocks * splits < NUM_CORES and steps >= 8 * splits:
        splits *= 2
    step = 128 * (2 * ROWS + right * (2 if mode is Mode.W8A16 else 1))
    return Tile(ROWS, right, stages=min(6, HALF // step), splits=splits)
