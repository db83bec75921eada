"""What is measured here is a chip that plans can be made for."""

import math
from pathlib import Path

import pytest

from jaxserve import planner
from jaxserve.errors import UsageError
from jaxserve.partitioning.estimate import Coster
from jaxserve.partitioning.hardware import chips, slice_of
from jaxserve.partitioning.layout import Ffn, Heads, PhaseLayout
from jaxserve.planner.calibrate import Calibration, calibrated
from jaxserve.planner.model import plan_config

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


def test_a_gather_is_estimated_as_it_was_measured(tmp_path: Path):
    path = tmp_path / "mine.toml"
    MADE.write(path)
    on = slice_of("mine:4", chips(path))
    config = plan_config("tiny")
    sizes = {"x": 1, "y": 1, "z": 4}
    made = Coster.of(config, PhaseLayout(Ffn.WS1D, Heads.HEADS), on, sizes)
    found = made.estimate(4096, 1, 16)
    (gather,) = (t for t in found.terms if t.name == "all-gather" and t.count > 1)
    each = float(gather.amount) / gather.count
    # Between the points of the curve rates grow with the size's logarithm.
    rates = [0.75 * size / took for size, took in MADE.gathered]
    (low, _), (high, _) = MADE.gathered
    at = math.log(each / low) / math.log(high / low)
    expected = gather.count * 0.75 * each / (rates[0] + at * (rates[1] - rates[0]))
    assert 0 < at < 1
    assert float(gather.seconds) == pytest.approx(expected, rel=1e-3)
    assert gather.origin == "measured"
    # What is next to nothing takes its way.
    for term in made.estimate(1, 1, 16).terms:
        assert float(term.seconds) >= term.hops_s


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
