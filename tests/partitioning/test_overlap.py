"""Last projections whose communication goes on beside them, as a layout asks for it."""

from functools import partial

import jax
import numpy as np
import pytest
from jax import Array, lax
from jax.typing import DTypeLike

from jaxserve.partitioning.collectives import MeshComm
from jaxserve.partitioning.layout import Ffn, Heads, PhaseLayout, Ring, Stage
from jaxserve.partitioning.mesh import MeshPlan, make_mesh

X = np.random.default_rng(0).normal(size=(4, 48)).astype(np.float32)
W = np.random.default_rng(1).normal(size=(48, 5)).astype(np.float32)


def product(x: Array, w: Array, dtype: DTypeLike) -> Array:
    return lax.dot(x, w, precision="highest").astype(dtype)


def run(plan: MeshPlan, overlap: Ring, heads: Heads = Heads.HEADS):
    """Returns the function of the product X W on a mesh, W cut over z and y."""
    comm = MeshComm(PhaseLayout(Ffn.WS2D, heads, overlap), plan.sizes)

    def local(x: Array, w: Array) -> Array:
        terms = comm.contract(x, Stage.HIDDEN, w, 0, product)
        return lax.psum(terms, ("z", "y"))

    lies = comm.placement(Stage.HIDDEN)
    specs = jax.P(lies.tokens or None, lies.features or None), jax.P(("z", "y"), None)
    mapped = partial(jax.shard_map, mesh=make_mesh(plan), in_specs=specs, out_specs=jax.P())
    return jax.jit(mapped(local, check_vma=False))


@pytest.mark.parametrize("ring", list(Ring)[1:])
@pytest.mark.parametrize("x", [1, 2, 3, 4, 8])
def test_a_ring_gives_what_a_gather_gives(x: int, ring: Ring) -> None:
    found = run(MeshPlan(x, 2 if x < 8 else 1, 1), ring)(X, W)
    np.testing.assert_allclose(found, X @ W, rtol=1e-5, atol=1e-5)


def test_pieces_go_around_instead_of_a_gather() -> None:
    text = str(jax.make_jaxpr(run(MeshPlan(4, 2, 1), Ring.ONE_WAY))(X, W))
    assert text.count("ppermute") == 3
    assert "all_gather" not in text
    text = str(jax.make_jaxpr(run(MeshPlan(4, 2, 1), Ring.PLAIN))(X, W))
    assert "ppermute" not in text


def test_tokens_that_are_gathered_are_not_sent_around() -> None:
    made = run(MeshPlan(4, 2, 1), Ring.ONE_WAY, Heads.BATCH)
    assert "ppermute" not in str(jax.make_jaxpr(made)(X, W))
    np.testing.assert_allclose(made(X, W), X @ W, rtol=1e-5, atol=1e-5)
