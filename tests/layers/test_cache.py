"""Attention over a cache in steps is attention over the whole sequence at once."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from jaxserve.config import AlibiSpec, AttentionSpec, LayerSpec, ModelConfig, cache_spec
from jaxserve.layers.cache import PAGE_SIZE, At, Cache, DenseCache, NoCache
from jaxserve.layers.param import Declare
from jaxserve.layers.step import Step
from jaxserve.pallas_kernels import kernel_set
from jaxserve.partitioning.collectives import LocalComm

from .tiny_models import SERIAL

KERNELS = kernel_set("xla")
BATCH, LENGTH, SLOTS = 2, 9, 12

SPECS = {
    "gqa": AttentionSpec(4, 2, 3),
    "window": AttentionSpec(3, 3, 4, window=3),
    "alibi": AttentionSpec(4, 1, 4, alibi=AlibiSpec()),
}


class Tokens:
    """Queries, keys and values of two sequences for two layers, all [2, B, T, heads, H]."""

    def __init__(self, spec: AttentionSpec, dtype: str = "float32") -> None:
        rng = np.random.default_rng(0)
        self.spec = spec
        heads = spec.num_heads, spec.num_kv_heads, spec.num_kv_heads
        self.qkv = [
            np.array(jnp.asarray(rng.normal(size=(2, BATCH, LENGTH, n, spec.head_dim)), dtype))
            for n in heads
        ]
        self.positions = np.tile(np.arange(LENGTH, dtype=np.int32), (BATCH, 1))

    def config(self) -> ModelConfig:
        layer = LayerSpec(self.spec, SERIAL.mlp, SERIAL.norm)
        return ModelConfig("cached", 5, 4, (layer, layer), SERIAL.norm, max_context_tokens=16)

    def cache(self, slots: int = SLOTS, dtype: str = "float32") -> DenseCache:
        return DenseCache.create(self.config(), BATCH, slots, Declare(dtype), LocalComm(), KERNELS)

    def attend(
        self, cache: Cache, columns: slice, positions: np.ndarray | None = None
    ) -> tuple[np.ndarray, Cache]:
        """Returns (attention [2, B, T, N, H] of these columns, the cache after them)."""
        chosen = self.positions[:, columns] if positions is None else positions
        qkv = [x[:, :, columns] for x in self.qkv]
        out, cache = attend(cache, qkv, chosen, self.spec)
        return np.asarray(out, np.float32), cache


@partial(jax.jit, static_argnums=3)
def attend(
    cache: Cache, qkv: Sequence[Array], positions: Array, spec: AttentionSpec
) -> tuple[Array, Cache]:
    flat = positions.reshape(-1)
    cache = cache.begin(Step(jnp.zeros_like(flat), flat, flat + 1))
    outs = []
    for layer in range(2):
        q, k, v = (x[layer].reshape(-1, *x.shape[3:]) for x in qkv)
        out, cache = cache.attend(At(layer), q, k, v, spec, KERNELS)
        outs.append(out.reshape(qkv[0].shape[1:]))
    return jnp.stack(outs), cache.end()


@pytest.mark.parametrize("name", SPECS)
def test_steps_of_any_size_give_what_one_step_gives(name: str) -> None:
    tokens = Tokens(SPECS[name])
    whole, _ = tokens.attend(NoCache(BATCH), slice(None))
    cache: Cache = tokens.cache()
    parts = []
    for start, end in [(0, 4), (4, 7), (7, 8), (8, 9)]:
        part, cache = tokens.attend(cache, slice(start, end))
        parts.append(part)
    np.testing.assert_allclose(np.concatenate(parts, axis=2), whole, atol=2e-6)


def test_rows_of_different_length_go_on_side_by_side() -> None:
    # Row 0 starts with four tokens, row 1 with two and padding; then both draw three more.
    tokens = Tokens(SPECS["window"])
    whole, _ = tokens.attend(NoCache(BATCH), slice(None))
    lengths = np.array([4, 2])
    column = np.arange(4)
    first = np.where(column < lengths[:, None], column, -1).astype(np.int32)
    found, cache = tokens.attend(tokens.cache(), slice(0, 4), first)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(found[:, row, :length], whole[:, row, :length], atol=2e-6)
    for index in range(3):
        at = lengths + index
        rows = [np.stack([x[:, row, at[row], None] for row in range(2)], 1) for x in tokens.qkv]
        out, cache = attend(cache, rows, at[:, None].astype(np.int32), tokens.spec)
        for row in range(2):
            np.testing.assert_allclose(out[:, row, 0], whole[:, row, at[row]], atol=2e-6)


def test_a_row_does_not_see_its_neighbour() -> None:
    tokens, changed = Tokens(SPECS["gqa"]), Tokens(SPECS["gqa"])
    for x in changed.qkv:
        x[:, 0] += 1
    _, cache = tokens.attend(tokens.cache(), slice(0, 4))
    _, other = changed.attend(changed.cache(), slice(0, 4))
    found, _ = tokens.attend(cache, slice(4, 7))
    wanted, _ = changed.attend(other, slice(4, 7))
    np.testing.assert_array_equal(found[:, 1], wanted[:, 1])
    assert not np.allclose(found[:, 0], wanted[:, 0])


def test_keys_and_values_are_kept_in_the_dtype_of_the_cache() -> None:
    tokens = Tokens(SPECS["gqa"])
    whole, _ = tokens.attend(NoCache(BATCH), slice(None))
    _, cache = tokens.attend(tokens.cache(dtype="bfloat16"), slice(0, 4))
    assert isinstance(cache, DenseCache)
    assert {x.dtype for x in jax.tree.leaves(cache.pages)} == {jnp.dtype("bfloat16")}
    found, _ = tokens.attend(cache, slice(4, 7))
    np.testing.assert_allclose(found, whole[:, :, 4:7], atol=0.03)


@pytest.mark.parametrize(("slots", "width"), [(1, 1), (PAGE_SIZE, 1), (PAGE_SIZE + 1, 2)])
def test_a_cache_has_room_for_every_layer_row_and_slot(slots: int, width: int) -> None:
    cache = Tokens(SPECS["gqa"]).cache(slots)
    assert len(cache.pages) == 2
    assert cache.table.shape == (BATCH, width)
    assert sorted(cache.table.ravel().tolist()) == list(range(BATCH * width))
    assert {x.shape[0] for x in jax.tree.leaves(cache.pages)} == {BATCH * width}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SPECS)
def test_a_token_has_the_same_bits_however_the_steps_are_cut(name: str, dtype: str) -> None:
    tokens = Tokens(SPECS[name], dtype)
    whole, _ = tokens.attend(tokens.cache(dtype=dtype), slice(None))
    cache: Cache = tokens.cache(2 * PAGE_SIZE, dtype)
    for start, end in [(0, 4), (4, 7), (7, 8), (8, 9)]:
        part, cache = tokens.attend(cache, slice(start, end))
        np.testing.assert_array_equal(part, whole[:, :, start:end])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SPECS)
def test_a_token_has_the_bits_that_it_has_in_pages(name: str, dtype: str) -> None:
    # One sequence of two, its pages of four in no order, in a step with other counts.
    tokens = Tokens(SPECS[name], dtype)
    whole, _ = tokens.attend(tokens.cache(dtype=dtype), slice(None))
    q, k, v = (jnp.asarray(x[0, 1], dtype) for x in tokens.qkv)
    positions = jnp.arange(LENGTH, dtype=jnp.int32)
    table = jnp.array([[5, 2, 0]], jnp.int32)
    pages = KERNELS.init_pages(6, 4, cache_spec(tokens.spec, dtype))
    pages = KERNELS.write_pages(pages, k, v, table, positions * 0, positions, page_size=4)
    starts, lengths = jnp.array([0, LENGTH]), jnp.array([LENGTH])
    found = KERNELS.paged_attention(
        q, pages, table, starts, lengths, positions, tokens.spec, page_size=4
    )
    np.testing.assert_array_equal(np.asarray(found, np.float32), whole[0, 1])


def test_padding_is_not_valid() -> None:
    step = Step(jnp.zeros(3, jnp.int32), jnp.array([0, -1, 4]), jnp.zeros(3, jnp.int32))
    assert step.valid.tolist() == [True, False, True]
