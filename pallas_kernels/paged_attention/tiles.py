"""Sizes of the attention kernel's blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp

from jaxserve.config import AttentionSpec
from jaxserve.errors import UnsupportedError
from jaxserve.pallas_kernels.paged_attention.mosaic import (
    LANES,
    SUBLANES,
    Build,
    pages_of,
    row_lanes,
    used_bytes,
)
from jaxserve.pallas_kernels.tuning import TWO_CORES, UNTUNED, current_chip, tuned

BLOCK_BYTES = 1 << 21
"""Bytes of keys and values that a decode step reads at once, where no table says otherwise: long
enough a copy that starting it costs little, and two of them fit into any core."""

VMEM_BYTES = {"v4": 16 << 20, "v5e": 128 << 20, "v5p": 64 << 20, "v6e": 128 << 20}
"""Memory of a core."""

SPARE_BYTES = 2 << 20
"""Of it, what the compiler may want for itself."""

PREFILL_KEYS, PREFILL_ROWS = 512, 512
"""Keys of a block and rows of queries of a key head where an item has many, memory allowing."""


@dataclass(frozen=True)
class Tile:
    """Sizes of one kernel.

    Attributes:
        decode_keys: keys of a block where an item has one query.
        prefill_keys: keys of a block where it has many.
        queries: tokens of an item with many; a multiple of 8.
        cores: of a device, which share every item's keys.
        origin: where the sizes come from.
        key_heads: of one call; a model with more takes several. 0 takes all at once.
    """

    decode_keys: int
    prefill_keys: int
    queries: int
    cores: int = 1
    origin: str = UNTUNED
    key_heads: int = 0


def tile_for(
    spec: AttentionSpec,
    page_size: int,
    width: int,
    dtype: Any,
    chip: str | None = None,
    q_dtype: Any = "bfloat16",
) -> Tile:
    """Returns the tile of a shape, tuned for the chip where the table has it.

    What a core's memory does not hold is made smaller: blocks and runs of queries first, then the
    key heads of a call.

    Args:
        width: columns of a page table; no block is longer than what it holds.
        dtype, q_dtype: of the pages and the queries.
        chip: see `tuning.current_chip`, which None asks.

    Raises:
        UnsupportedError: the query heads of one key head exceed the memory.
    """
    chip = chip or current_chip()
    room = width * page_size
    row = tuned(
        "paged_attention", chip, heads=spec.num_heads, kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim, pages=jnp.dtype(dtype).name,
    )  # fmt: skip
    # A core of v4 has an eighth of the others' memory.
    size, most = (BLOCK_BYTES // 2, 2048) if chip == "v4" else (BLOCK_BYTES, 8192)
    origin = UNTUNED if row is None else row["origin"]
    cores = 2 if chip in TWO_CORES else 1
    memory = VMEM_BYTES.get(chip or "", max(VMEM_BYTES.values())) - SPARE_BYTES
    queries = min(max(PREFILL_ROWS // (spec.num_heads // spec.num_kv_heads), 8), 128) // 8 * 8
    for heads in _divisors(spec.num_kv_heads):
        shape = _Shape(heads_of(spec, heads), page_size, dtype, q_dtype, cores)
        token = heads * row_lanes(spec.head_dim) * jnp.dtype(dtype).itemsize
        keys = min(max(size // token, LANES), most) if row is None else row["keys"]
        decode = shape.largest([1], min(keys, room), memory)
        prefill = shape.largest(range(queries, 0, -SUBLANES), min(PREFILL_KEYS, room), memory)
        if decode is not None and prefill is not None:
            apart = heads if heads < spec.num_kv_heads else 0
            return Tile(decode[1], prefill[1], prefill[0], cores, origin, apart)
    raise UnsupportedError(
        f"{spec.num_heads} query heads on {spec.num_kv_heads} key heads of {spec.head_dim} need "
        f"more than the {memory >> 20} MiB of a core of {chip}; divide the heads over the mesh"
    )


def heads_of(spec: AttentionSpec, key_heads: int) -> AttentionSpec:
    """Returns the attention of some of the key heads."""
    group = spec.num_heads // spec.num_kv_heads
    return replace(spec, num_heads=key_heads * group, num_kv_heads=key_heads)


def _divisors(count: int) -> Iterator[int]:
    """Yields the divisors of a count, the largest first."""
    return (part for part in range(count, 0, -1) if count % part == 0)


@dataclass(frozen=True)
class _Shape:
    """What the memory of a kernel depends on besides its tile."""

    spec: AttentionSpec
    page_size: int
    dtype: Any
    q_dtype: Any
    cores: int

    def largest(self, queries: Sequence[int], keys: int, memory: int) -> tuple[int, int] | None:
        """Returns the (queries, keys) of most scores that fit, None where nothing does.

        Args:
            queries: to choose from.
            keys: at most; parts of it are tried too.
        """
        sizes = [keys]
        while sizes[-1] > LANES:
            sizes.append(max(sizes[-1] // 2 // LANES * LANES, LANES))
        pairs = [(some, size) for some in queries for size in sizes]
        fitting = [pair for pair in pairs if self.bytes(*pair) <= memory]
        return max(fitting, key=lambda pair: pair[0] * pair[1], default=None)

    def bytes(self, queries: int, keys: int) -> int:
        """Returns the memory of a kernel that does all that these heads may be asked for."""
        windowed, split = self.spec.window is not None, self.cores > 1
        scaled = jnp.dtype(self.dtype).itemsize == 1
        pages = pages_of(keys, self.page_size)
        build = Build(
            spec=self.spec, queries=queries, page_size=self.page_size, pages_per_block=pages,
            width=pages, pinned_pages=0, sink_tokens=0, newest=LANES if queries > 1 else 0,
            sink_queries=windowed, scaled=scaled, lse=split, written=queries == 1, items=1,
            cores=self.cores, out_dtype="float32" if split else str(jnp.dtype(self.q_dtype)),
        )  # fmt: skip
        return used_bytes(build, self.dtype, self.q_dtype)
