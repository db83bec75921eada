"""How long a collective takes on a slice.

    network = Network.of(slice_of("v4:4x4x4"), {"x": 4, "y": 4, "z": 4})
    network.time(Kind.ALL_GATHER, ("x",), full_bytes=9e6)      # Time(bytes_s=7.5e-5, hops_s=2e-6)

A ring of K devices sends both ways, so each of them receives (K-1)/K of a tensor at twice the
bandwidth of a link; a line has half of that. Sides of the torus work side by side. Devices of a
mesh axis that are not neighbours share the links between them. No JAX.

Source: jax-ml/scaling-book, chapters on TPUs and sharding; all-to-all from the load of the busiest
link.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np

from jaxserve.errors import UsageError
from jaxserve.partitioning.hardware import Axis, ChipSlice
from jaxserve.partitioning.placement import Kind
from jaxserve.partitioning.torus import Along, fold

Number = TypeVar("Number", float, np.ndarray)


@dataclass(frozen=True)
class Lane:
    """What the devices of some mesh axes have of one side of the grid.

    Attributes:
        size: devices along it.
        bandwidth: bytes per second that one of them receives.
        hops: links from one end to the other, at worst.
        hop_s: seconds for one.
        switch: every device reaches every other directly.
        ring: it wraps around.
    """

    size: int
    bandwidth: float
    hops: int
    hop_s: float
    switch: bool
    ring: bool


@dataclass(frozen=True)
class Time:
    """Seconds of a collective: to move the bytes, and until the first of them arrives."""

    bytes_s: float
    hops_s: float


@dataclass(frozen=True)
class Network:
    """A mesh on a slice.

    Attributes:
        on: the slice.
        sizes: devices along x, y and z.
        along: how the axes lie on the slice.
    """

    on: ChipSlice
    sizes: tuple[tuple[str, int], ...]
    along: tuple[Along, ...]

    @classmethod
    def of(cls, on: ChipSlice, sizes: Mapping[str, int]) -> Network:
        """Returns the mesh on a slice.

        Raises:
            UsageError: it does not fill the slice.
        """
        along = fold(on.torus, sizes)
        if along is None:
            shape = ",".join(map(str, sizes.values()))
            raise UsageError(
                f"mesh {shape} does not fill {on.name} with its {on.num_devices} devices; use "
                f"sizes whose product is {on.num_devices} and that its sides divide into"
            )
        return cls(on, tuple(sizes.items()), along)

    @property
    def shared(self) -> int:
        """Returns how many parts of sides there are: more of them, fewer rings."""
        return sum(len(one.parts) for one in self.along)

    @cached_property
    def _sides(self) -> tuple[Axis, ...]:
        return self.on.axes

    @cached_property
    def _lanes(self) -> dict[tuple[str, ...], tuple[Lane, ...]]:
        """Returns the lanes that were asked for; a search asks often."""
        return {}

    def lanes(self, axes: Collection[str]) -> tuple[Lane, ...]:
        """Returns the sides that the devices of some mesh axes lie along."""
        key = tuple(axes)
        if key not in self._lanes:
            self._lanes[key] = self._found(key)
        return self._lanes[key]

    def _found(self, axes: tuple[str, ...]) -> tuple[Lane, ...]:
        found = []
        for number, side in enumerate(self._sides):
            parts = [(one.axis, size) for one in self.along for p, size in one.parts if p == number]
            mine = [size for axis, size in parts if axis in axes]
            if not mine:
                continue
            size = math.prod(mine)
            first = next(i for i, (axis, _) in enumerate(parts) if axis in axes)
            # Strangers between neighbours use the same links.
            strangers = math.prod(n for axis, n in parts[first:] if axis not in axes)
            ring = side.ring and size == side.size
            if side.switch:
                found.append(Lane(size, side.bandwidth, 1, side.hop_s, True, False))
            else:
                width = (2 if ring else 1) * side.bandwidth / strangers
                hops = -(-size // 2) if ring else (size - 1) * strangers
                found.append(Lane(size, width, hops, side.hop_s, False, ring))
        return tuple(found)

    def time(self, kind: str, axes: Collection[str], full_bytes: float) -> Time:
        """Returns the seconds of a collective of one tensor.

        Args:
            full_bytes: see `cost.Collective`.
        """
        per_byte, hops_s = self.rates(kind, axes)
        return Time(full_bytes * per_byte, hops_s)

    def rates(self, kind: str, axes: Collection[str]) -> tuple[float, float]:
        """Returns (seconds per byte of the full tensor, seconds for the way alone)."""
        lanes = self.lanes(axes)
        if not lanes:
            return 0.0, 0.0
        passes = 2 if kind == Kind.ALL_REDUCE else 1
        hops_s = passes * sum(lane.hops * lane.hop_s for lane in lanes)
        if kind == Kind.ALL_TO_ALL:
            # What crosses the middle of a ring or a line; a switch sends once.
            loads = [
                (1 - 1 / lane.size if lane.switch else lane.size / 4) / lane.bandwidth
                for lane in lanes
            ]
            return max(loads), hops_s
        switches = [lane for lane in lanes if lane.switch]
        if len(switches) > 1:
            return passes * _nested(switches), hops_s
        count = math.prod(lane.size for lane in lanes)
        width = sum(lane.bandwidth for lane in lanes)
        share = 1 if kind == Kind.PERMUTE else (count - 1) / count
        return passes * share / width, hops_s


def _nested(lanes: list[Lane]) -> float:
    """Returns seconds per byte over hosts, then inside each, the slower network first."""
    total, share = 0.0, 1.0
    for lane in reversed(lanes):
        total += share * (lane.size - 1) / lane.size / lane.bandwidth
        share /= lane.size
    return total
