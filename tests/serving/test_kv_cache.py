"""The pool and its sizes."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pytest

from jaxserve.config import cache_spec
from jaxserve.errors import UsageError
from jaxserve.serving.generation import Program
from jaxserve.serving.kv_cache import copy_pages, create_pool, padded_copies
from jaxserve.serving.options import EngineOptions, scheduler_config, size_cache

OPTIONS = EngineOptions(max_sequences=4, max_step_tokens=16, page_size=8)


def test_the_pool_takes_the_memory_that_the_geometry_says(program: Program) -> None:
    config = program.model.config
    geometry = size_cache(config, OPTIONS, "float32", 30_000)
    assert geometry.num_bytes <= 30_000
    pool = create_pool(program.model, geometry, program.kernels)
    for layer, pages in enumerate(pool):
        group = geometry.groups[geometry.group_of(layer)]
        assert all(leaf.shape[0] == group.num_pages for leaf in jax.tree.leaves(pages))
    # The CPU's layout has one more row beside the values of each head.
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(pool))
    per_token = sum(
        cache_spec(layer.attention, "float32").token_shape[1] * 4 for layer in config.layers
    )
    assert held > geometry.num_bytes
    assert held - geometry.num_bytes <= per_token * geometry.num_tokens


def test_a_window_keeps_no_more_than_it_can_use(program: Program) -> None:
    # Layer 0 sees everything, layer 1 the newest 6 tokens: beside a step of 16 tokens, that is
    # 6 - 1 + 16 tokens, which lie in at most 4 pages of 8.
    geometry = size_cache(program.model.config, OPTIONS, "float32", 1 << 20)
    full, window = geometry.groups
    assert full.layers == (0,)
    assert window.layers == (1,)
    assert full.table_width == 128 // 8
    assert full.num_pages == 4 * 128 // 8  # four sequences never need more
    assert window.table_width == 4
    assert window.num_pages == 4 * 4


@pytest.mark.parametrize("room", [12_288, 20_000, 40_000, 1 << 20])
def test_the_pool_is_the_largest_that_fits(program: Program, room: int) -> None:
    config = program.model.config
    geometry = size_cache(config, OPTIONS, "float32", room)
    assert geometry.num_bytes <= room
    more = size_cache(config, OPTIONS, "float32", 2 * room)
    assert more.num_bytes > geometry.num_bytes or geometry.groups[0].num_pages == 64


def test_a_pool_that_holds_no_sequence_is_refused_with_both_numbers(program: Program) -> None:
    with pytest.raises(UsageError, match=r"kv_bytes=1,000 .* 128 tokens, which takes [\d,]+ bytes"):
        size_cache(program.model.config, OPTIONS, "float32", 1_000)


def test_the_scheduler_gets_the_same_sizes(program: Program) -> None:
    geometry = size_cache(program.model.config, OPTIONS, "float32", 20_000)
    limits = scheduler_config(OPTIONS, geometry, 128)
    assert [g.num_pages for g in limits.groups] == [g.num_pages for g in geometry.groups]
    assert [g.window for g in limits.groups] == [None, 6]
    assert (limits.page_size, limits.num_slots, limits.max_step_tokens) == (8, 4, 16)
    assert (limits.client_weights, limits.max_prefill_tokens) == ({}, None)


def test_the_scheduler_gets_the_shares_of_clients_and_the_bound_on_chunks(
    program: Program,
) -> None:
    weights = {"a": 2.0}
    options = replace(OPTIONS, policy="fair", client_weights=weights, max_prefill_tokens=5)
    weights["a"] = 3.0  # what was given is kept
    assert hash(options) != hash(OPTIONS)
    limits = scheduler_config(
        options, size_cache(program.model.config, options, "float32", 20_000), 128
    )
    assert (limits.policy, limits.client_weights) == ("fair", {"a": 2.0})
    assert limits.max_prefill_tokens == 5
    frame = msgspec.msgpack.encode(options)  # as it goes to an engine's process
    assert msgspec.msgpack.decode(frame, type=EngineOptions) == options


def test_copies_touch_one_group_and_read_before_they_write(program: Program) -> None:
    geometry = size_cache(program.model.config, OPTIONS, "float32", 20_000)
    pool = create_pool(program.model, geometry, program.kernels)
    marked = [
        jax.tree.map(lambda x: x + jnp.arange(len(x)).reshape(-1, *[1] * (x.ndim - 1)), pages)
        for pages in pool
    ]
    source, destination = padded_copies([(1, 2), (2, 3)], 8)
    assert source.tolist() == [1, 2, 1, 1, 1, 1, 1, 1]
    after = copy_pages(marked, geometry, 0, source, destination, program.kernels)
    for leaf in jax.tree.leaves(after[0]):
        assert np.unique(np.asarray(leaf[:5]).reshape(5, -1), axis=1).ravel().tolist() == [
            0, 1, 1, 2, 4,
        ]  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, after[1], marked[1])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_sequences": 0}, "max_sequences=0 must be at least 1"),
        ({"page_size": 24}, "page_size=24 is not a power of two from 8 to 256; use 16"),
        ({"max_step_tokens": 8}, "max_step_tokens=8 leaves no room"),
        ({"max_sequences": 64, "max_step_tokens": 64}, "use at least 65"),
        ({"policy": "lifo"}, "policy='lifo' is unknown; use fcfs or fair"),
        ({"max_in_flight": 0}, "max_in_flight=0 must be at least 1"),
        ({"max_prefill_tokens": 0}, "max_prefill_tokens=0 must be at least 1"),
        ({"policy": "fair", "client_weights": {"a": 0}}, r"client_weights\['a'\]=0 must be above"),
        ({"policy": "fair", "client_weights": {"a": float("nan")}}, "=nan must be above 0, and"),
        ({"client_weights": {"a": 2.0}}, "no effect with policy=fcfs; use fair"),
    ],
)
def test_impossible_options_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        EngineOptions(**fields)  # pyright: ignore[reportArgumentType]
