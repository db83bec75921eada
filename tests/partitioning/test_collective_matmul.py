"""Products in pieces give what a collective and a product give."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from jaxserve.partitioning.collective_matmul import (
    Ring,
    all_gather_matmul,
    folded,
    matmul_reduce_scatter,
)

COUNTS = (1, 2, 3, 4, 5, 8)
T, F = 4, 12


def mapped(function, count: int, ins: tuple, out: PartitionSpec):
    mesh = Mesh(np.array(jax.devices()[:count]), ("z",))
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=ins, out_specs=out, check_vma=False))


def arrays(count: int, dtype: str = "float32"):
    """Returns x[T, E] and w[E, F], E a multiple of the devices that halves unevenly."""
    embed = 6 * count if count % 2 else 5 * count
    keys = jax.random.split(jax.random.key(count))
    return (
        jax.random.normal(keys[0], (T, embed)).astype(dtype),
        jax.random.normal(keys[1], (embed, F)).astype(dtype),
    )


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("ring", Ring)
def test_gathered_activations_are_multiplied(ring, count):
    x, w = arrays(count)
    run = partial(all_gather_matmul, axis="z", ring=ring)
    got = mapped(run, count, (PartitionSpec(None, "z"), PartitionSpec()), PartitionSpec())(x, w)
    np.testing.assert_allclose(got, np.asarray(x) @ np.asarray(w), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("ring", Ring)
def test_products_are_summed_and_cut(ring, count):
    width = arrays(count)[0].shape[1]
    weights = jax.random.normal(jax.random.key(7), (count * T, width))
    given = jax.random.normal(jax.random.key(8), (F, count * T))
    run = partial(matmul_reduce_scatter, axis="z", ring=ring)
    got = mapped(
        run,
        count,
        (PartitionSpec(None, "z"), PartitionSpec("z", None)),
        PartitionSpec(None, "z"),
    )(given, weights)
    np.testing.assert_allclose(got, np.asarray(given) @ np.asarray(weights), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ring", [ring for ring in Ring if ring is not Ring.PLAIN])
@pytest.mark.parametrize("count", [5, 8])
def test_a_ring_may_follow_any_order(ring, count):
    x, w = arrays(count)
    whole, cut = PartitionSpec(), PartitionSpec(None, "z")
    run = partial(all_gather_matmul, axis="z", ring=ring, order=folded(count))
    got = mapped(run, count, (cut, whole), whole)(x, w)
    np.testing.assert_allclose(got, np.asarray(x) @ np.asarray(w), rtol=1e-5, atol=1e-5)
    turned = partial(matmul_reduce_scatter, axis="z", ring=ring, order=folded(count))
    given = jax.random.normal(jax.random.key(8), (T, count * 3))
    weights = jax.random.normal(jax.random.key(9), (count * 3, count * 4))
    got = mapped(turned, count, (cut, PartitionSpec("z", None)), cut)(given, weights)
    np.testing.assert_allclose(got, np.asarray(given) @ np.asarray(weights), rtol=1e-4, atol=1e-4)


def test_sums_travel_in_the_dtype_of_the_activations():
    spec = PartitionSpec(None, "z"), PartitionSpec("z", None)
    x, w = jnp.ones((T, 8), jnp.bfloat16), jnp.ones((8, 8), jnp.bfloat16)
    for ring in (Ring.ONE_WAY, Ring.BIDIRECTIONAL, Ring.LOW_LATENCY):
        run = partial(matmul_reduce_scatter, axis="z", ring=ring)
        text = str(jax.make_jaxpr(mapped(run, 4, spec, spec[0]))(x, w))
        sent = [line for line in text.splitlines() if " ppermute" in line]
        assert sent and all(":bf16[" in line for line in sent)


@pytest.mark.parametrize(
    ("ring", "hops"), [(Ring.ONE_WAY, 7), (Ring.BIDIRECTIONAL, 14), (Ring.LOW_LATENCY, 7)]
)
def test_hops_of_eight_devices(ring, hops):
    """Low latency: four hops one way and three the other, at the same time."""
    x, w = arrays(8)
    run = partial(all_gather_matmul, axis="z", ring=ring)
    whole = PartitionSpec()
    jaxpr = jax.make_jaxpr(mapped(run, 8, (PartitionSpec(None, "z"), whole), whole))(x, w)
    assert str(jaxpr).count(" ppermute") == hops


def test_a_folded_ring_never_hops_over_two_devices():
    assert folded(8) == (0, 2, 4, 6, 7, 5, 3, 1)
    for count in range(2, 17):
        ring = folded(count)
        assert sorted(ring) == list(range(count))
        assert all(abs(a - b) <= 2 for a, b in zip(ring, (*ring[1:], ring[0]), strict=True))


def test_an_order_names_every_device():
    x, w = arrays(4)
    run = partial(all_gather_matmul, axis="z", ring=Ring.ONE_WAY, order=(0, 1, 1, 3))
    with pytest.raises(ValueError, match="once each"):
        mapped(run, 4, (PartitionSpec(None, "z"), PartitionSpec()), PartitionSpec())(x, w)
