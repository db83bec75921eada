"""Slices of TPUs that are not here, as meshes x, y, z.

mesh = SLICES["v4:4x4x4"].mesh()          # 64 abstract devices; needs libtpu, not a TPU
along_of(mesh)                            # how its axes lie on the torus, and which are rings
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from jax.experimental import topologies
from jax.sharding import Mesh

from jaxserve.errors import UsageError
from jaxserve.partitioning.mesh import MeshPlan, make_mesh

_SETTINGS = {
    # Without these libtpu asks the cloud's metadata server what it runs on.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # Otherwise a second process aborts on a lock file.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclass(frozen=True)
class Slice:
    """A slice of a TPU generation and the mesh on it.

    Attributes:
        name: as libtpu names it.
        plan: sizes of x, y and z.
        chip_config: libtpu's name of how the cores of a chip go together.
    """

    name: str
    plan: MeshPlan
    chip_config: str | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """Returns the devices along x, y and z."""
        return dict(self.plan.sizes)

    def mesh(self) -> Mesh:
        """Returns the mesh of abstract devices.

        Raises:
            UsageError: libtpu is not installed.
        """
        for name, value in _SETTINGS.items():
            os.environ.setdefault(name, value)
        options = {} if self.chip_config is None else {"chip_config_name": self.chip_config}
        try:
            found = topologies.get_topology_desc(platform="tpu", topology_name=self.name, **options)
        except RuntimeError as error:
            raise UsageError(
                f"no compiler for TPU slice {self.name}: {error}; pip install 'jaxserve[verify]'"
            ) from error
        return make_mesh(self.plan, found.devices)


_MEGACORE = "megacore"  # the two cores of a v4 chip are one device

SLICES = {
    one.name: one
    for one in (
        Slice("v4:4x4x4", MeshPlan(4, 4, 4), _MEGACORE),
        Slice("v5p:4x4x4", MeshPlan(4, 4, 4)),
        Slice("v5e:8x8", MeshPlan(4, 2, 8)),
        Slice("v6e:8x8", MeshPlan(4, 2, 8)),
        Slice("v4:2x2x2", MeshPlan(2, 2, 2), _MEGACORE),
        Slice("v5e:2x4", MeshPlan(2, 2, 2)),
    )
}
"""Slices by name. With x=4 on 64 chips the width is cut as the paper has it for an MLP four times
as wide, sqrt(64) / 2; on 8x8 chips x and y then share an axis of the plane, which is no ring.
"""
