"""What is measured here is a chip that plans can be made for."""

import math
from pathlib import Path

import pytest

from jaxserve import planner
from jaxserve.errors import UsageError
from jaxserve.partitioning.hardware import chips, slice_of
from jaxserve.planner.calibrate import Calibration, calibrated

MADE = Calibration(
    "mine",
    "cpu",
    4,
    8e9,
    ((1 << 20, 1e9), (1 << 28, 4e9)),
    ((1, 1e9), (512, 1e11)),
    ((1 << 12, 1e-4), (1 << 24, 1.1e-3)),
    "bfloat16",
)


def test_bandwidth_is_what_is_left_without_the_start():
    assert MADE.start_s == 1e-4
    assert MADE.link == pytest.approx(0.75 * (1 << 24) / 1e-3)


def test_a_written_chip_is_read_back(tmp_path: Path):
    path = tmp_path / "mine.toml"
    MADE.write(path)
    on = slice_of("mine:4", chips(path))
    assert on.axes[0].switch and on.axes[0].bandwidth == pytest.approx(MADE.link, rel=1e-3)
    assert on.chip.curves["matmul"] == ((1.0, 1e9), (512.0, 1e11))
    found = planner.estimate("tiny", "mine:4", batch=8, context=128, hardware=path)
    assert {str(t.origin) for t in found.estimate.terms if t.part == "weights"} == {"measured"}
    assert math.isfinite(float(found.estimate.time_s))


def test_this_machine_can_be_measured():
    made = calibrated("here", seconds=1e-3)
    assert made.num_devices == 8
    assert all(rate > 0 for _, rate in (*made.read, *made.matmul))
    # A product of many rows reads its weights once for all.
    assert made.matmul[-1][1] > made.matmul[0][1]


@pytest.mark.parametrize(("name", "seconds"), [("a b", 1.0), ("a", 0.0)])
def test_nonsense_is_refused(name: str, seconds: float):
    with pytest.raises(UsageError, match="must be"):
        calibrated(name, seconds)
