"""Sizes of the attention kernel's blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from jaxserve.config import AttentionSpec
from jaxserve.pallas_kernels.paged_attention.mosaic import row_lanes
from jaxserve.pallas_kernels.tuning import UNTUNED, current_chip, tuned

BLOCK_BYTES = 1 << 21
"""Bytes of keys and values that a decode step reads at once, where no table says otherwise: long
enough a copy that starting it costs little, and two of them fit into any core."""


TWO_CORES = ("v4", "v5p")
"""Chips whose two cores are one device."""


@dataclass(frozen=True)
class Tile:
    """Sizes of one kernel.

    Attributes:
        decode_keys: keys of a block where an item has one query.
        prefill_keys: keys of a block where it has many.
        queries: tokens of an item with many; a multiple of 8.
        cores: of a device, which share every item's keys.
        origin: where the sizes come from.
    """

    decode_keys: int
    prefill_keys: int
    queries: int
    cores: int = 1
    origin: str = UNTUNED


def tile_for(
    spec: AttentionSpec, page_size: int, width: int, dtype: Any, chip: str | None = None
) -> Tile:
    """Returns the tile of a shape, tuned for the chip where the table has it.

    Args:
        width: columns of a page table; no block is longer than what it holds.
        chip: see `tuning.current_chip`, which None asks.
    """
    chip = chip or current_chip()
    room = width * page_size
    group = spec.num_heads // spec.num_kv_heads
    queries = min(max(512 // group, 8), 128) // 8 * 8
    row = tuned(
        "paged_attention", chip, heads=spec.num_heads, kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim, pages=jnp.dtype(dtype).name,
    )  # fmt: skip
    token = spec.num_kv_heads * row_lanes(spec.head_dim) * jnp.dtype(dtype).itemsize
    # A core of v4 has an eighth of the others' memory.
    size, most = (BLOCK_BYTES // 2, 2048) if chip == "v4" else (BLOCK_BYTES, 8192)
    keys = min(max(size // token, 128), most) if row is None else row["keys"]
    origin = UNTUNED if row is None else row["origin"]
    cores = 2 if chip in TWO_CORES else 1
    return Tile(min(keys, room), min(512, room), queries, cores, origin)
