"""The runner without a model: its arithmetic by hand, and that it notices a wrong page."""

import math
from collections.abc import Sequence

import pytest

from jaxserve.serving.fake_runner import FakeRule, FakeRunner, visible
from jaxserve.serving.pages import GroupLimits
from jaxserve.serving.plan import Admission, RowKind, SchedulerConfig, StepPlan
from jaxserve.serving.request import Request, SamplingParams

VOCAB = 97
CONFIG = SchedulerConfig(
    page_size=2,
    groups=(GroupLimits(num_pages=8),),
    num_slots=2,
    max_step_tokens=8,
    max_context_tokens=16,
)
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, seed=0).resolved({})
SEEDED = SamplingParams(temperature=1.0, max_tokens=8, seed=5).resolved({})


def admission(prompt: Sequence[int], params: SamplingParams = GREEDY, slot: int = 0) -> Admission:
    request = Request(id="a", prompt=tuple(prompt), params=params)
    return Admission(slot, request, 0, request.prompt)


def plan(
    kind: RowKind,
    count: int,
    start: int,
    tokens: Sequence[int] = (),
    pages: Sequence[tuple[int, int, int]] = (),
    copies: Sequence[tuple[int, int, int]] = (),
    admissions: Sequence[Admission] = (),
) -> StepPlan:
    """Returns a plan of one row in slot 0."""
    given = list(tokens)
    return StepPlan(
        1, [0], [count], [start], [kind], given, list(admissions), [list(pages)], [list(copies)]
    )


def tokens_of(runner: FakeRunner, step: StepPlan) -> list[int]:
    return runner.collect(runner.dispatch(step)).tokens


def test_the_first_tokens_are_those_found_by_hand() -> None:
    rule = FakeRule(VOCAB)
    # States: 3, then 31 * 3 + 1 + 1 = 95; their sum is 98, which is 1 modulo 97.
    assert rule.peak([3, 1]) == 1
    assert rule.continue_prompt([3, 1], GREEDY, 1) == [1]
    # The third state is 31 * 95 + 1 + 2 = 38 modulo 97; the sum is 136, which is 39.
    assert rule.continue_prompt([3, 1], GREEDY, 2) == [1, 39]
    assert rule.continue_prompt([3, 1], SEEDED, 1, sample_index=2) == [1 + 5 + 2]


def test_a_window_and_sinks_hide_the_middle() -> None:
    group = GroupLimits(num_pages=8, window=3, sink_tokens=2)
    assert list(visible(group, 2)) == [0, 1, 2]
    assert list(visible(group, 4)) == [0, 1, 2, 3, 4]
    assert list(visible(group, 6)) == [0, 1, 4, 5, 6]
    assert list(visible(GroupLimits(num_pages=8, window=3), 6)) == [4, 5, 6]
    narrow = FakeRule(VOCAB, (GroupLimits(num_pages=8, window=1),))
    assert narrow.peak([3, 1]) == 95


def test_a_prompt_in_chunks_goes_on_like_a_whole_one() -> None:
    runner = FakeRunner(CONFIG, VOCAB)
    prompt = (5, 6, 7)
    pages = [(0, 0, 4), (0, 1, 2)]
    first = plan(RowKind.CHUNK, 2, 0, prompt[:2], pages, admissions=[admission(prompt)])
    assert tokens_of(runner, first) == []
    found = tokens_of(runner, plan(RowKind.LAST, 1, 2, prompt[2:]))
    found += tokens_of(runner, plan(RowKind.DECODE, 1, 3))
    found += tokens_of(runner, plan(RowKind.DECODE, 1, 4, pages=[(0, 2, 7)]))
    assert found == runner.rule.continue_prompt(prompt, GREEDY, 3)


def test_a_page_in_the_wrong_place_gives_a_wrong_token() -> None:
    runner = FakeRunner(CONFIG, VOCAB)
    prompt = (5, 6, 7)
    pages = [(0, 0, 4), (0, 1, 2)]
    tokens_of(runner, plan(RowKind.CHUNK, 2, 0, prompt[:2], pages, admissions=[admission(prompt)]))
    moved = plan(RowKind.LAST, 1, 2, prompt[2:], pages=[(0, 0, 5)])
    assert tokens_of(runner, moved) != runner.rule.continue_prompt(prompt, GREEDY, 1)


def test_a_copied_page_stands_for_the_original() -> None:
    runner = FakeRunner(CONFIG, VOCAB)
    prompt = (5, 6, 7)
    pages = [(0, 0, 4), (0, 1, 2)]
    tokens_of(runner, plan(RowKind.CHUNK, 2, 0, prompt[:2], pages, admissions=[admission(prompt)]))
    copied = plan(RowKind.LAST, 1, 2, prompt[2:], pages=[(0, 0, 5)], copies=[(0, 4, 5)])
    assert tokens_of(runner, copied) == runner.rule.continue_prompt(prompt, GREEDY, 1)


def test_a_position_without_a_page_is_an_error() -> None:
    runner = FakeRunner(CONFIG, VOCAB)
    lost = plan(RowKind.LAST, 1, 0, [5], admissions=[admission([5])])
    with pytest.raises(AssertionError, match="no page for position 0"):
        runner.dispatch(lost)


def test_a_row_gains_as_many_tokens_as_the_rule_accepts() -> None:
    config = SchedulerConfig(
        page_size=16,
        groups=CONFIG.groups,
        num_slots=1,
        max_step_tokens=8,
        max_context_tokens=64,
        tokens_per_step=4,
    )
    runner = FakeRunner(config, VOCAB)
    prompt = (5, 6, 7)
    first = plan(RowKind.LAST, 3, 0, prompt, [(0, 0, 1)], admissions=[admission(prompt)])
    found = tokens_of(runner, first)
    wanted = runner.rule.continue_prompt(prompt, GREEDY, 12)
    gains: list[int] = []
    while len(found) < 8:
        step = plan(RowKind.DECODE, 4, 3 + 4 * len(gains))
        result = runner.collect(runner.dispatch(step))
        assert result.counts == [1 + wanted[len(found)] % 4]
        gains.append(len(result.tokens))
        found += result.tokens
    assert found == wanted[: len(found)]
    assert len(set(gains)) > 1


def test_log_probabilities_are_normal_and_the_greedy_token_is_first() -> None:
    rule = FakeRule(VOCAB)
    for peak in (0, 1, 50):
        ranked = rule.logprobs(peak)
        assert ranked[0][0] == peak
        assert sum(math.exp(logprob) for _, logprob in ranked) == pytest.approx(1.0)
        assert sorted(ranked, key=lambda entry: -entry[1]) == ranked
    entry = rule.logprob(3, token=4, count=2)
    # The power is 1: weights 97, 96, ... 1.
    assert entry.logprob == pytest.approx(math.log(96 / (97 * 98 / 2)))
    assert [token for token, _ in entry.top] == [3, 4]


def test_failures_come_where_they_were_asked_for() -> None:
    runner = FakeRunner(CONFIG, VOCAB)
    step = plan(RowKind.LAST, 1, 0, [5], [(0, 0, 1)], admissions=[admission([5])])
    runner.fail_dispatch(ValueError("one"))
    with pytest.raises(ValueError, match="one"):
        runner.dispatch(step)
    runner.fail_collect(ValueError("two"))
    ticket = runner.dispatch(step)
    with pytest.raises(ValueError, match="two"):
        runner.collect(ticket)
    runner.fail_reset(ValueError("three"))
    with pytest.raises(ValueError, match="three"):
        runner.reset()
    runner.reset()
    assert tokens_of(runner, step) == runner.rule.continue_prompt([5], GREEDY, 1)


def test_steps_take_their_time_one_after_the_other() -> None:
    runner = FakeRunner(CONFIG, VOCAB, step_s=0.002)
    first = plan(RowKind.LAST, 1, 0, [5], [(0, 0, 1)], admissions=[admission([5])])
    tickets = [runner.dispatch(first), runner.dispatch(plan(RowKind.DECODE, 1, 1))]
    assert runner.most_in_flight == 2
    ready = [runner.collect(ticket).ready_s for ticket in tickets]
    assert ready[1] - ready[0] == pytest.approx(0.002)
    assert runner.in_flight == 0
