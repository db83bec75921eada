"""A trace through the real engine, on a runner without a model."""

from typing import Any

import msgspec
import pytest

from jaxserve.benchmark.metrics import KvWaste
from jaxserve.benchmark.report import Compiles
from jaxserve.benchmark.run import engine_facts, kv_sample, observe
from jaxserve.benchmark.trace import TraceRequest, TraceSpec, make_trace
from jaxserve.serving.engine import Engine
from jaxserve.serving.fake_runner import FakeRule, FakeRunner
from jaxserve.serving.request import SamplingParams
from jaxserve.serving.scheduler import GroupLimits, SchedulerConfig

CONTEXT = 64
PAGE = 4
RULE = FakeRule(vocab_size=997)


def engine(num_pages: int = 200, **fields: Any) -> Engine:
    config = SchedulerConfig(
        page_size=PAGE,
        groups=(GroupLimits(num_pages=num_pages),),
        num_slots=8,
        max_step_tokens=32,
        max_context_tokens=CONTEXT,
        **fields,
    )
    return Engine(FakeRunner(config, RULE.vocab_size), config)


@pytest.fixture(scope="module")
def trace() -> list[TraceRequest]:
    return make_trace(TraceSpec(requests=30, seed=1, vocab_size=97, context=CONTEXT, scale=0.1))


def test_every_request_gets_its_tokens(trace: list[TraceRequest]):
    records, _ = observe(engine(), trace, CONTEXT)
    assert [record.output_tokens for record in records] == [r.output_tokens for r in trace]
    assert all(record.error is None for record in records)
    assert all(min([record.ttft_s, *record.itl_s]) >= 0 for record in records)


def test_the_tokens_are_those_of_the_model(trace: list[TraceRequest]):
    records, _ = observe(engine(), trace, CONTEXT)
    greedy = SamplingParams(temperature=0).resolved({})
    for record, request in zip(records, trace, strict=True):
        expected = RULE.continue_prompt(request.prompt, greedy, request.output_tokens)
        assert record.token_ids == expected


def test_the_cache_is_watched_after_every_step(trace: list[TraceRequest]):
    served = engine()
    records, samples = observe(served, trace, CONTEXT, sample_every=1)
    assert len(samples) >= served.metrics.steps
    assert max(sample.running for sample in samples) == 8
    for sample in samples:
        # Every page but the last of a sequence is full, and two steps may be under way.
        assert 0 <= sample.allocated - sample.used <= sample.running * (PAGE + 1)
        assert sample.reserved == sample.running * CONTEXT
    assert samples[-1].running == 0
    waste = KvWaste.of(samples)
    assert waste is not None
    assert 0 < waste.paged < waste.contiguous < 1
    assert len(records) == 30


def test_some_turns_stand_for_all(trace: list[TraceRequest]):
    _, all_turns = observe(engine(), trace, CONTEXT, sample_every=1)
    _, some_turns = observe(engine(), trace, CONTEXT, sample_every=3)
    assert len(some_turns) == len(all_turns) // 3
    every, some = KvWaste.of(all_turns), KvWaste.of(some_turns)
    assert every is not None and some is not None
    assert some.paged == pytest.approx(every.paged, abs=0.05)


def test_a_sample_adds_up_all_groups():
    stats = engine().metrics.scheduler
    two = msgspec.structs.replace(
        stats, running=2, loading=1, pages_held=(5, 3), held_tokens=32, unused_tokens=7
    )
    sample = kv_sample(1.5, two, CONTEXT)
    assert (sample.time_s, sample.running) == (1.5, 3)
    assert (sample.allocated, sample.used, sample.reserved) == (32, 25, 3 * CONTEXT * 2)


def test_facts_are_those_of_the_engine(trace: list[TraceRequest]):
    served = engine(num_pages=20)  # too few for eight sequences
    observe(served, trace, CONTEXT)
    metrics = served.metrics
    facts = engine_facts(metrics, {"model": "fake"}, Compiles(3, 4, 0.5))
    assert facts.times.steps == metrics.steps > 0
    assert facts.times.host_gap_p99_s == metrics.host_gap_seconds.p99
    assert facts.times.wait_s == metrics.phase_seconds["wait"]
    assert facts.compiles.steps == 3
    assert facts.preemptions > 0
    assert facts.prefix_hits < facts.prefix_queries


def test_distinct_prompts_hit_no_prefix(trace: list[TraceRequest]):
    served = engine()
    records, _ = observe(served, trace, CONTEXT)
    facts = engine_facts(served.metrics, {}, Compiles(0, 0, 0.0))
    assert facts.prefix_queries == sum(len(request.prompt) for request in trace)
    assert facts.prefix_hits == 0
    assert {record.cached_tokens for record in records} == {0}
