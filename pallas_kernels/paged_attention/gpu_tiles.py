"""Sizes of the attention kernel's blocks on Hopper."""

from __future__ import annotations

from dataclasses import dataclass

from jaxserve.config import AttentionSpec
from jaxserve.pallas_kernels.hopper import NUM_CORES, ROWS, SMEM_BYTES

ORIGIN = "by rule; compiled for sm_90a without spills, never timed"
"""Origin of every size here."""


CHUNK = 64
"""Features of a head of 128 or 256 that the second product takes at once, to save registers."""

KEYS = 64
"""Keys of a block: the least that the second product takes at its widest swizzle."""


@dataclass(frozen=True)
class Tile:
    """Sizes of one block of threads.

    Attributes:
        stages: blocks of keys that are copied ahead.
        groups: groups of 128 threads, with 64 rows of queries each, where an item has many.
        splits: shares of an item's keys in decode, each a block of threads of its own.
        keys: of a block; whole pages of it are copied at a time, or a part of one page.
        origin: where the sizes come from.
    """

    stages: int
    groups: int = 2
    splits: int = 1
    keys: int = KEYS
    origin: str = ORIGIN


def tile_for(
    spec: AttentionSpec, page_size: int, width: int, rows: int, page_bytes: int, scaled: bool
) -> Tile:
    """Returns the sizes for a shape.

    Args:
        width: columns of a page table.
        rows: sequences.
        page_bytes: of an element of a page.
        scaled: pages become the queries' type in shared memory.
    """
    # Sums of 256 features leave a second group too few registers.
    groups = 1 if scaled or spec.head_dim > 128 else 2
    step = 2 * KEYS * spec.head_dim * page_bytes
    stages = max(2, min(6, (SMEM_BYTES - smem_bytes(spec, groups, scaled)) // step))
    # One block of threads takes most of a multiprocessor's registers.
    most = max(1, width * page_size // (4 * KEYS))
    splits = 1
    while rows * spec.num_kv_heads * splits < NUM_CORES and 2 * splits <= most:
        splits *= 2
    return Tile(stages, groups, splits)


def smem_bytes(spec: AttentionSpec, groups: int, scaled: bool) -> int:
    """Returns the shared memory besides the slots of keys and values, at most."""
    queries = 2 * groups * ROWS * spec.head_dim * 2  # those for sinks, too
    results = groups * ROWS * chunk_of(spec.head_dim) * 4
    wide = KEYS * spec.head_dim * 2 if scaled else 0
    return queries + results + wide + 8192


def queries_of(spec: AttentionSpec, tile: Tile) -> int:
    """Returns the tokens of an item that has many, which fill its rows with a group's heads."""
    group = spec.num_heads // spec.num_kv_heads
    return max(1, tile.groups * ROWS // group)


def chunk_of(head: int) -> int:
    """Returns the features that the second product takes at once."""
    return head if head % CHUNK else CHUNK
