"""What the scheduler plans, case by case, with hand-computed expectations."""

from __future__ import annotations

from typing import Any

import pytest

from jaxserve.errors import (
    CapacityError,
    ConfigError,
    ContextLengthError,
    QueueFullError,
    UsageError,
)
from jaxserve.serving.request import Request, SamplingParams
from jaxserve.serving.scheduler import (
    Event,
    GroupLimits,
    RowKind,
    Scheduler,
    SchedulerConfig,
    StepPlan,
)

Row = tuple[int, str, int, int]
"""Slot, kind, start and number of query tokens."""


def make(num_pages: int = 16, **fields: Any) -> Scheduler:
    """Returns a scheduler with pages of 4 tokens, 4 slots and 16 tokens a step."""
    known: dict[str, Any] = {
        "page_size": 4,
        "groups": (GroupLimits(num_pages),),
        "num_slots": 4,
        "max_step_tokens": 16,
        "max_context_tokens": 64,
        "prefix_cache": False,
    }
    return Scheduler(SchedulerConfig(**known | fields))


def request(name: str, prompt: int | tuple[int, ...] = 4, **fields: Any) -> Request:
    """Returns a request; a number stands for a prompt of so many tokens, unlike all others."""
    if isinstance(prompt, int):
        prompt = tuple(1000 * sum(map(ord, name)) + i for i in range(prompt))
    own = {key: fields.pop(key) for key in list(fields) if key in Request.__struct_fields__}
    params = SamplingParams(**{"seed": 0, "max_tokens": 8, "temperature": 1.0} | fields)
    return Request(id=name, prompt=prompt, params=params, **own)


def started(scheduler: Scheduler, *requests: Request) -> StepPlan:
    """Returns the first plan with these requests."""
    for each in requests:
        scheduler.add(each)
    return planned(scheduler)


def planned(scheduler: Scheduler) -> StepPlan:
    plan = scheduler.schedule()
    assert plan is not None
    scheduler.check()
    return plan


def rows(plan: StepPlan) -> list[Row]:
    return [
        (slot, RowKind(kind).name, start, count)
        for slot, kind, start, count in zip(
            plan.slots, plan.kinds, plan.starts, plan.counts, strict=True
        )
    ]


def committed(scheduler: Scheduler, plan: StepPlan, *tokens: int) -> list[Event]:
    """Returns the events of a plan; rows without a given token sample 7."""
    sampling = sum(kind != RowKind.CHUNK for kind in plan.kinds)
    events = scheduler.commit(plan.number, [*tokens, *[7] * (sampling - len(tokens))])
    scheduler.check()
    return events


def run(scheduler: Scheduler, steps: int) -> list[Event]:
    """Returns the events of some steps, one at a time."""
    return [e for _ in range(steps) for e in committed(scheduler, planned(scheduler))]


# Batching.


def test_a_prompt_is_computed_and_then_decoded() -> None:
    scheduler = make()
    plan = started(scheduler, request("a", (5, 6, 7, 8, 9), max_tokens=2))
    assert rows(plan) == [(0, "LAST", 0, 5)]
    assert plan.tokens == [5, 6, 7, 8, 9]
    assert plan.writes == [[(0, 0, 0), (0, 1, 1)]]
    assert [(a.slot, a.tokens) for a in plan.admissions] == [(0, (5, 6, 7, 8, 9))]
    ((sequence, tokens, reason, row),) = committed(scheduler, plan, 3)
    assert (tokens, reason, row) == ([3], None, 0)
    plan = planned(scheduler)
    assert rows(plan) == [(0, "DECODE", 5, 1)]
    assert plan.tokens == plan.admissions == []
    (event,) = committed(scheduler, plan, 4)
    assert (event.tokens, event.finish_reason) == ([4], "length")
    assert sequence.tokens == [5, 6, 7, 8, 9, 3, 4]
    assert scheduler.schedule() is None


def test_sequences_join_and_leave_between_steps() -> None:
    scheduler = make()
    committed(scheduler, started(scheduler, request("a", max_tokens=2)))
    plan = started(scheduler, request("b", max_tokens=3))
    assert rows(plan) == [(0, "DECODE", 4, 1), (1, "LAST", 0, 4)]
    events = committed(scheduler, plan)
    assert [(e.sequence.request.id, e.finish_reason) for e in events] == [
        ("a", "length"),
        ("b", None),
    ]
    plan = started(scheduler, request("c"))
    assert rows(plan) == [(1, "DECODE", 4, 1), (0, "LAST", 0, 4)]


def test_a_long_prompt_goes_in_chunks_beside_the_decodes() -> None:
    scheduler = make()
    committed(scheduler, started(scheduler, request("a")))
    scheduler.add(request("b", 40))
    seen = [rows(plan)[1:] for plan in steps(scheduler, 3)]
    assert seen == [[(1, "CHUNK", 0, 15)], [(1, "CHUNK", 15, 15)], [(1, "LAST", 30, 10)]]


def steps(scheduler: Scheduler, count: int) -> list[StepPlan]:
    plans = []
    for _ in range(count):
        plans.append(planned(scheduler))
        committed(scheduler, plans[-1])
    return plans


def test_a_chunk_limit_lets_prompts_go_side_by_side() -> None:
    scheduler = make(max_prefill_tokens=6)
    plan = started(scheduler, request("a", 10), request("b", 10), request("c", 10))
    assert rows(plan) == [(0, "CHUNK", 0, 6), (1, "CHUNK", 0, 6), (2, "CHUNK", 0, 4)]
    committed(scheduler, plan)
    assert rows(planned(scheduler)) == [(0, "LAST", 6, 4), (1, "LAST", 6, 4), (2, "LAST", 4, 6)]


def test_decode_rows_come_first_whatever_their_slots() -> None:
    scheduler = make()
    committed(scheduler, started(scheduler, request("a", max_tokens=1), request("b")))
    plan = started(scheduler, request("c", 8))
    assert rows(plan) == [(1, "DECODE", 4, 1), (0, "LAST", 0, 8)]


# Plans ahead of their results.


def test_plans_run_ahead_up_to_the_limit() -> None:
    scheduler = make(max_in_flight=3)
    plans = [started(scheduler, request("a")), planned(scheduler), planned(scheduler)]
    assert scheduler.schedule() is None
    assert [rows(plan) for plan in plans] == [
        [(0, "LAST", 0, 4)],
        [(0, "DECODE", 4, 1)],
        [(0, "DECODE", 5, 1)],
    ]
    committed(scheduler, plans[0])
    assert rows(planned(scheduler)) == [(0, "DECODE", 6, 1)]


def test_nothing_runs_ahead_of_the_last_token() -> None:
    scheduler = make(max_in_flight=4)
    started(scheduler, request("a", max_tokens=2))
    planned(scheduler)
    assert scheduler.schedule() is None


def test_results_after_a_stop_token_are_dropped() -> None:
    scheduler = make(max_in_flight=2)
    first, second = started(scheduler, request("a", stop_ids=(3,))), planned(scheduler)
    (event,) = committed(scheduler, first, 3)
    assert (event.tokens, event.finish_reason) == ([3], "stop")
    assert scheduler.stats().pages_held == (0,)
    assert committed(scheduler, second, 8) == []
    assert event.sequence.tokens[-1] == 3


@pytest.mark.parametrize("stop", [{"stop_ids": (3,)}, {"stop_token_ids": (3,)}])
def test_a_stop_token_counts_after_the_least_output(stop: dict[str, Any]) -> None:
    scheduler = make()
    scheduler.add(request("a", min_tokens=2, **stop))
    reasons = [committed(scheduler, planned(scheduler), 3)[0].finish_reason for _ in range(3)]
    assert reasons == [None, None, "stop"]


def test_plans_commit_in_order() -> None:
    scheduler = make()
    started(scheduler, request("a"))
    second = planned(scheduler)
    with pytest.raises(AssertionError, match="plan 2 is committed before plan 1"):
        scheduler.commit(second.number, [7])


def test_rows_may_bring_several_tokens() -> None:
    scheduler = make(tokens_per_step=3, max_step_tokens=16, max_in_flight=2)
    scheduler.commit(started(scheduler, request("a", 6)).number, [1], [1])
    ahead = [planned(scheduler), planned(scheduler)]
    assert [rows(plan) for plan in ahead] == [[(0, "DECODE", 6, 3)], [(0, "DECODE", 9, 3)]]
    (event,) = scheduler.commit(ahead[0].number, [2, 3], [2])
    assert event.tokens == [2, 3]
    assert event.sequence.computed == 11  # one of the first three was not accepted
    assert rows(planned(scheduler)) == [(0, "DECODE", 11, 2)]  # the last of 14 needs no keys
    assert scheduler.commit(ahead[1].number, [], [0]) == []
    scheduler.check()


def test_tokens_after_a_stop_in_one_row_are_dropped() -> None:
    scheduler = make(tokens_per_step=4)
    scheduler.commit(started(scheduler, request("a", stop_ids=(3,))).number, [1], [1])
    (event,) = scheduler.commit(planned(scheduler).number, [5, 3, 6, 8], [4])
    assert (event.tokens, event.finish_reason) == ([5, 3], "stop")
    assert event.sequence.tokens[-3:] == [1, 5, 3]


# Admission.


def test_a_full_queue_names_both_numbers() -> None:
    scheduler = make(max_queued_requests=2)
    scheduler.add(request("a"))
    scheduler.add(request("b"))
    with pytest.raises(QueueFullError, match=r"2 requests are waiting.*max_queued_requests=2"):
        scheduler.add(request("c"))
    planned(scheduler)
    scheduler.add(request("c"))


def test_a_queue_full_of_tokens_names_both_numbers() -> None:
    scheduler = make(max_queued_tokens=10)
    scheduler.add(request("a", 7))
    with pytest.raises(QueueFullError, match=r"7 prompt tokens are waiting and 4 .*tokens=10"):
        scheduler.add(request("b", 4))
    scheduler.add(request("c", 3))
    scheduler.abort("a")
    scheduler.add(request("b", 4))
    assert scheduler.stats().waiting_tokens == 7


@pytest.mark.parametrize(
    ("fields", "prompt", "error", "message"),
    [
        ({"num_pages": 2}, 4, CapacityError, r"4 prompt .* 8 output tokens need 3 pages .* has 2;"),
        ({"max_queued_tokens": 3}, 4, CapacityError, "prompt has 4 tokens and the queue takes 3"),
        ({"max_context_tokens": 8}, 8, ContextLengthError, "has 8 tokens and the context 8"),
    ],
)
def test_what_can_never_fit_is_refused_with_both_numbers(
    fields: dict[str, Any], prompt: int, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make(**fields).add(request("a", prompt))


def test_what_just_fits_is_served() -> None:
    scheduler = make(num_pages=3)
    scheduler.add(request("a", 5))  # 12 of its 13 tokens have keys
    assert run(scheduler, 8)[-1].finish_reason == "length"


def test_output_is_cut_to_the_context() -> None:
    scheduler = make(max_context_tokens=6)
    scheduler.add(request("a"))
    assert [event.finish_reason for event in run(scheduler, 2)] == [None, "length"]


def test_an_open_id_is_not_used_twice() -> None:
    scheduler = make()
    scheduler.add(request("a"))
    with pytest.raises(UsageError, match="request id 'a' is open already"):
        scheduler.add(request("a"))
    scheduler.abort("a")
    scheduler.add(request("a"))


def test_a_request_waits_until_its_whole_prompt_has_pages() -> None:
    scheduler = make(num_pages=10, max_prefill_tokens=4)
    scheduler.add(request("a", 16, max_tokens=4))
    scheduler.add(request("b", 25, max_tokens=4))  # 7 pages; a has only taken 1 of its 4
    assert rows(planned(scheduler)) == [(0, "CHUNK", 0, 4)]
    assert scheduler.stats().waiting == 1


def test_later_requests_do_not_pass_the_head_of_the_queue() -> None:
    scheduler = make(num_pages=10)
    committed(scheduler, started(scheduler, request("a", 16, max_tokens=4)))
    scheduler.add(request("b", 28, max_tokens=4))
    scheduler.add(request("c", 4))
    assert len(planned(scheduler).slots) == 1


def test_priorities_order_the_queue() -> None:
    scheduler = make(num_slots=1)
    for name, priority in (("low", 5), ("high", -1), ("usual", 0)):
        scheduler.add(request(name, priority=priority, max_tokens=1))
    order = [event.sequence.request.id for event in run(scheduler, 3)]
    assert order == ["high", "usual", "low"]


def test_fair_queueing_takes_turns() -> None:
    scheduler = make(num_slots=1, policy="fair")
    for name in ("a1", "a2", "a3", "b1"):
        scheduler.add(request(name, client=name[0], max_tokens=1))
    order = [event.sequence.request.id for event in run(scheduler, 4)]
    assert order == ["a1", "b1", "a2", "a3"]


# The end of requests.


def test_abort_frees_slots_and_pages_at_once_and_drops_late_results() -> None:
    scheduler = make()
    plan = started(scheduler, request("a", n=2), request("b", 4))
    assert scheduler.abort("a")
    assert scheduler.stats().pages_held == (1,)
    assert [event.sequence.request.id for event in committed(scheduler, plan)] == ["b"]
    assert not scheduler.abort("a")
    assert len(planned(scheduler).slots) == 1


def test_finish_cuts_the_output_where_the_client_says() -> None:
    scheduler = make(max_in_flight=2)
    plans = [started(scheduler, request("a")), planned(scheduler)]
    (event,) = committed(scheduler, plans[0], 1)
    scheduler.finish("a", 0, 0)
    assert event.sequence.tokens == list(event.sequence.request.prompt)
    assert committed(scheduler, plans[1], 2) == []
    scheduler.finish("a", 0, 0)  # too late: nothing happens
    assert scheduler.schedule() is None


def test_a_client_does_not_pay_for_samples_that_never_start() -> None:
    scheduler = make(policy="fair")
    scheduler.add(request("a", client="a", n=4, max_tokens=8))
    for index in (0, 2):
        scheduler.finish("a", index, 0)
    started(scheduler)
    assert scheduler._policy._accounts == {"a": 4 + 2 * 8}  # type: ignore[attr-defined]
    scheduler.finish("a", 1, 0)
    scheduler.finish("a", 3, 0)
    assert scheduler._policy._accounts == {"a": 4}  # type: ignore[attr-defined]


def test_a_reset_forgets_requests_pages_and_plans() -> None:
    scheduler = make(prefix_cache=True)
    scheduler.add(request("a", 8))
    plan = planned(scheduler)
    scheduler.add(request("b"))
    assert [sequence.request.id for sequence in scheduler.reset()] == ["a", "b"]
    scheduler.check()
    assert scheduler.schedule() is None
    after = started(scheduler, request("a", 8))
    assert after.number == plan.number + 1
    assert rows(after) == [(0, "LAST", 0, 8)]


# Preemption.


def test_the_newest_gives_way_and_keeps_its_output() -> None:
    scheduler = make(num_pages=4, max_in_flight=1)
    a, b = request("a", 7, max_tokens=9), request("b", 7, max_tokens=9)
    committed(scheduler, started(scheduler, a, b), 1, 2)
    committed(scheduler, planned(scheduler), 3, 4)  # both have two pages, full
    plan = planned(scheduler)
    assert rows(plan) == [(0, "DECODE", 8, 1)]
    assert scheduler.stats().preemptions == 1
    committed(scheduler, plan)
    while not (plan := planned(scheduler)).admissions:
        committed(scheduler, plan)
    assert rows(plan) == [(0, "LAST", 0, 9)]
    assert plan.tokens == [*b.prompt, 2, 4]
    assert plan.admissions[0].tokens == (*b.prompt, 2, 4)


def test_results_in_flight_of_a_preempted_sequence_are_kept() -> None:
    scheduler = make(num_pages=4, max_in_flight=2)
    a, b = request("a", 7, max_tokens=9), request("b", 7, max_tokens=9)
    committed(scheduler, started(scheduler, a, b), 1, 2)
    ahead = planned(scheduler)
    late = planned(scheduler)  # preempts b while its second token is on the way
    assert late.slots == [0]
    events = committed(scheduler, ahead, 3, 4)
    assert [event.tokens for event in events] == [[3], [4]]
    assert events[1].sequence.tokens == [*b.prompt, 2, 4]
    assert events[1].sequence.slot < 0


def test_a_less_urgent_sequence_gives_way_first() -> None:
    scheduler = make(num_pages=4, max_in_flight=1)
    low = request("low", 7, max_tokens=9, priority=1)
    committed(scheduler, started(scheduler, low))
    committed(scheduler, started(scheduler, request("high", 7, max_tokens=9)))
    committed(scheduler, planned(scheduler))
    plan = planned(scheduler)
    assert plan.slots == [1]
    assert scheduler.stats().resuming == 1


# Shared pages.


def test_samples_share_the_prompt_and_copy_its_last_page() -> None:
    scheduler = make()
    committed(scheduler, started(scheduler, request("a", 10, n=3, max_tokens=4)))
    plan = planned(scheduler)
    assert rows(plan) == [(0, "DECODE", 10, 1), (1, "LAST", 9, 1), (2, "LAST", 9, 1)]
    assert plan.copies == [[(0, 2, 3), (0, 2, 4)]]
    assert plan.writes == [[(1, 0, 0), (1, 1, 1), (1, 2, 3), (2, 0, 0), (2, 1, 1), (2, 2, 4)]]
    stats = scheduler.stats()
    assert (stats.pages_held, stats.page_references) == ((5,), (9,))


def test_samples_of_a_prompt_of_whole_pages_copy_its_last_one() -> None:
    scheduler = make()
    committed(scheduler, started(scheduler, request("a", 8, n=2, max_tokens=4)))
    plan = planned(scheduler)
    assert rows(plan) == [(0, "DECODE", 8, 1), (1, "LAST", 7, 1)]
    assert plan.copies == [[(0, 1, 3)]]


def test_a_sample_that_gets_a_slot_late_still_shares() -> None:
    scheduler = make(num_slots=2, num_pages=12)
    committed(scheduler, started(scheduler, request("a", 9, n=3, max_tokens=2)))
    committed(scheduler, planned(scheduler))  # the first sample is over
    plan = planned(scheduler)
    assert [a.sample_index for a in plan.admissions] == [2]
    assert rows(plan) == [(1, "DECODE", 9, 1), (0, "LAST", 8, 1)]


def test_a_cached_prefix_is_not_computed_again() -> None:
    scheduler = make(prefix_cache=True)
    prompt = tuple(range(100, 110))
    scheduler.add(request("a", prompt, max_tokens=1))
    (event,) = run(scheduler, 1)
    assert event.sequence.cached_tokens == 0
    plan = started(scheduler, request("b", (*prompt[:9], 5, 6)))
    assert rows(plan) == [(0, "LAST", 8, 3)]
    assert plan.tokens == [108, 5, 6]
    (event,) = committed(scheduler, plan)
    assert event.sequence.cached_tokens == 8
    assert scheduler.stats().prefix_query_tokens == 21
    assert scheduler.stats().prefix_hit_tokens == 8


def test_the_last_token_is_always_computed() -> None:
    scheduler = make(prefix_cache=True)
    prompt = tuple(range(8))
    scheduler.add(request("a", prompt, max_tokens=1))
    run(scheduler, 1)
    assert rows(started(scheduler, request("b", prompt))) == [(0, "LAST", 4, 4)]


def test_output_is_cached_too() -> None:
    scheduler = make(prefix_cache=True)
    scheduler.add(request("a", (1, 2, 3, 4), max_tokens=5))
    run(scheduler, 5)
    assert rows(started(scheduler, request("b", (1, 2, 3, 4, 7, 7, 7, 7, 7)))) == [
        (0, "LAST", 8, 1)
    ]


@pytest.mark.parametrize(
    "other", [{"salt": "x"}, {"prompt_logprobs": 0}], ids=["salt", "prompt_logprobs"]
)
def test_some_requests_find_nothing_in_the_cache(other: dict[str, Any]) -> None:
    scheduler = make(prefix_cache=True)
    prompt = tuple(range(9))
    scheduler.add(request("a", prompt, max_tokens=1))
    run(scheduler, 1)
    assert rows(started(scheduler, request("b", prompt, **other))) == [(0, "LAST", 0, 9)]


def test_a_prefix_is_shared_while_it_is_held() -> None:
    scheduler = make(prefix_cache=True, num_pages=5)
    prompt = tuple(range(9))
    committed(scheduler, started(scheduler, request("a", prompt, max_tokens=4)))
    started(scheduler, request("b", prompt, max_tokens=4))
    assert scheduler.stats().pages_held == (4,)


def test_a_preempted_sequence_finds_its_own_pages() -> None:
    scheduler = make(num_pages=5, prefix_cache=True, max_in_flight=1)
    a, b = request("a", 7, max_tokens=5), request("b", 7, max_tokens=9)
    scheduler.add(a)
    scheduler.add(b)
    events = run(scheduler, 5)
    assert scheduler.stats().preemptions == 1
    assert events[-1].finish_reason == "length"
    plan = planned(scheduler)
    assert rows(plan)[0][1:] == ("LAST", 8, len(plan.tokens))


# Groups, shards, sinks.


def test_a_window_group_keeps_only_the_windows_pages() -> None:
    scheduler = make(
        groups=(GroupLimits(20), GroupLimits(8, window=6)), max_step_tokens=8, max_in_flight=1
    )
    scheduler.add(request("a", 30, max_tokens=20))
    held = []
    while (plan := scheduler.schedule()) is not None:
        held.append(scheduler.stats().pages_held)
        committed(scheduler, plan)
    assert held[-1] == (13, 3)
    assert max(pages for _, pages in held) <= 5


def test_endless_generation_needs_no_more_pages() -> None:
    scheduler = make(
        groups=(GroupLimits(8, window=8, sink_tokens=2),),
        max_context_tokens=None,
        max_step_tokens=8,
    )
    scheduler.add(request("a", 10, max_tokens=500))
    held: set[int] = set()
    columns: set[int] = set()
    events: list[Event] = []
    while (plan := scheduler.schedule()) is not None:
        held.add(scheduler.stats().pages_held[0])
        columns |= {column for _, column, _ in plan.writes[0]}
        events = committed(scheduler, plan)
    assert events[-1].finish_reason == "length"
    assert len(events[-1].sequence.tokens) == 510
    assert max(held) == 4  # the sinks' page, and three that 8 tokens touch
    assert columns == set(range(scheduler.config.table_width(0)))


def test_requests_spread_over_shards() -> None:
    scheduler = make(num_shards=2)
    plan = started(scheduler, request("a"), request("b"), request("c"))
    assert rows(plan) == [(0, "LAST", 0, 4), (4, "LAST", 0, 4), (1, "LAST", 0, 4)]
    assert [write[2] for write in plan.writes[0]] == [0, 0, 1]  # page ids are the shard's own


def test_each_shard_has_its_own_budget() -> None:
    scheduler = make(num_shards=2)
    plan = started(scheduler, request("a", 20), request("b", 20))
    assert rows(plan) == [(0, "CHUNK", 0, 16), (4, "CHUNK", 0, 16)]


def test_a_request_goes_where_its_prefix_is() -> None:
    scheduler = make(num_shards=2, prefix_cache=True)
    prompt = tuple(range(9))
    committed(scheduler, started(scheduler, request("a", max_tokens=9), request("b", prompt)))
    plan = started(scheduler, request("c", prompt))
    assert rows(plan)[-1] == (5, "LAST", 8, 1)


# Beam search.


def test_beams_wait_for_advance_and_share_pages() -> None:
    scheduler = make()
    plan = started(scheduler, request("a", (1, 2, 3, 4, 5), beam_width=2))
    (event,) = committed(scheduler, plan, 9)
    assert (event.tokens, event.sequence.tokens) == ([9], [1, 2, 3, 4, 5])
    assert scheduler.schedule() is None
    scheduler.advance("a", [(0, 10), (0, 11)])
    plan = planned(scheduler)
    assert rows(plan) == [(0, "LAST", 5, 1), (1, "LAST", 5, 1)]
    assert plan.tokens == [10, 11]
    assert plan.copies == [[(0, 1, 2)]]
    assert [(a.slot, a.sample_index, a.tokens[5:]) for a in plan.admissions] == [
        (0, 0, (10,)),
        (1, 1, (11,)),
    ]
    assert scheduler.stats().page_references == (4,)
    assert scheduler.stats().pages_held == (3,)


def test_a_beam_that_is_not_chosen_is_dropped() -> None:
    scheduler = make()
    committed(scheduler, started(scheduler, request("a", 5, beam_width=2)))
    scheduler.advance("a", [(0, 10), (0, 11)])
    committed(scheduler, planned(scheduler))
    scheduler.advance("a", [(1, 12)])
    plan = planned(scheduler)
    assert rows(plan) == [(1, "LAST", 6, 1)]
    assert plan.admissions[0].sample_index == 0
    assert plan.admissions[0].tokens[5:] == (11, 12)
    assert scheduler.stats().pages_held == (2,)


def test_no_choice_ends_a_search() -> None:
    scheduler = make()
    committed(scheduler, started(scheduler, request("a", beam_width=2)))
    scheduler.advance("a", [])
    assert scheduler.stats().pages_held == (0,)
    scheduler.advance("a", [(0, 1)])  # over: nothing happens
    assert not scheduler.abort("a")


def test_a_plan_of_beams_does_not_hold_up_others() -> None:
    scheduler = make()
    committed(scheduler, started(scheduler, request("a", beam_width=2), request("b", 4)))
    assert rows(planned(scheduler)) == [(1, "DECODE", 4, 1)]


def test_wrong_choices_are_refused() -> None:
    scheduler = make()
    plan = started(scheduler, request("a", beam_width=2, max_tokens=2), request("b"))
    with pytest.raises(UsageError, match=r"beams \[0\] of request 'a' have not sampled yet"):
        scheduler.advance("a", [(0, 1)])
    committed(scheduler, plan)
    with pytest.raises(UsageError, match="3 choices exceed beam_width=2"):
        scheduler.advance("a", [(0, 1)] * 3)
    with pytest.raises(UsageError, match=r"choice of beam 1, which is not among \[0\]"):
        scheduler.advance("a", [(1, 1)])
    with pytest.raises(UsageError, match="request 'b' has beam_width=1"):
        scheduler.advance("b", [(0, 1)])
    scheduler.advance("a", [(0, 1)])
    committed(scheduler, planned(scheduler))
    with pytest.raises(UsageError, match="beams of 2 output tokens have their full length 2"):
        scheduler.advance("a", [(0, 1)])


# Numbers.


def test_waste_is_what_is_held_and_not_written() -> None:
    scheduler = make()
    started(scheduler, request("a", 5), request("b", 4))
    stats = scheduler.stats()
    assert (stats.held_tokens, stats.unused_tokens) == (12, 3)
    assert stats.kv_waste == 0.25
    assert (stats.running, stats.loading, stats.waiting, stats.in_flight) == (2, 0, 0, 1)
    assert make().stats().kv_waste == 0.0


def test_check_notices_a_page_with_two_writers() -> None:
    scheduler = make()
    committed(scheduler, started(scheduler, request("a"), request("b")))
    first, second = scheduler._decoding
    pages = scheduler._memory[0].allocators[0]
    pages.release(second.pages[0][0])
    pages.share(first.pages[0][0])
    second.pages[0][0] = first.pages[0][0]
    second.computed = first.computed = 3
    with pytest.raises(AssertionError, match="which others read"):
        scheduler.check()


def test_check_notices_a_lost_sequence() -> None:
    scheduler = make()
    started(scheduler, request("a"))
    scheduler._decoding.clear()
    with pytest.raises(AssertionError, match="a sequence is lost"):
        scheduler.check()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"page_size": 0}, "page_size=0 must be at least 1"),
        ({"max_in_flight": 5}, "max_in_flight=5 must be at most 4"),
        ({"policy": "lifo"}, "policy='lifo' is unknown; use 'fcfs' or 'fair'"),
        ({"groups": ()}, "groups is empty"),
        ({"max_context_tokens": 1}, "max_context_tokens=1 must be at least 2"),
        ({"max_prefill_tokens": 0}, "max_prefill_tokens=0 must be at least 1"),
        ({"max_step_tokens": 3}, "max_step_tokens=3 is below 4, which num_slots=4"),
        ({"tokens_per_step": 5}, "max_step_tokens=16 is below 20"),
        ({"client_weights": {"a": 0.0}}, r"client_weights\['a'\]=0.0 must be above 0"),
        ({"max_context_tokens": None}, "max_context_tokens=None is endless"),
    ],
)
def test_limits_that_contradict_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**fields)
