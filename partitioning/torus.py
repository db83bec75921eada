"""Lays the axes of a mesh on the physical axes of a torus of chips.

    fold(Torus((4, 4, 4), (True,) * 3), {"x": 4, "y": 4, "z": 4})     # one on one, all rings
    fold(Torus((8, 8), (False,) * 2), {"x": 2, "y": 4, "z": 8})       # x and y share the first

A mesh axis that takes whole physical axes keeps their wrap-around, so its collectives run on a
ring. One that takes a part of a physical axis loses it, and takes about twice the time: such
placements are the last resort. No JAX.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

WRAPS_AT_16 = ("TPU v5 lite", "TPU v5e", "TPU v6 lite", "TPU v6e")
"""Kinds of chips in a plane of up to 16 by 16, of which an axis is a ring at 16 alone."""


@dataclass(frozen=True)
class Torus:
    """Chips on a grid.

    Attributes:
        shape: chips along each physical axis.
        wraps: whether the axis is a ring.
    """

    shape: tuple[int, ...]
    wraps: tuple[bool, ...]

    @classmethod
    def of(cls, kind: str, shape: Sequence[int]) -> Torus:
        """Returns the torus that chips of a kind form in this shape.

        Args:
            kind: as JAX names the device.

        Source: Google Cloud TPU documentation, system architecture.
        """
        if kind in WRAPS_AT_16:
            wraps = tuple(size == 16 for size in shape)
        else:
            wraps = (all(size % 4 == 0 for size in shape),) * len(shape)
        return cls(tuple(shape), wraps)


@dataclass(frozen=True)
class Along:
    """How a mesh axis lies.

    Attributes:
        axis: of the mesh.
        parts: (physical axis, chips along it), the slowest first.
        ring: it takes whole physical axes, and they wrap around.
    """

    axis: str
    parts: tuple[tuple[int, int], ...]
    ring: bool

    @property
    def size(self) -> int:
        """Returns the chips along the axis."""
        return math.prod(size for _, size in self.parts)


def fold(torus: Torus, sizes: Mapping[str, int]) -> tuple[Along, ...] | None:
    """Returns how each axis of a mesh lies on the torus; None where it does not fill it.

    Args:
        sizes: chips along each axis of the mesh; their product is that of the torus.
    """
    if math.prod(sizes.values()) != math.prod(torus.shape):
        return None
    splits = product(*(_factors(size, len(sizes)) for size in torus.shape))
    fitting = (
        split
        for split in splits
        if all(
            math.prod(part[i] for part in split) == size for i, size in enumerate(sizes.values())
        )
    )
    best = min((_found(torus, tuple(sizes), split) for split in fitting), key=_cost, default=None)
    return best


def arranged(torus: Torus, along: Sequence[Along], chips: np.ndarray) -> np.ndarray:
    """Returns chips[*torus.shape] as they lie on the mesh: one dimension for each of its axes."""
    parts = [
        (physical, number)
        for physical in range(len(torus.shape))
        for number, one in enumerate(along)
        if any(p == physical for p, _ in one.parts)
    ]
    size_of = {(p, number): size for number, one in enumerate(along) for p, size in one.parts}
    split = chips.reshape([size_of[part] for part in parts])
    wanted = [(p, number) for number, one in enumerate(along) for p, _ in one.parts]
    return split.transpose([parts.index(part) for part in wanted]).reshape([a.size for a in along])


def _found(
    torus: Torus, axes: tuple[str, ...], split: tuple[tuple[int, ...], ...]
) -> tuple[Along, ...]:
    """Returns the placement in which mesh axis i takes `split[p][i]` chips of physical axis p."""
    found: list[Along] = []
    for number, axis in enumerate(axes):
        parts = tuple((p, split[p][number]) for p in range(len(split)) if split[p][number] > 1)
        ring = bool(parts) and all(torus.shape[p] == n and torus.wraps[p] for p, n in parts)
        found.append(Along(axis, parts, ring))
    return tuple(found)


def _cost(along: tuple[Along, ...]) -> tuple[int, tuple[tuple[int, ...], ...]]:
    """Returns what is to be least: parts, then disorder.

    The parts are as many as physical axes are shared and mesh axes lie over several, so with the
    fewest of them the most physical axes are whole.
    """
    large = [one for one in along if one.parts]
    lies = tuple(tuple(physical for physical, _ in one.parts) for one in large)
    return sum(map(len, lies)), lies


def _factors(size: int, count: int) -> Iterator[tuple[int, ...]]:
    """Yields all `count` numbers in order whose product is `size`."""
    if count == 1:
        yield (size,)
        return
    for first in range(1, size + 1):
        if size % first == 0:
            for rest in _factors(size // first, count - 1):
                yield (first, *rest)
