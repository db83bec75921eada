"""What every layer of one forward shares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from jax import Array

from jaxserve.config import RopeSpec
from jaxserve.layers.rope import rotation
from jaxserve.layers.step import Step
from jaxserve.layers.tap import Taps
from jaxserve.pallas_kernels import KernelSet
from jaxserve.partitioning.collectives import Comm


@dataclass(frozen=True)
class Runtime:
    """Collectives, kernels, taps and per-step facts that the layers are given."""

    comm: Comm
    kernels: KernelSet
    tap: Taps
    step: Step
    rotations: Mapping[RopeSpec, tuple[Array, Array]] = field(default_factory=dict)

    @classmethod
    def begin(
        cls, step: Step, ropes: set[RopeSpec], comm: Comm, kernels: KernelSet, tap: Taps
    ) -> Runtime:
        """Returns the runtime of one step; every rotary table is computed once for all layers."""
        tables = {spec: rotation(spec, step.positions, step.lengths) for spec in ropes}
        return cls(comm, kernels, tap, step, tables)
