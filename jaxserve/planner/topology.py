"""Slices of TPUs that are not here, as meshes x, y, z.

    mesh = SLICES["v4:4x4x4"].mesh()          # 64 abstract devices; needs libtpu, not a TPU

Every mesh axis lies on an axis of the torus, or on a part of one. Where an axis of the torus is
split, neither part wraps around.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from jaxserve.errors import UsageError

_AXES = ("x", "y", "z")

_QUIET = {
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
        torus: for each axis of the torus, the (mesh axis, size) pairs on it, the slowest first.
        wraps: every axis of the torus is a ring.
        chip_config: libtpu's name of how cores of a chip go together.
    """

    name: str
    torus: tuple[tuple[tuple[str, int], ...], ...]
    wraps: bool
    chip_config: str | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """Returns the devices along x, y and z."""
        found = dict.fromkeys(_AXES, 1)
        for parts in self.torus:
            found.update(parts)
        return found

    @property
    def wrapped(self) -> dict[str, bool]:
        """Returns for x, y and z whether the axis is a ring."""
        found = dict.fromkeys(_AXES, False)
        for parts in self.torus:
            found.update((axis, self.wraps and len(parts) == 1) for axis, _ in parts)
        return found

    def mesh(self) -> Mesh:
        """Returns the mesh of abstract devices.

        Raises:
            UsageError: libtpu is not installed.
        """
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)
        options = {} if self.chip_config is None else {"chip_config_name": self.chip_config}
        try:
            found = topologies.get_topology_desc(platform="tpu", topology_name=self.name, **options)
        except RuntimeError as error:
            raise UsageError(
                f"the compiler for TPU slice {self.name} is missing; pip install 'jaxserve[verify]'"
            ) from error
        devices = sorted(found.devices, key=lambda device: tuple(device.coords)[: len(self.torus)])
        parts = [part for parts in self.torus for part in parts]
        grid = np.asarray(devices).reshape([size for _, size in parts])
        names = [axis for axis, _ in parts]
        grid = grid.transpose([names.index(axis) for axis in _AXES if axis in names])
        return Mesh(grid.reshape(list(self.sizes.values())), _AXES)


def _cube(name: str, wraps: bool, chip_config: str | None = None) -> Slice:
    sizes = [int(size) for size in name.split(":")[1].split("x")]
    # Coordinates are sorted by the first torus axis, which is x.
    torus = tuple(((axis, size),) for axis, size in zip(_AXES, sizes, strict=True))
    return Slice(name, torus, wraps, chip_config)


def _flat(name: str) -> Slice:
    """Returns an 8x8 slice: x and y share the first axis of the torus; z is the second."""
    return Slice(name, ((("y", 2), ("x", 4)), (("z", 8),)), wraps=False)


SLICES = {
    one.name: one
    for one in (
        _cube("v4:4x4x4", True, "megacore"),
        _cube("v5p:4x4x4", True),
        _flat("v5e:8x8"),
        _flat("v6e:8x8"),
        _cube("v4:2x2x2", False, "megacore"),
        Slice("v5e:2x4", ((("x", 2),), (("y", 2), ("z", 2))), wraps=False),
    )
}
"""Slices by name. A torus of v5e or v6e wraps from 16 chips on, one of v4 or v5p from 4.

With x=4 on 64 chips a width is cut as the paper's optimum sqrt(64)/2 for an MLP four times as wide.
"""


def chips(name: str) -> int:
    """Returns the chips of a slice."""
    return math.prod(SLICES[name].sizes.values())
