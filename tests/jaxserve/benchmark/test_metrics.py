"""Figures of serving, against values found by hand."""

from dataclasses import astuple
from typing import Any

import pytest

from jaxserve.benchmark.metrics import (
    KvSample,
    KvWaste,
    Latencies,
    Record,
    Slo,
    Spread,
    Throughput,
)


def record(due_s: float, *arrivals: tuple[float, int], prompt: int = 10) -> Record:
    made = Record(due_s=due_s, prompt_tokens=prompt)
    for time_s, count in arrivals:
        made.add(time_s, count)
    return made


# Due at 1: tokens at 3, 3.5, 4.5. Due at 2: two tokens at 4, three at 7. Due at 2: one token at 5.
STEADY = record(1.0, (3.0, 1), (3.5, 1), (4.5, 1))
GROUPED = record(2.0, (4.0, 2), (7.0, 3), prompt=20)
SINGLE = record(2.0, (5.0, 1), prompt=30)
ALL = (STEADY, GROUPED, SINGLE)


def values(result: Any) -> tuple[float, ...]:
    """Returns the fields of a result, to compare with `pytest.approx`."""
    assert result is not None
    return astuple(result)


def failed() -> Record:
    made = record(2.0, (3.0, 1), prompt=40)
    made.error = "out of memory"
    return made


def test_times_of_one_request():
    assert STEADY.output_tokens == 3
    assert STEADY.ttft_s == 2.0
    assert STEADY.e2e_s == 3.5
    assert STEADY.tpot_s == 0.75  # (3.5 - 2) / 2
    assert STEADY.itl_s == [0.5, 1.0]


def test_tokens_that_arrive_together_are_one_arrival():
    assert GROUPED.output_tokens == 5
    assert GROUPED.tpot_s == 0.75  # (5 - 2) / 4
    assert GROUPED.itl_s == [3.0]


def test_a_single_token_has_no_time_per_further_token():
    assert SINGLE.tpot_s is None
    assert SINGLE.itl_s == []


def test_percentiles_are_interpolated():
    spread = Spread.of([4.0, 1.0, 2.0, 3.0])
    # ranks 1.5 and 2.97 of 0..3
    assert values(spread) == pytest.approx((2.5, 2.5, 3.97))


def test_nothing_has_no_spread():
    assert Spread.of([]) is None


def test_latencies_leave_out_what_a_request_does_not_have():
    found = Latencies.of([*ALL, record(9.0)])
    assert values(found.ttft) == pytest.approx((7 / 3, 2.0, 2.98))
    assert found.tpot == Spread(mean=0.75, p50=0.75, p99=0.75)
    assert values(found.itl) == pytest.approx((1.5, 1.0, 2.96))
    assert values(found.e2e) == pytest.approx((11.5 / 3, 3.5, 4.97))


def test_latencies_of_no_answer_are_none():
    assert Latencies.of([record(0.0)]) == Latencies(None, None, None, None)


def test_rates_run_from_the_first_due_to_the_last_token():
    found = Throughput.of(ALL, Slo())
    assert found.duration_s == 6.0  # 1 to 7
    assert found.requests_per_s == 0.5
    assert found.output_tokens_per_s == 1.5  # 9 tokens
    assert found.total_tokens_per_s == 11.5  # and 60 of prompts


def test_goodput_counts_requests_within_both_limits():
    # TTFT 2, 2, 3; TPOT 0.75, 0.75, none
    assert Throughput.of(ALL, Slo()).good_fraction == 1.0
    assert Throughput.of(ALL, Slo(ttft_s=2.0)).good_fraction == pytest.approx(2 / 3)
    assert Throughput.of(ALL, Slo(ttft_s=2.0)).good_requests_per_s == pytest.approx(2 / 6)
    assert Throughput.of(ALL, Slo(tpot_s=0.7)).good_fraction == pytest.approx(1 / 3)
    assert Throughput.of(ALL, Slo(ttft_s=2.5, tpot_s=0.7)).good_fraction == 0.0


def test_a_failed_request_is_neither_done_nor_good():
    found = Throughput.of([*ALL, failed()], Slo())
    assert found.requests_per_s == 0.5
    assert found.good_fraction == 0.75
    assert found.output_tokens_per_s == pytest.approx(10 / 6)


def test_a_request_without_a_token_is_not_done():
    found = Throughput.of([STEADY, record(1.0)], Slo())
    assert found.requests_per_s == pytest.approx(1 / 3.5)
    assert found.good_fraction == 0.5


def test_nothing_served_has_no_rate():
    assert Throughput.of([], Slo()) == Throughput(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


def test_waste_is_the_mean_over_steps():
    samples = [
        KvSample(time_s=0.0, running=0, allocated=0, used=0, reserved=0),
        KvSample(time_s=1.0, running=1, allocated=32, used=24, reserved=100),
        KvSample(time_s=2.0, running=2, allocated=64, used=60, reserved=200),
    ]
    # (8/32 + 4/64) / 2 and (76/100 + 140/200) / 2; the empty step holds nothing to waste
    assert values(KvWaste.of(samples)) == pytest.approx((0.15625, 0.73))


def test_nothing_held_wastes_nothing():
    assert KvWaste.of([KvSample(0.0, 0, 0, 0, 0)]) is None
