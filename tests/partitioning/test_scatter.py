"""Sums that are cut over devices, in the shapes that TPUs need."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxserve.partitioning.collectives import MeshComm
from jaxserve.partitioning.layout import Ffn, Heads, PhaseLayout, Stage
from jaxserve.partitioning.mesh import MeshPlan, make_mesh

LAYOUT = PhaseLayout(Ffn.WG_X, Heads.HEADS)  # tokens over x; widths over z and y are sums


@pytest.mark.parametrize("rows", [4, 16, 6])  # laid out in full tiles, in tiles already, neither
@pytest.mark.parametrize("width", [512, 1024, 96])
def test_every_device_has_its_piece_of_the_sum(rows, width):
    plan = MeshPlan(2, 2, 2)
    terms = np.arange(2 * 4 * rows * width, dtype=np.float32).reshape(4, 2 * rows, width) % 251
    comm = MeshComm(LAYOUT, plan.sizes)

    def move(x):
        return comm.move(x[0], Stage.PRODUCED, Stage.RESIDUAL)

    moved = jax.jit(
        jax.shard_map(
            move,
            mesh=make_mesh(plan),
            in_specs=PartitionSpec(("z", "y"), "x", None),
            out_specs=PartitionSpec("x", ("z", "y")),
            check_vma=False,
        )
    )(terms)
    np.testing.assert_array_equal(moved, terms.sum(axis=0))
