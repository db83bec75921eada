"""How many devices lie along each axis of a mesh.

    MeshPlan.of("2,2,2") == MeshPlan.of((2, 2, 2)) == MeshPlan(x=2, y=2, z=2)

No JAX.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

from jaxserve.errors import UnsupportedError, UsageError
from jaxserve.partitioning.placement import AXES


@dataclass(frozen=True)
class MeshPlan:
    """Devices along each axis.

    Attributes:
        x, y, z: what layouts name.
        data, expert, pipeline: reserved for copies of the model, experts and groups of layers.
    """

    x: int = 1
    y: int = 1
    z: int = 1
    data: int = 1
    expert: int = 1
    pipeline: int = 1

    def __post_init__(self) -> None:
        for name in AXES:
            if getattr(self, name) < 1:
                raise UsageError(
                    f"mesh {self.x},{self.y},{self.z} must have positive sizes, as in 2,2,2"
                )
        for name in ("data", "expert", "pipeline"):
            if getattr(self, name) != 1:
                raise UnsupportedError(
                    f"a mesh with {name}={getattr(self, name)} is not supported; leave it at 1"
                )

    @classmethod
    def of(cls, mesh: MeshPlan | str | Sequence[int]) -> MeshPlan:
        """Returns the plan that "2,2,2" or (2, 2, 2) stands for: sizes of x, y and z.

        Raises:
            UsageError: these are not three positive numbers.
        """
        if isinstance(mesh, MeshPlan):
            return mesh
        parts = mesh.split(",") if isinstance(mesh, str) else list(mesh)
        try:
            sizes = [int(part) if isinstance(part, str) else operator.index(part) for part in parts]
        except (TypeError, ValueError):
            sizes = []
        if len(sizes) != len(AXES):
            raise UsageError(f"mesh {mesh!r} is not three sizes; give X,Y,Z, as in 2,2,2")
        return cls(*sizes)

    @property
    def sizes(self) -> tuple[tuple[str, int], ...]:
        """Returns (axis, size) of x, y and z."""
        return tuple((axis, getattr(self, axis)) for axis in AXES)

    @property
    def num_devices(self) -> int:
        """Returns the devices of the whole mesh."""
        return self.x * self.y * self.z

    def __str__(self) -> str:
        return f"{self.x}x{self.y}x{self.z}"
