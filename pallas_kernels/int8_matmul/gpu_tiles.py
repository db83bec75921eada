"""Sizes of the int8 matmul's blocks on Hopper."""

from __future__ import annotations

from dataclasses import dataclass, replace

from jaxserve.pallas_kernels.hopper import NUM_CORES, ROWS, SMEM_BYTES
from jaxserve.pallas_kernels.int8_matmul import Mode

ORIGIN = "by rule; compiled for sm_90a without spills, never timed"
"""Origin of every size here."""

FEW = 64
"""Up to so many rows the weight is the left operand: wgmma has at least 64 rows there."""

HALF = 112 * 1024
"""Shared memory of a block of threads that leaves room for a second one."""

BARRIERS = 1024
"""Shared memory of the barriers, at most."""

SUM_BYTES = 4
"""Of an element of a result that is not finished in the kernel."""


@dataclass(frozen=True)
class Tile:
    """Sizes of one block of threads.

    Attributes:
        left: rows of the left operand that one group of threads multiplies; a multiple of 64.
        right: rows of the right operand, for all groups; a multiple of 8, at most 256.
        inputs: of the contraction, in a step.
        stages: steps that are copied ahead.
        groups: groups of 128 threads that multiply; one more copies.
        splits: shares of the contraction, each a block of threads of its own; equal but for one
            step.
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


def smem_bytes(tile: Tile, mode: Mode, result_bytes: int) -> int:
    """Returns the shared memory of a block of threads: slots, results and barriers."""
    return tile.stages * _step_bytes(tile, mode) + _result_bytes(tile, result_bytes) + BARRIERS


def _step_bytes(tile: Tile, mode: Mode) -> int:
    """Returns the bytes of both operands in a step."""
    x_bytes = 2 if mode is Mode.W8A16 else 1  # and x is on the right, then
    return tile.inputs * (tile.left * tile.groups + tile.right * x_bytes)


def _result_bytes(tile: Tile, element: int) -> int:
    return tile.left * tile.groups * tile.right * (element if tile.splits == 1 else SUM_BYTES)


def _staged(tile: Tile, mode: Mode, result_bytes: int, most: int, limit: int) -> Tile:
    """Returns a tile with as many stages as fit into a limit, up to `most`."""
    room = limit - BARRIERS - _result_bytes(tile, result_bytes)
    return replace(tile, stages=min(most, room // _step_bytes(tile, mode)))


def tile_for(rows: int, inputs: int, channels: int, mode: Mode, result_bytes: int) -> Tile:
    """Returns the sizes for a shape.

    Args:
        result_bytes: of an element that a block of threads writes where nothing is shared out.
    """
    right = next(n for n in (8, 16, 32, 64, 128, 256) if rows <= n or n == 256)
    if not swapped(rows, mode):
        return _staged(Tile(128, 128), mode, result_bytes, 3, SMEM_BYTES)
    if right > FEW:
        return _staged(Tile(ROWS, right, inputs=64), mode, result_bytes, 3, SMEM_BYTES)
    # Enough blocks for two on every multiprocessor, and enough steps that copying pays.
    blocks = -(-channels // (2 * ROWS)) * -(-rows // right)
    steps = -(-inputs // 128)
    splits = 1
    while blocks * splits < NUM_CORES and steps >= 8 * splits:
        splits *= 2
    # Widened weights for 64 rows take the registers of both.
    limit = SMEM_BYTES if mode is Mode.W8A16 and right == FEW else HALF
    return _staged(Tile(ROWS, right, splits=splits), mode, result_bytes, 6, limit)
