"""A finished run whose every figure is known."""

from typing import Any

import pytest

from jaxserve.benchmark.metrics import KvSample, Record, Slo
from jaxserve.benchmark.report import Compiles, EngineFacts, Result, StepTimes
from jaxserve.benchmark.trace import TraceSpec

TIMES = StepTimes(
    steps=20,
    host_s=0.5,
    device_s=4.0,
    wait_s=3.5,
    host_p50_s=0.02,
    host_p99_s=0.03,
    device_p50_s=0.2,
    device_p99_s=0.25,
    host_gap_p50_s=0.0,
    host_gap_p99_s=0.0001,
)
SETTINGS: dict[str, Any] = {"model": "tiny", "dtype": "bfloat16", "device": "cpu"}


@pytest.fixture
def result() -> Result:
    """Returns two requests: 3 and 5 tokens over 4 s, within limits of 2 s and 0.8 s."""
    first = Record(due_s=0.0, prompt_tokens=10)
    for time_s in (1.0, 1.5, 2.0):
        first.add(time_s, 1)
    second = Record(due_s=0.0, prompt_tokens=30)
    for time_s in (2.5, 3.0, 3.25, 3.5, 4.0):
        second.add(time_s, 1)
    samples = [KvSample(1.0, 1, 32, 24, 100), KvSample(4.0, 1, 64, 60, 100)]
    return Result(
        spec=TraceSpec(requests=2, seed=3, vocab_size=50, context=100),
        slo=Slo(ttft_s=2.0, tpot_s=0.8),
        records=[first, second],
        samples=samples,
        engine=EngineFacts(
            SETTINGS, TIMES, Compiles(0, 2, 0.5), 1, prefix_queries=40, prefix_hits=4
        ),
    )
