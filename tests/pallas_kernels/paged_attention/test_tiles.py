"""Sizes of the attention kernel's blocks fit into the core, whatever the heads."""

import pytest

from jaxserve.config import AttentionSpec
from jaxserve.errors import UnsupportedError
from jaxserve.pallas_kernels.paged_attention.tiles import Tile, tile_for


def tile(heads: int, kv_heads: int, head_dim: int, chip: str, page_size: int = 16) -> Tile:
    return tile_for(AttentionSpec(heads, kv_heads, head_dim), page_size, 256, "bfloat16", chip)


def test_few_heads_take_the_same_blocks_on_every_chip() -> None:
    for chip in ("v4", "v5e", "v6e"):
        found = tile(8, 1, 128, chip)
        assert (found.prefill_keys, found.queries, found.key_heads) == (512, 64, 0)


def test_many_heads_take_fewer_queries_where_memory_is_small() -> None:
    # Sums of 32 queries of 128 heads, in float32, take 6 MiB, and operands another 10.
    assert tile(128, 8, 64, "v5e").queries == 32
    assert tile(128, 8, 64, "v4").queries == 16


def test_keys_of_many_heads_take_several_calls_where_memory_is_small() -> None:
    # A block of 128 keys of 96 heads is 6 MiB, and there are two.
    assert tile(96, 96, 128, "v5e").key_heads == 0
    assert tile(96, 96, 128, "v4").key_heads == 48
    # Of 256 keys, the least where a page has so many, it is twice that.
    assert tile(96, 96, 128, "v4", page_size=256).key_heads == 32


def test_queries_that_fit_nowhere_are_refused_with_the_remedy() -> None:
    with pytest.raises(UnsupportedError, match=r"1024 query heads on 1 .* v4; divide the heads"):
        tile(1024, 1, 64, "v4")
