"""Sizes of the attention kernel's blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from jaxserve.config import AttentionSpec
from jaxserve.pallas_kernels.paged_attention.mosaic import row_lanes

BLOCK_BYTES = 1 << 20
"""Bytes of keys and values that a decode step reads at once, where no table says otherwise: long
enough a copy that starting it costs little, and two of them fit into any core."""


@dataclass(frozen=True)
class Tile:
    """Sizes of one kernel.

    Attributes:
        decode_keys: keys of a block where an item has one query.
        prefill_keys: keys of a block where it has many.
        queries: tokens of an item with many; a multiple of 8.
        cores: of a device, which share every item's keys.
    """

    decode_keys: int
    prefill_keys: int
    queries: int
    cores: int = 1


def tile_for(spec: AttentionSpec, page_size: int, width: int, dtype: Any) -> Tile:
    """Returns the tile of a shape."""
    token = spec.num_kv_heads * row_lanes(spec.head_dim) * jnp.dtype(dtype).itemsize
    room = width * page_size
    keys = min(max(BLOCK_BYTES // token, 128), 2048)
    group = spec.num_heads // spec.num_kv_heads
    queries = min(max(512 // group, 8), 128) // 8 * 8
    return Tile(min(keys, room), min(512, room), queries)
