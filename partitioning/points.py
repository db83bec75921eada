"""Deployments that a search has priced: one, and many as columns.

No JAX.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxserve.partitioning.demand import Serving
from jaxserve.partitioning.hardware import ChipSlice
from jaxserve.partitioning.layout import PhaseLayout
from jaxserve.partitioning.memory import Kept
from jaxserve.partitioning.network import Network
from jaxserve.partitioning.plan import MeshPlan


@dataclass(frozen=True)
class Option:
    """A way to lay a model on a slice.

    Attributes:
        replicas: copies of the model side by side; of those that decode, where prefill is apart.
        part: the chips of one, or of one of its stages.
        network: its mesh.
        prefill, decode: layouts.
        kept: dtypes.
        serving: whether prefill has chips of its own.
        prefill_replicas, prefill_network: those, where it has.
        stages: groups of layers of a replica, each on chips of its own.
    """

    replicas: int
    part: ChipSlice
    network: Network
    prefill: PhaseLayout
    decode: PhaseLayout
    kept: Kept
    serving: Serving
    prefill_replicas: int = 0
    prefill_network: Network | None = None
    stages: int = 1

    @property
    def sizes(self) -> dict[str, int]:
        """Returns the devices along x, y and z."""
        return dict(self.network.sizes)

    @property
    def mesh(self) -> MeshPlan:
        """Returns the mesh of a replica."""
        return MeshPlan(**self.sizes)

    @property
    def prefill_part(self) -> ChipSlice:
        """Returns the chips of a replica that prefills."""
        return (self.prefill_network or self.network).on

    @property
    def prefill_sizes(self) -> dict[str, int]:
        """Returns the devices along x, y and z of a replica that prefills."""
        return dict((self.prefill_network or self.network).sizes)

    def not_run(self) -> list[str]:
        """Returns what the runtime does not do yet, in words; nothing where it runs as it is."""
        found = []
        weights, kv = self.kept.weights.name, self.kept.kv.name
        if weights not in ("bfloat16", "float32", "int8"):
            found.append(f"weights in {weights}")
        if kv not in ("bfloat16", "float32", "int8", "float8_e4m3fn"):
            found.append(f"keys and values in {kv}")
        if self.serving is Serving.DISAGGREGATED:
            found.append("prefill on chips of its own")
        if self.stages > 1:
            found.append(f"layers in {self.stages} stages")
        return found

    def __str__(self) -> str:
        phases = str(self.decode)
        if self.prefill != self.decode:
            phases = f"prefill {self.prefill.ffn}, decode {self.decode}"
        where = f"{self.part.name} as {self.mesh}"
        if self.stages > 1:
            where = f"{self.stages} stages of {where}"
        if self.serving is Serving.DISAGGREGATED:
            phases = f"prefill {self.prefill}, decode {self.decode}"
            sizes = "x".join(map(str, self.prefill_sizes.values()))
            prefills = f"{self.prefill_replicas} x {self.prefill_part.name} as {sizes}"
            return f"{phases}, prefill on {prefills}, decode on {self.replicas} x {where}"
        return (
            f"{phases} on {self.replicas} x {where}"
            if self.replicas > 1
            else (f"{phases} on {where}")
        )


@dataclass(frozen=True)
class Point:
    """A deployment; see `search.Candidate`."""

    option: Option
    free: float
    batch: int
    group: int
    chunk: int
    ttft_s: float
    tpot_s: float
    rate: float


@dataclass(frozen=True)
class Points:
    """Deployments of several options: arrays of one shape, whose first dimension is the option.

    Attributes:
        options: what they are ways to run.
        free: bytes left on a device; below zero where it does not fit.
        batch, group, chunk: see `search.Candidate`.
        ttft_s, tpot_s: likewise.
        rate: requests per second of the whole slice.
    """

    options: tuple[Option, ...]
    free: np.ndarray
    batch: np.ndarray
    group: np.ndarray
    chunk: np.ndarray
    ttft_s: np.ndarray
    tpot_s: np.ndarray
    rate: np.ndarray

    @classmethod
    def of(cls, options: Sequence[Option], *columns: np.ndarray) -> Points:
        """Returns the points of some options, from arrays that go together."""
        return cls(tuple(options), *np.broadcast_arrays(*columns))

    @property
    def count(self) -> int:
        """Returns the deployments."""
        return self.free.size

    def at(self, index: int) -> Point:
        """Returns one of them, counted over all options."""
        place = np.unravel_index(index, self.free.shape)
        whole = (int(column[place]) for column in (self.batch, self.group, self.chunk))
        times = (float(column[place]) for column in (self.ttft_s, self.tpot_s, self.rate))
        return Point(self.options[int(place[0])], float(self.free[place]), *whole, *times)
