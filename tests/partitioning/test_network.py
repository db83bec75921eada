"""Times of collectives on rings, lines and switches, worked out by hand."""

import pytest

from jaxserve.errors import UsageError
from jaxserve.partitioning.hardware import slice_of
from jaxserve.partitioning.network import Network

BYTES = 90e6


def rates(on: str, sizes: tuple[int, int, int], kind: str, axes: str) -> tuple[float, float]:
    found = Network.of(slice_of(on), dict(zip("xyz", sizes, strict=True)))
    time = found.time(kind, tuple(axes), BYTES)
    return time.bytes_s, time.hops_s


def test_a_ring_receives_from_both_sides():
    # Three quarters of 90 MB at 2 x 45 GB/s; two hops at worst.
    assert rates("v4:4x4x4", (4, 4, 4), "all-gather", "x") == pytest.approx((0.75e-3, 2e-6))


def test_sides_of_the_torus_work_together():
    assert rates("v4:4x4x4", (4, 4, 4), "all-gather", "yz") == pytest.approx(
        (15 / 16 * 0.5e-3, 4e-6)
    )


def test_a_line_has_half_the_bandwidth_and_more_hops():
    assert rates("v5e:4x4", (4, 4, 1), "all-gather", "x") == pytest.approx((1.5e-3, 3e-6))


def test_an_all_reduce_goes_twice():
    once = rates("v4:4x4x4", (4, 4, 4), "reduce-scatter", "x")
    assert rates("v4:4x4x4", (4, 4, 4), "all-reduce", "x") == pytest.approx(
        (2 * once[0], 2 * once[1])
    )


def test_an_exchange_takes_a_quarter_of_a_gather_on_a_ring():
    # A device's own 90 MB, of the ring's 16 x 90 MB.
    gathered = rates("v5e:16x16", (16, 16, 1), "all-gather", "x")[0] * 16 / (15 / 16)
    assert rates("v5e:16x16", (16, 16, 1), "all-to-all", "x")[0] == pytest.approx(gathered / 4)


def test_strangers_between_neighbours_share_their_links():
    # x and y lie on one side of 16: x steps over the two of y.
    whole = Network.of(slice_of("v5e:16x16"), {"x": 8, "y": 2, "z": 16})
    x, y = (whole.lanes((axis,))[0] for axis in "xy")
    assert (x.bandwidth, x.hops, x.ring) == (45e9 / 2, 14, False)
    assert (y.bandwidth, y.hops, y.ring) == (45e9, 1, False)
    together = whole.lanes(("x", "y"))[0]
    assert (together.bandwidth, together.hops, together.ring) == (90e9, 8, True)


def test_hosts_are_gathered_over_the_slower_network_first():
    # 90 MB / 8 over two hosts at 50 GB/s, then 7/8 of 90 MB inside at 450 GB/s.
    found = rates("h100:2x8", (2, 8, 1), "all-gather", "xy")[0]
    assert found == pytest.approx(90e6 / 8 / 2 / 50e9 + 90e6 * 7 / 8 / 450e9)


def test_one_device_waits_for_nobody():
    assert rates("v5e:1x1", (1, 1, 1), "all-reduce", "x") == (0.0, 0.0)


def test_a_mesh_that_does_not_fill_the_slice_is_refused():
    with pytest.raises(UsageError, match="mesh 3,1,1 does not fill v5e:2x2 with its 4 devices"):
        Network.of(slice_of("v5e:2x2"), {"x": 3, "y": 1, "z": 1})
