"""What a throughput run reports."""

import dataclasses
import json

import pytest

from jaxserve.benchmark.metrics import Slo
from jaxserve.benchmark.report import Result, table


def test_fields_hold_every_figure(result: Result):
    fields = result.fields()
    assert fields["model"] == "tiny"
    assert fields["trace"]["requests"] == 2
    assert fields["trace"]["seed"] == 3
    assert fields["trace"]["rate"] is None
    assert fields["trace"]["prompt_tokens"] == {"total": 40, "mean": 20, "p50": 20, "p99": 29.8}
    assert fields["trace"]["output_tokens"]["total"] == 8
    assert fields["duration_s"] == 4.0
    assert fields["requests_per_s"] == 0.5
    assert fields["output_tokens_per_s"] == 2.0
    assert fields["total_tokens_per_s"] == 12.0
    assert fields["ttft_s"] == {"mean": 1.75, "p50": 1.75, "p99": 2.485}
    assert fields["tpot_s"] == {"mean": 0.4375, "p50": 0.4375, "p99": 0.49875}
    assert fields["e2e_s"]["p50"] == 3.0
    assert fields["itl_s"]["mean"] == pytest.approx(2.5 / 6, rel=1e-5)
    assert fields["goodput"] == {
        "slo_ttft_s": 2.0,
        "slo_tpot_s": 0.8,
        "requests_per_s": 0.25,
        "fraction": 0.5,
    }
    assert fields["kv_waste"] == {"paged": 0.15625, "contiguous": 0.58}
    assert fields["step"]["host_gap_p99_s"] == 0.0001
    assert fields["step"]["wait_s"] == 3.5
    assert fields["compiles_after_ready"] == 0
    assert fields["compiled"] == {"steps": 0, "programs": 2, "seconds": 0.5}
    assert fields["preemptions"] == 1
    assert fields["prefix_hit_rate"] == 0.1
    assert fields["failed_requests"] == 0


def test_fields_are_plain_data(result: Result):
    fields = result.fields()
    assert json.loads(json.dumps(fields)) == fields


def test_a_run_without_an_answer_still_reports(result: Result):
    for record in result.records:
        record.times_s.clear()
        record.counts.clear()
        record.error = "no memory"
    empty = dataclasses.replace(result, samples=[])
    fields = empty.fields()
    assert fields["failed_requests"] == 2
    assert fields["ttft_s"] is None
    assert fields["kv_waste"] is None
    assert fields["output_tokens_per_s"] == 0.0
    assert empty.failures == ["no memory", "no memory"]
    assert "2 requests" in table(fields)


def test_the_table_names_figures_and_limits(result: Result):
    lines = table(result.fields()).splitlines()
    shown = {line[:16].strip(): line[16:].strip() for line in lines if line}
    assert shown["requests"] == "2, all at once, seed 3"
    assert shown["output tokens/s"] == "2.0"
    assert shown["goodput"] == "0.25 requests/s, 50% within TTFT <= 2 s, TPOT <= 0.8 s"
    assert shown["TTFT"] == "1750.00 ms p50, 2485.00 ms p99, 1750.00 ms mean"
    assert shown["KV waste"] == "15.6% (contiguous reservation: 58.0%)"
    assert shown["host gap"] == "0 us p50, 100 us p99"
    assert shown["compiles"] == "0 after ready; XLA compiled 2 programs in 500.00 ms"
    assert "failed" not in shown


def test_without_limits_the_table_says_so(result: Result):
    text = table(dataclasses.replace(result, slo=Slo()).fields())
    assert "0.50 requests/s, no limits set" in text
