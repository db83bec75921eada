"""Which mesh axes each logical axis of an array lies over.

    mesh = make_mesh(x=2, y=2, z=2)
    place = WEIGHTS.on(mesh)                       # (logical axes, shape) -> NamedSharding
    place(("ffn", "embed"), (512, 256)).spec       # PartitionSpec(("y", "z"), "x")

Rules name logical axes alone, so one set serves every model and storage: a weight with inputs
first and one with outputs first are cut alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.errors import ConfigError, UsageError

MESH_AXES = ("x", "y", "z")


@dataclass(frozen=True)
class Rules:
    """Logical axis -> mesh axes.

    Attributes:
        over: mesh axes of each logical axis, the slowest first; () is replicated.
        whole: logical axes that are replicated, instead of refused, where they do not divide.
            Key and value heads are: they may be fewer than the devices, and are never split.
    """

    over: Mapping[str, tuple[str, ...]]
    whole: frozenset[str] = frozenset()

    def spec(self, axes: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
        """Returns how an array with these logical axes lies on the mesh.

        Raises:
            ConfigError: an axis has no rule, or two axes of the array share a mesh axis.
            UsageError: an axis does not divide over its mesh axes.
        """
        parts = [self._part(axis, size, mesh) for axis, size in zip(axes, shape, strict=True)]
        used = [name for part in parts for name in part]
        if len(set(used)) != len(used):
            shared = next(name for name in used if used.count(name) > 1)
            raise ConfigError(
                f"two axes of an array [{', '.join(axes)}] lie over mesh axis {shared!r}; "
                "rules must give them different ones"
            )
        return PartitionSpec(*(_entry(part) for part in parts))

    def on(self, mesh: Mesh) -> Callable[[tuple[str, ...], tuple[int, ...]], NamedSharding]:
        """Returns a function (logical axes, shape) -> sharding on this mesh."""
        return lambda axes, shape: NamedSharding(mesh, self.spec(axes, shape, mesh))

    def _part(self, axis: str, size: int, mesh: Mesh) -> tuple[str, ...]:
        if axis not in self.over:
            raise ConfigError(
                f"logical axis {axis!r} has no rule; rules exist for {', '.join(self.over)}"
            )
        part = tuple(name for name in self.over[axis] if mesh.shape[name] > 1)
        count = math.prod(mesh.shape[name] for name in part)
        if size % count == 0:
            return part
        if axis in self.whole:
            return ()
        lies = "*".join(part)
        divisors = [str(n) for n in range(1, min(size, 1024) + 1) if size % n == 0]
        raise UsageError(
            f"{axis}={size} does not divide over {lies}={count}; "
            f"use a mesh with {lies} in {{{', '.join(divisors)}}}"
        )


def _entry(part: tuple[str, ...]) -> str | tuple[str, ...] | None:
    return None if not part else part[0] if len(part) == 1 else part


WEIGHTS = Rules(
    over={
        "embed": ("x",),
        "ffn": ("y", "z"),
        "heads": ("y", "z"),
        "kv_heads": ("y", "z"),
        "head": (),
        "vocab": ("y", "z"),
        # Members of different sizes end to end: cutting it evenly would cut through them.
        "fused": (),
    },
    whole=frozenset({"kv_heads"}),
)
"""Weights as they are stored: width over x, everything else over y and z.

Source: Pope et al. 2022, section 3.2.2 (2D weight-stationary); both layouts of its gathered kind
start from the same storage.
"""


def make_mesh(x: int = 1, y: int = 1, z: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a mesh of x * y * z devices, the first ones of `devices` or of all there are.

    Raises:
        UsageError: a size is not positive, or there are too few devices.
    """
    if min(x, y, z) < 1:
        raise UsageError(f"mesh {x},{y},{z} must have positive sizes")
    found = jax.devices() if devices is None else devices
    needed = x * y * z
    if needed > len(found):
        raise UsageError(
            f"mesh {x},{y},{z} needs {needed} devices, found {len(found)}; use a smaller mesh, or "
            "fake devices on CPU: XLA_FLAGS=--xla_force_host_platform_device_count="
            f"{needed}"
        )
    return Mesh(np.asarray(found[:needed]).reshape(x, y, z), MESH_AXES)
