"""Plans survive the way to another rank, are short, and are refused out of order."""

import random
from typing import Any

import msgspec
import pytest

from jaxserve.serving.fake_runner import FakeRunner
from jaxserve.serving.multihost.messages import GroupLostError, Plan
from jaxserve.serving.multihost.plans import PlanReader, PlanWriter, reads_tokens
from jaxserve.serving.pages import GroupLimits
from jaxserve.serving.plan import SchedulerConfig, StepPlan
from jaxserve.serving.request import Request, SamplingParams
from jaxserve.serving.scheduler import Scheduler

KEY = b"k" * 32


def limits(**changes: Any) -> SchedulerConfig:
    fields: dict[str, Any] = {
        "page_size": 8,
        "groups": (GroupLimits(num_pages=40), GroupLimits(num_pages=40, window=12)),
        "num_slots": 6,
        "max_step_tokens": 16,
        "max_context_tokens": 96,
    }
    return SchedulerConfig(**(fields | changes))


def asked(name: str, prompt: tuple[int, ...], **params: Any) -> Request:
    fields = {"temperature": 0.0, "max_tokens": 12, "seed": 3} | params
    return Request(id=name, prompt=prompt, params=SamplingParams(**fields).resolved({}))


def steps(config: SchedulerConfig, requests: list[Request]) -> list[tuple[StepPlan, list[int]]]:
    """Returns the plans of requests that come one after the other, with the tokens of each."""
    scheduler, runner = Scheduler(config), FakeRunner(config)
    waiting, done = list(requests), []
    while True:
        if waiting:
            scheduler.add(waiting.pop(0))
        plan = scheduler.schedule()
        if plan is None:
            return done
        done.append((msgspec.convert(msgspec.to_builtins(plan), StepPlan), []))
        result = runner.collect(runner.dispatch(plan))
        done[-1] = (done[-1][0], result.tokens)
        scheduler.commit(plan.number, result.tokens, result.counts)


def some_requests(count: int, seed: int = 0) -> list[Request]:
    rng = random.Random(seed)
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 0.7, "top_p": 0.9, "seed": 11, "n": 2},
        {"repetition_penalty": 1.1, "stop_token_ids": (5, 7)},
        {"prompt_logprobs": 2, "logprobs": 1},
        {"logit_bias": {4: -1.5, 9: 3.0}, "min_tokens": 2},
        {"allowed_token_ids": (1, 2, 3), "stop": ("end",)},
    ]
    return [
        asked(
            f"request-{index}",
            tuple(rng.randrange(90) for _ in range(rng.randrange(1, 40))),
            **kinds[index % len(kinds)],
        )
        for index in range(count)
    ]


def test_plans_give_another_runner_the_same_tokens() -> None:
    config = limits()
    writer, reader, runner = PlanWriter(KEY), PlanReader(KEY), FakeRunner(config)
    planned = steps(config, some_requests(24))
    assert len(planned) > 40
    for plan, tokens in planned:
        read = reader.read(writer.plan(plan))
        assert read is not None
        for name in ("number", "slots", "counts", "starts", "kinds", "tokens", "writes", "copies"):
            assert list_of(getattr(read, name)) == list_of(getattr(plan, name)), name
        assert runner.collect(runner.dispatch(read)).tokens == tokens


def list_of(value: Any) -> Any:
    return msgspec.to_builtins(value)


def test_what_a_runner_reads_of_a_request_arrives() -> None:
    from jaxserve.serving.slot_state import Needs, needs, param_row, vocabulary_rows

    config = limits()
    writer, reader = PlanWriter(KEY), PlanReader(KEY)
    seen = 0
    for plan, _ in steps(config, some_requests(12)):
        read = reader.read(writer.plan(plan))
        assert read is not None
        for sent, got in zip(plan.admissions, read.admissions, strict=True):
            seen += 1
            row, same = (param_row(a.request, a.sample_index) for a in (sent, got))
            assert row.tolist() == same.tolist()
            assert needs(got.request) == needs(sent.request)
            if needs(sent.request) & Needs.ADJUST:
                assert reads_tokens(sent.request)
                rows, others = (vocabulary_rows([a.request], [a.tokens], 96) for a in (sent, got))
                assert all((a == b).all() for a, b in zip(rows, others, strict=True))
            else:
                assert got.tokens == ()
            if needs(sent.request) & Needs.PROMPT_LOGPROBS:
                assert got.request.prompt == sent.request.prompt
    assert seen > 12


def test_a_plan_of_256_sequences_is_short() -> None:
    config = limits(
        num_slots=256,
        max_step_tokens=512,
        groups=(GroupLimits(num_pages=12_000),),
        max_context_tokens=512,
    )
    rng = random.Random(1)
    requests = [
        asked(f"request-{i}", tuple(rng.randrange(90_000) for _ in range(60)), max_tokens=120)
        for i in range(256)
    ]
    scheduler, runner = Scheduler(config), FakeRunner(config)
    for request in requests:
        scheduler.add(request)
    writer, sizes, decodes = PlanWriter(KEY), [], []
    while (plan := scheduler.schedule()) is not None:
        sizes.append(len(writer.plan(plan).body))
        if len(plan.slots) == 256 and not plan.tokens:
            decodes.append(sizes[-1])
        result = runner.collect(runner.dispatch(plan))
        scheduler.commit(plan.number, result.tokens, result.counts)
    assert max(sizes) < 10_000
    assert decodes and sorted(decodes)[len(decodes) // 2] < 1_000


def a_few_plans() -> list[StepPlan]:
    return [plan for plan, _ in steps(limits(), some_requests(3))]


def test_a_plan_that_is_lost_or_doubled_is_noticed() -> None:
    first, second, third, *_ = a_few_plans()
    for order in ((first, third), (first, first), (second, first)):
        writer, reader = PlanWriter(KEY), PlanReader(KEY)
        messages = {plan.number: writer.plan(plan) for plan in (first, second, third)}
        with pytest.raises(GroupLostError):
            for plan in order:
                reader.read(messages[plan.number])


def test_a_plan_that_is_changed_or_of_another_group_is_refused() -> None:
    plan = a_few_plans()[0]
    message = PlanWriter(KEY).plan(plan)
    changed = Plan(message.chain, message.body[:-1] + bytes([message.body[-1] ^ 1]))
    with pytest.raises(GroupLostError, match="not sent by rank 0"):
        PlanReader(KEY).read(changed)
    with pytest.raises(GroupLostError, match="not sent by rank 0"):
        PlanReader(b"other" * 6).read(message)


def test_a_number_that_does_not_follow_is_refused() -> None:
    first, _, third, *_ = a_few_plans()
    writer, reader = PlanWriter(KEY), PlanReader(KEY)
    reader.read(writer.plan(first))
    with pytest.raises(GroupLostError, match=f"plan {third.number} came after plan 1"):
        reader.read(writer.plan(third))


def test_a_reset_begins_anew() -> None:
    plans = a_few_plans()
    writer, reader = PlanWriter(KEY), PlanReader(KEY)
    for plan in plans:
        reader.read(writer.plan(plan))
    assert reader.read(writer.reset(0)) is None
    for plan in plans:
        read = reader.read(writer.plan(plan))
        assert read is not None
        assert read.starts == plan.starts
