"""Sizes of the attention kernel's blocks on Hopper."""

from __future__ import annotations

from dataclasses import dataclass

from jaxserve.config import AttentionSpec
from jaxserve.pallas_kernels.hopper import NUM_CORES, ROWS

ORIGIN = "by rule; compiled for sm_90a without spills, never timed"
"""Origin of every size here."""


@dataclass(frozen=True)
class Tile:
    """Sizes of one block of threads.

    Attributes:
        keys: of a block; whole pages of it are copied at a time, or a part of one page.
        stages: blocks of keys that are copied ahead, in decode and in prefill.
        groups: groups of 128 threads, with 64 rows of queries each, where an item has many.
        splits: shares of an item's keys in decode, each a block of threads of its own.
        origin: where the sizes come from.
    """

    keys: int = 64
    stages: int = 3
    groups: int = 2
    splits: int = 1
    origin: str = ORIGIN


def tile_for(
    spec: AttentionSpec, page_size: int, width: int, rows: int, wide: bool, scaled: bool
) -> Tile:
    """Returns the sizes for a shape.

    Args:
        width: columns of a page table.
        rows: sequences.
        wide: an element of a page has two bytes.
        scaled: pages have scales, and so become the queries' type in shared memory.
    """
    keys = max(64, page_size if page_size <= 64 else 64)
    step = 2 * keys * spec.head_dim * (2 if wide else 1)
    stages = max(2, min(4, (96 << 10) // step))
    most = max(1, width * page_size // (4 * keys))
    splits = 1
    while rows * spec.num_kv_heads * splits < 2 * NUM_CORES and 2 * splits <= most:
        splits *= 2
    return Tile(keys, stages, 1 if scaled else 2, splits)


def queries_of(spec: AttentionSpec, tile: Tile) -> int:
    """Returns the tokens of an item that has many, which fill its rows with a group's heads."""
    group = spec.num_heads // spec.num_kv_heads
    return max(1, tile.groups * ROWS // group)
