"""Meshes: sizes, devices in their places, and where parameters lie."""

from dataclasses import dataclass

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxserve.errors import UnsupportedError, UsageError
from jaxserve.partitioning.layout import Ffn, Heads, PhaseLayout
from jaxserve.partitioning.memory_order import turned
from jaxserve.partitioning.mesh import (
    MeshPlan,
    along_of,
    arrange,
    make_mesh,
    network_axes_of,
    places,
    torus_of,
)

WS2D = PhaseLayout(Ffn.WS2D, Heads.HEADS)
WS1D = PhaseLayout(Ffn.WS1D, Heads.HEADS)


@dataclass(frozen=True)
class Chip:
    """What JAX tells of a device."""

    id: int
    process_index: int = 0
    coords: tuple[int, ...] | None = None
    device_kind: str = "TPU v4"
    core_on_chip: int = 0
    slice_index: int = 0


def grid(*shape: int, kind: str = "TPU v4") -> list[Chip]:
    """Returns the chips of a slice, in an order of no meaning."""
    at = list(np.ndindex(*shape))
    chips = [Chip(i, i // 4, tuple(int(c) for c in place), kind) for i, place in enumerate(at)]
    return [chips[i] for i in np.random.default_rng(0).permutation(len(chips))]


@pytest.mark.parametrize("mesh", ["2,2,4", (2, 2, 4), [2, 2, 4], MeshPlan(2, 2, 4)])
def test_a_mesh_is_three_sizes(mesh) -> None:
    plan = MeshPlan.of(mesh)
    assert plan == MeshPlan(2, 2, 4)
    assert plan.num_devices == 16
    assert plan.sizes == (("x", 2), ("y", 2), ("z", 4))


@pytest.mark.parametrize("mesh", ["2,2", "a,b,c", (1, 2, 3, 4), "", (1, 2, None)])
def test_anything_else_is_refused(mesh) -> None:
    with pytest.raises(UsageError, match="give X,Y,Z, as in 2,2,2"):
        MeshPlan.of(mesh)


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1, -1, 1)])
def test_sizes_are_positive(sizes) -> None:
    with pytest.raises(UsageError, match="positive"):
        MeshPlan(*sizes)


@pytest.mark.parametrize("axis", ["data", "expert", "pipeline"])
def test_reserved_axes_are_refused_by_name(axis: str) -> None:
    with pytest.raises(UnsupportedError, match=f"{axis}=2"):
        MeshPlan(2, 2, 2, **{axis: 2})


def test_too_few_devices_are_counted() -> None:
    with pytest.raises(UsageError, match=r"needs 16 devices, found 8.*devices='cpu:16'"):
        make_mesh(MeshPlan(4, 2, 2))
    with pytest.raises(UsageError, match="needs 2 devices, found 1"):
        make_mesh(MeshPlan(2), jax.devices()[:1])


def test_a_mesh_takes_the_first_devices() -> None:
    mesh = make_mesh(MeshPlan(1, 2, 2))
    assert mesh.axis_names == ("x", "y", "z")
    assert list(mesh.devices.flat) == jax.devices()[:4]
    assert along_of(mesh) is None
    assert network_axes_of(mesh.devices) == ()


def test_chips_lie_as_on_their_torus() -> None:
    array = arrange(MeshPlan(4, 4, 4), grid(4, 4, 4))
    assert {at: chip.coords for at, chip in np.ndenumerate(array)} == {
        at: at for at in np.ndindex(4, 4, 4)
    }


def test_a_plane_takes_two_axes_on_one_side() -> None:
    array = arrange(MeshPlan(2, 4, 8), grid(8, 8, 1, kind="TPU v5 lite"))
    assert array[1, 2, 5].coords == (6, 5, 0)


def test_a_plane_of_a_cube_of_chips_has_no_rings() -> None:
    cube, _ = torus_of(grid(4, 4, 4))
    plane, _ = torus_of(grid(4, 4, 1))
    assert cube is not None
    assert plane is not None
    assert (cube.shape, cube.wraps) == ((4, 4, 4), (True, True, True))
    assert (plane.shape, plane.wraps) == ((4, 4), (False, False))


def test_two_devices_of_a_chip_are_neighbours() -> None:
    chips = [
        Chip(2 * i + core, 0, tuple(int(c) for c in at), "TPU7x", core)
        for i, at in enumerate(np.ndindex(2, 2, 1))
        for core in range(2)
    ]
    array = arrange(MeshPlan(2, 2, 2), chips)
    for pair in array.reshape(4, 2):
        assert pair[0].coords == pair[1].coords


def test_hosts_lie_along_the_first_axes() -> None:
    hosts = [Chip(i, process_index=i % 2, device_kind="NVIDIA H100") for i in range(8)]
    array = arrange(MeshPlan(2, 2, 2), hosts)
    assert [chip.process_index for chip in array.flat] == [0] * 4 + [1] * 4
    assert network_axes_of(array) == ("x",)
    assert network_axes_of(arrange(MeshPlan(1, 2, 4), hosts)) == ("y",)


def test_a_part_of_a_slice_has_no_rings() -> None:
    array = arrange(MeshPlan(2, 2, 2), grid(4, 4, 4))
    assert array.shape == (2, 2, 2)
    assert len({chip.id for chip in array.flat}) == 8


@pytest.mark.parametrize(
    ("axes", "shape", "expected"),
    [
        (("ffn", "embed"), (64, 48), PartitionSpec(("z", "y"), "x")),
        (("embed", "ffn"), (48, 64), PartitionSpec("x", ("z", "y"))),
        (("heads", "head", "embed"), (8, 10, 48), PartitionSpec(("z", "y"), None, "x")),
        (("embed",), (48,), PartitionSpec(None)),
        (("heads", "head"), (8, 10), PartitionSpec(None, None)),
        (("kv_heads", "head", "embed"), (4, 10, 48), PartitionSpec(("z", "y"), None, "x")),
        (("kv_heads", "head", "embed"), (2, 10, 48), PartitionSpec(("z",), None, "x")),
        (("kv_heads", "head", "embed"), (1, 10, 48), PartitionSpec(None, None, "x")),
        (("layers", "ffn", "embed"), (3, 64, 48), PartitionSpec(None, ("z", "y"), "x")),
    ],
)
def test_weights_lie_width_over_x_and_the_rest_over_zy(axes, shape, expected) -> None:
    found = places(make_mesh(MeshPlan(2, 2, 2)), WS2D)(axes, shape)
    assert isinstance(found, jax.NamedSharding)
    assert found.is_equivalent_to(jax.NamedSharding(found.mesh, expected), len(shape))


def test_one_dimensional_layouts_keep_the_width() -> None:
    found = places(make_mesh(MeshPlan(2, 2, 2)), WS1D)(("embed", "ffn"), (48, 64))
    assert isinstance(found, jax.NamedSharding)
    assert found.spec == PartitionSpec(None, ("z", "y", "x"))


def test_first_projections_of_attention_lie_heads_first_on_a_tpu() -> None:
    assert turned("tpu", ("embed", "heads", "head")) == (1, 2, 0)
    assert turned("tpu", ("layers", "embed", "kv_heads", "head")) == (0, 2, 3, 1)
    for axes in (("heads", "head", "embed"), ("embed", "ffn"), ("layers", "embed", "fused")):
        assert turned("tpu", axes) is None
    assert turned("cpu", ("embed", "heads", "head")) is None


def test_each_device_holds_its_part() -> None:
    array = np.arange(64 * 48).reshape(64, 48)
    mesh = make_mesh(MeshPlan(2, 2, 2))
    placed = jax.device_put(array, places(mesh, WS2D)(("ffn", "embed"), array.shape))
    for shard in placed.addressable_shards:
        x, y, z = (int(i) for i in np.argwhere(mesh.devices == shard.device)[0])
        row, column = (2 * z + y) * 16, x * 24
        expected = array[row : row + 16, column : column + 24]
        np.testing.assert_array_equal(np.asarray(shard.data), expected)


def test_what_does_not_divide_is_refused() -> None:
    with pytest.raises(UsageError, match=r"heads=12 does not divide over z\*y=8"):
        places(make_mesh(MeshPlan(1, 2, 4)), WS2D)(("heads", "head", "embed"), (12, 4, 48))
