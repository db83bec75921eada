"""Meshes: which device where, and which part of a parameter there.

    mesh = make_mesh(MeshPlan.of("2,2,2"))            # axes x, y and z
    place = places(mesh, PhaseLayout(Ffn.WS2D, Heads.HEADS))
    place(("embed", "ffn"), (48, 64)).spec            # PartitionSpec("x", ("z", "y"))

Neighbours on a TPU's torus are neighbours on the mesh; elsewhere the devices of a host lie along
the last axes, so that the network carries the traffic of the first alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.errors import UsageError
from jaxserve.partitioning.layout import PhaseLayout
from jaxserve.partitioning.memory_order import turned
from jaxserve.partitioning.placement import AXES
from jaxserve.partitioning.plan import MeshPlan
from jaxserve.partitioning.torus import Along, Torus, arranged, fold

Sharding = Callable[[tuple[str, ...], tuple[int, ...]], NamedSharding | Format]
"""From the logical axes and shape of an array to its place and, on a TPU, its order in memory."""

__all__ = [
    "MeshPlan",
    "Sharding",
    "along_of",
    "arrange",
    "make_mesh",
    "network_axes_of",
    "places",
    "torus_of",
]


def make_mesh(plan: MeshPlan, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a mesh of the first devices, of `devices` or of all there are.

    Raises:
        UsageError: there are too few.
    """
    found = list(jax.devices() if devices is None else devices)
    if plan.num_devices > len(found):
        raise UsageError(
            f"mesh {plan.x},{plan.y},{plan.z} needs {plan.num_devices} devices, found "
            f"{len(found)}; use a mesh whose sizes multiply to {len(found)} or less, or fake "
            f"devices with devices='cpu:{plan.num_devices}'"
        )
    return Mesh(arrange(plan, found), AXES)


def arrange(plan: MeshPlan, devices: Sequence[Any]) -> np.ndarray:
    """Returns the first devices as an array [X, Y, Z]: neighbours on a torus side by side."""
    chosen = _in_order(devices)[: plan.num_devices]
    torus, chips = torus_of(chosen)
    along = None if torus is None else fold(torus, dict(plan.sizes))
    if torus is None or along is None:
        return _array(chosen).reshape([size for _, size in plan.sizes])
    return arranged(torus, along, chips)


def along_of(mesh: Mesh) -> tuple[Along, ...] | None:
    """Returns how the axes of a mesh from `make_mesh` lie on a torus; None where there is none."""
    torus, _ = torus_of(list(mesh.devices.flat))
    return None if torus is None else fold(torus, dict(mesh.shape))


def network_axes_of(devices: np.ndarray) -> tuple[str, ...]:
    """Returns the axes of devices[X, Y, Z] along which they belong to different hosts."""
    hosts = np.vectorize(lambda device: device.process_index)(devices)
    return tuple(
        axis
        for dim, axis in enumerate(AXES)
        if bool(np.any(hosts != np.take(hosts, [0], axis=dim)))
    )


def torus_of(devices: Sequence[Any]) -> tuple[Torus | None, np.ndarray]:
    """Returns (the torus that the devices fill, the devices by coordinates); else (None, ...).

    The devices of one chip lie along a last axis, which is no ring.
    """
    plain = _array(devices)
    if any(getattr(device, "coords", None) is None for device in devices):
        return None, plain
    at = np.array([[*device.coords, getattr(device, "core_on_chip", 0)] for device in devices])
    at -= at.min(axis=0)
    shape = tuple((at.max(axis=0) + 1).tolist())
    if math.prod(shape) != len(devices) or len({tuple(row) for row in at.tolist()}) != len(devices):
        return None, plain
    chips = np.empty(shape, dtype=object)
    for row, device in zip(at.tolist(), devices, strict=True):
        chips[tuple(row)] = device
    whole = Torus.of(devices[0].device_kind, shape[:-1])
    lies = zip(shape, (*whole.wraps, False), strict=True)
    kept = [(size, wraps) for size, wraps in lies if size > 1]
    torus = Torus(tuple(size for size, _ in kept), tuple(wraps for _, wraps in kept))
    return torus, chips.reshape(torus.shape)


def places(mesh: Mesh, phase: PhaseLayout) -> Sharding:
    """Returns a function (logical axes, shape) -> place of a stored parameter.

    It raises a UsageError for a size that does not divide.
    """
    sizes = dict(mesh.shape)
    platform = mesh.devices.flat[0].platform

    def place(axes: tuple[str, ...], shape: tuple[int, ...]) -> NamedSharding | Format:
        cuts = phase.cuts(axes, shape, sizes)
        for axis, size, cut in zip(axes, shape, cuts, strict=True):
            count = math.prod(sizes[name] for name in cut)
            if size % count:
                raise UsageError(
                    f"{axis}={size} does not divide over {'*'.join(cut)}={count}; use a mesh that "
                    "it divides over, or declare the model with a Padding"
                )
        lies = NamedSharding(mesh, PartitionSpec(*(cut or None for cut in cuts)))
        order = turned(platform, axes)
        return lies if order is None else Format(Layout(order), lies)

    return place


def _in_order(devices: Sequence[Any]) -> list[Any]:
    """Returns devices host by host."""

    def key(device: Any) -> tuple[int, ...]:
        slice_index = getattr(device, "slice_index", None) or 0
        coords = getattr(device, "coords", None) or ()
        if coords:
            return (slice_index, *coords, getattr(device, "core_on_chip", 0))
        return (slice_index, device.process_index, device.id)

    return sorted(devices, key=key)


def _array(devices: Sequence[Any]) -> np.ndarray:
    found = np.empty(len(devices), dtype=object)
    found[:] = list(devices)
    return found
