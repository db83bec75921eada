"""Mesh axes on the physical axes of a torus."""

import numpy as np
import pytest

from jaxserve.partitioning.torus import Along, Torus, arranged, fold


def ring(*shape: int) -> Torus:
    return Torus(shape, (True,) * len(shape))


def test_axes_of_the_same_sizes_keep_their_rings() -> None:
    assert fold(ring(4, 4, 4), {"x": 4, "y": 4, "z": 4}) == (
        Along("x", ((0, 4),), ring=True),
        Along("y", ((1, 4),), ring=True),
        Along("z", ((2, 4),), ring=True),
    )


def test_an_axis_goes_where_it_fits_whole() -> None:
    found = fold(ring(4, 8, 16), {"x": 16, "y": 4, "z": 8})
    assert found is not None
    assert [(one.parts, one.ring) for one in found] == [
        (((2, 16),), True),
        (((0, 4),), True),
        (((1, 8),), True),
    ]


def test_a_large_axis_takes_two_whole_ones() -> None:
    found = fold(ring(4, 4, 4), {"x": 4, "y": 16, "z": 1})
    assert found == (
        Along("x", ((0, 4),), ring=True),
        Along("y", ((1, 4), (2, 4)), ring=True),
        Along("z", (), ring=False),
    )


def test_a_split_axis_is_no_ring_and_no_other_suffers() -> None:
    found = fold(ring(16, 16), {"x": 2, "y": 8, "z": 16})
    assert found == (
        Along("x", ((0, 2),), ring=False),
        Along("y", ((0, 8),), ring=False),
        Along("z", ((1, 16),), ring=True),
    )


def test_a_mesh_that_does_not_fill_the_torus_has_no_place() -> None:
    assert fold(ring(4, 4), {"x": 4, "y": 2, "z": 1}) is None
    assert fold(ring(3, 5), {"x": 5, "y": 3, "z": 1}) is not None


@pytest.mark.parametrize(
    ("kind", "shape", "wraps"),
    [
        ("TPU v4", (4, 4, 4), (True, True, True)),
        ("TPU v5", (4, 4, 8), (True, True, True)),
        ("TPU v4", (2, 4, 4), (False, False, False)),
        ("TPU v5 lite", (8, 16), (False, True)),
        ("TPU v6 lite", (8, 8), (False, False)),
    ],
)
def test_what_wraps_depends_on_the_chip(kind, shape, wraps) -> None:
    assert Torus.of(kind, shape).wraps == wraps


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [((4, 4, 4), (2, 8, 4)), ((8, 8), (4, 2, 8)), ((4, 4), (16, 1, 1)), ((2, 3), (3, 1, 2))],
)
def test_neighbours_on_the_mesh_are_neighbours_on_the_torus(shape, sizes) -> None:
    torus = ring(*shape)
    chips = np.arange(np.prod(shape)).reshape(shape)
    along = fold(torus, dict(zip("xyz", sizes, strict=True)))
    assert along is not None
    mesh = arranged(torus, along, chips)
    assert mesh.shape == sizes
    assert sorted(mesh.ravel()) == list(range(chips.size))
    for dim, one in enumerate(along):
        if len(one.parts) != 1:
            continue
        ((physical, size),) = one.parts
        # All chips of a line along the axis differ in this physical axis alone.
        for line in np.moveaxis(mesh, dim, 0).reshape(size, -1).T:
            at = np.array(np.unravel_index(line, shape))
            others = np.delete(at, physical, axis=0)
            assert (others == others[:, :1]).all()
