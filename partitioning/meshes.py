"""The meshes of a slice that are worth pricing, and the layouts that differ on each.

    for mesh in meshes(slice_of("v5e:16x16")): ...
    layouts(dict(mesh.sizes), space)

Two meshes that only name the same chips differently, and two layouts that put everything in the
same place, cost the same; one of each is kept. So are meshes of two axes and more where one axis
would be a whole torus: TPU compilers make all-reduces of its scatters. No JAX.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from jaxserve.errors import UsageError
from jaxserve.partitioning.demand import Space
from jaxserve.partitioning.hardware import ChipSlice
from jaxserve.partitioning.layout import Ffn, Heads, PhaseLayout
from jaxserve.partitioning.network import Network

_FEW = 16
"""Chips from which on a scatter over all of them is not kept."""


@dataclass(frozen=True)
class Laid:
    """A mesh on a slice.

    Attributes:
        network: how it lies.
        best: no mesh with as many devices along x has fewer parts of sides; layouts that use y and
            z together ask for no other.
    """

    network: Network
    best: bool

    @property
    def sizes(self) -> dict[str, int]:
        """Returns the devices along x, y and z."""
        return dict(self.network.sizes)


def meshes(on: ChipSlice) -> list[Laid]:
    """Returns the meshes that fill a slice, those with the fewest along x first."""
    count = on.num_devices
    found: dict[int, list[Network]] = {}
    for x in _divisors(count):
        for y in _divisors(count // x):
            try:
                network = Network.of(on, {"x": x, "y": y, "z": count // x // y})
            except UsageError:
                continue
            if _sums_twice(network):
                continue
            found.setdefault(x, []).append(network)
    laid = []
    for networks in found.values():
        first = min(networks, key=lambda one: one.shared)
        # Of the others, those that break no more sides than they must.
        least = min((n.shared for n in networks if _split(n)), default=0)
        for network in networks:
            if network is first or (_split(network) and network.shared == least):
                laid.append(Laid(network, network is first))
    return laid


def layouts(laid: Laid, space: Space) -> Iterator[tuple[PhaseLayout, PhaseLayout]]:
    """Yields (prefill, decode) on a mesh, each pair that differs from all others there once."""
    for heads in space.heads:
        if not _differs_heads(heads, laid.sizes):
            continue
        for decode in space.decode:
            if not _differs(decode, heads, laid):
                continue
            for prefill in space.prefill:
                if (prefill is Ffn.WS1D) == (decode is Ffn.WS1D) and (
                    prefill is decode or _differs(prefill, heads, laid)
                ):
                    if not (laid.best or _splits(prefill, heads)):
                        continue
                    if prefill is Ffn.WS2D and _is_ws1d(heads, laid) and Ffn.WS1D in space.prefill:
                        continue
                    yield PhaseLayout(prefill, heads), PhaseLayout(decode, heads)


def _differs(ffn: Ffn, heads: Heads, laid: Laid) -> bool:
    """Returns whether a layout is unlike all simpler ones on this mesh."""
    sizes = laid.sizes
    x, y, z = sizes["x"], sizes["y"], sizes["z"]
    match ffn:
        case Ffn.WS1D:
            # All axes go together but for attention.
            mixed = heads in (Heads.HEADS_BATCH, Heads.HEADS_BATCH_XY, Heads.SEQUENCE)
            return mixed or (x == 1 and laid.best)
        case Ffn.WS2D:
            return x * y * z > 1
        case Ffn.WG_X:
            return x > 1 and y * z > 1
        case Ffn.WG_XY:
            return y > 1 and z > 1
        case Ffn.WG_XYZ:
            return x * y * z > 1


def _is_ws1d(heads: Heads, laid: Laid) -> bool:
    """Returns whether WS2D puts everything where WS1D does."""
    return laid.sizes["x"] == 1 and laid.best and heads in (Heads.HEADS, Heads.BATCH)


def _differs_heads(heads: Heads, sizes: Mapping[str, int]) -> bool:
    x, y, z = sizes["x"], sizes["y"], sizes["z"]
    match heads:
        case Heads.HEADS:
            return True
        case Heads.HEADS_BATCH:
            return x > 1 and y * z > 1
        case Heads.HEADS_BATCH_XY:
            return y > 1 and z > 1
        case Heads.BATCH:
            return x * y * z > 1
        case Heads.SEQUENCE:
            return x > 1


def _splits(ffn: Ffn, heads: Heads) -> bool:
    """Returns whether a layout tells y from z."""
    return ffn is Ffn.WG_XY or heads is Heads.HEADS_BATCH_XY


def _sums_twice(network: Network) -> bool:
    """Returns whether scatters over the one axis of a mesh become all-reduces on TPU.

    They do on 4x4 chips and more, and stay what they are on 2x4 and fewer (libtpu 0.0.52).
    """
    sizes = dict(network.sizes)
    whole = [axis for axis in sizes if sizes[axis] > 1]
    if len(whole) != 1 or network.on.num_devices < _FEW:
        return False
    return len(network.lanes(whole)) > 1 and not any(lane.switch for lane in network.lanes(whole))


def _split(network: Network) -> bool:
    sizes = dict(network.sizes)
    return sizes["y"] > 1 and sizes["z"] > 1


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
