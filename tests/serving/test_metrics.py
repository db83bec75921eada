"""What the engine counts, by hand."""

from types import SimpleNamespace

import pytest

from jaxserve.serving.metrics import RECENT, Distribution, Rate, StepTimes, Timeline


def test_percentiles_are_values_that_so_many_do_not_exceed() -> None:
    numbers = Distribution()
    for value in range(200, 0, -1):
        numbers.add(value)
    summary = numbers.summary()
    assert (summary.p50, summary.p99) == (100, 198)
    assert (summary.count, summary.total, summary.mean) == (200, 20100, 100.5)


def test_an_empty_distribution_is_zero() -> None:
    summary = Distribution().summary()
    assert (summary.total, summary.count, summary.p50, summary.p99, summary.mean) == (0, 0, 0, 0, 0)


def test_percentiles_are_of_the_newest_values_and_the_sum_of_all() -> None:
    numbers = Distribution()
    for value in [1000.0] * 10 + [1.0] * RECENT:
        numbers.add(value)
    summary = numbers.summary()
    assert summary.p99 == 1
    assert (summary.count, summary.total) == (RECENT + 10, 10_000 + RECENT)


def test_a_gap_is_the_time_that_the_device_waited() -> None:
    times = StepTimes()
    times.done(dispatched_s=1.0, ready_s=2.0)
    times.done(dispatched_s=1.5, ready_s=3.0)  # before the first was ready
    times.done(dispatched_s=3.25, ready_s=4.0)
    gaps, device = times.host_gap.summary(), times.device.summary()
    assert (gaps.count, gaps.total, gaps.p50, gaps.p99) == (2, 0.25, 0.0, 0.25)
    assert device.total == pytest.approx(1.0 + 1.0 + 0.75)


def test_a_step_after_idleness_has_no_gap() -> None:
    times = StepTimes()
    times.done(dispatched_s=1.0, ready_s=2.0)
    times.idle()
    times.done(dispatched_s=9.0, ready_s=9.5)
    assert times.host_gap.summary().count == 0
    assert times.device.summary().total == pytest.approx(1.5)


def test_the_loop_is_timed_by_phase_and_by_step() -> None:
    times = StepTimes()
    for phase, seconds in [("schedule", 1.0), ("dispatch", 2.0), ("wait", 8.0), ("commit", 4.0)]:
        times.spent(phase, seconds)
    times.done(dispatched_s=3.0, ready_s=11.0)
    times.spent("deliver", 0.5)
    times.done(dispatched_s=11.0, ready_s=12.0)
    assert times.phases == {
        "schedule": 1.0,
        "dispatch": 2.0,
        "wait": 8.0,
        "commit": 4.0,
        "deliver": 0.5,
    }
    assert times.host.summary().total == 7.5
    assert times.host.summary().p99 == 7.0


def test_a_snapshot_does_not_change_later() -> None:
    times = StepTimes()
    before = times.snapshot(SimpleNamespace(waiting=0), 0.0)
    times.spent("wait", 1.0)
    times.finished["stop"] += 1
    assert before.phase_seconds["wait"] == 0
    assert before.finished == {}


def test_a_rate_is_of_the_last_seconds_and_asking_changes_nothing() -> None:
    rate = Rate(window_s=10.0)
    for second in range(20):
        rate.add(3, float(second))
    assert rate.per_s(40.0) == 0.0
    assert rate.per_s(19.0) == 3.3  # both ends of the window count
    assert rate.since(18.0) == 6


def expected_wait_s(waiting: int, now_s: float, since_s: float | None, *started_s: float) -> float:
    """Returns the wait that is told when requests got their slots at these times."""
    times = StepTimes()
    for start_s in started_s:
        times.of_requests.started(Timeline(), start_s)
    return times.snapshot(SimpleNamespace(waiting=waiting), now_s, since_s).expected_wait_s


def test_the_wait_follows_from_the_starts_while_others_wait() -> None:
    assert expected_wait_s(0, 50.0, None) == 0.0
    assert expected_wait_s(30, 50.0, 50.0) == 0.0  # they came just now, nothing was before
    assert expected_wait_s(6, 54.0, 50.0, 1.0, 51.0, 53.0) == pytest.approx(12.0)
    assert expected_wait_s(6, 54.0, 50.0, 1.0, 2.0) == pytest.approx(24.0)
    assert expected_wait_s(6, 90.0, 50.0) == pytest.approx(60.0)  # ten seconds each, or more
