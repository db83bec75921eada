"""What samples and beams of one prompt share, counted by hand, and that sharing changes nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import jaxserve as js
from jaxserve.layers.decoder import Params
from jaxserve.serving.generation import Program
from jaxserve.serving.options import EngineOptions
from jaxserve.serving.request import Completion, Request, SamplingParams
from jaxserve.serving.scheduler import GroupLimits, RowKind, Scheduler, SchedulerConfig, StepPlan

PAGE = 16


def scheduler(**fields: Any) -> Scheduler:
    """Returns a scheduler with 64 pages and 8 slots."""
    known: dict[str, Any] = {
        "page_size": PAGE,
        "groups": (GroupLimits(64),),
        "num_slots": 8,
        "max_step_tokens": 128,
        "max_context_tokens": 256,
        "prefix_cache": False,
        "max_in_flight": 1,
    }
    return Scheduler(SchedulerConfig(**known | fields))


def request(prompt_tokens: int, max_tokens: int = 64, beam_width: int = 1, n: int = 1) -> Request:
    params = SamplingParams(seed=0, max_tokens=max_tokens, temperature=1.0, n=n)
    prompt = tuple(range(prompt_tokens))
    return Request(id="a", prompt=prompt, params=params, beam_width=beam_width)


def stepped(made: Scheduler) -> StepPlan:
    """Returns the next plan, committed; every row that samples has token 7."""
    plan = made.schedule()
    assert plan is not None
    made.check()
    made.commit(plan.number, [7] * sum(kind != RowKind.CHUNK for kind in plan.kinds))
    made.check()
    return plan


def pages(made: Scheduler) -> tuple[int, int]:
    """Returns (pages held, pages needed if none were shared)."""
    stats = made.stats()
    return stats.pages_held[0], stats.page_references[0]


# Parallel sampling.


def test_four_samples_of_forty_tokens_share_the_two_full_pages() -> None:
    made = scheduler()
    made.add(request(40, n=4))
    first = table(stepped(made), 0)
    assert pages(made) == (3, 3)
    plan = stepped(made)  # the others join
    assert (plan.counts, plan.starts) == ([1, 1, 1, 1], [40, 39, 39, 39])
    assert pages(made) == (2 + 4, 4 * 3)
    others = [table(plan, slot) for slot in plan.slots[1:]]
    assert [own[:2] for own in others] == [first[:2]] * 3
    # The third page has 7 tokens that all see, and places that each writes: a copy for each.
    assert plan.copies == [[(0, first[2], own[2]) for own in others]]


def table(plan: StepPlan, slot: int) -> list[int]:
    """Returns the pages that a plan writes into the page table of a slot, from its start on."""
    writes = [(column, page) for owner, column, page in plan.writes[0] if owner == slot]
    assert [column for column, _ in writes] == list(range(len(writes)))
    return [page for _, page in writes]


@pytest.mark.parametrize(
    ("prompt", "shared"), [(1, 0), (16, 0), (17, 1), (32, 1), (33, 2), (40, 2), (48, 2), (49, 3)]
)
@pytest.mark.parametrize("n", [2, 8])
def test_samples_share_the_pages_before_that_of_the_last_prompt_token(
    prompt: int, shared: int, n: int
) -> None:
    # Each sample computes the last token of the prompt itself, so its page is its own.
    made = scheduler()
    made.add(request(prompt, n=n))
    stepped(made)
    stepped(made)
    total = prompt // PAGE + 1  # the first sample already writes the token after the prompt
    total_others = -(-prompt // PAGE)
    unshared = total + (n - 1) * total_others
    assert pages(made) == (unshared - (n - 1) * shared, unshared)


def test_output_is_not_shared() -> None:
    made = scheduler()
    made.add(request(40, n=4))
    for _ in range(20):
        stepped(made)
    assert pages(made) == (2 + 4 * 2, 4 * 4)  # 40 + 20 tokens: two pages each of their own


def test_shared_pages_stay_until_the_last_sample_ends() -> None:
    made = scheduler()
    made.add(request(40, n=4))
    stepped(made)
    stepped(made)
    held = []
    for index in (0, 2, 1, 3):
        made.finish("a", index, 1)
        made.check()
        held.append(pages(made))
    assert held == [(2 + 3, 9), (2 + 2, 6), (2 + 1, 3), (0, 0)]


# Beam search.


def test_beams_share_what_they_have_in_common() -> None:
    made = scheduler()
    made.add(request(40, beam_width=3))
    stepped(made)
    assert pages(made) == (3, 3)
    made.advance("a", [(0, 1), (0, 2), (0, 3)])
    plan = stepped(made)
    assert pages(made) == (2 + 3, 9)
    assert len(plan.copies[0]) == 2  # the first beam goes on in its parent's page
    for _ in range(9):  # 50 tokens: a fourth page each
        made.advance("a", [(0, 1), (1, 2), (2, 3)])
        assert stepped(made).copies == [[]]
    assert pages(made) == (2 + 3 * 2, 12)


def test_beams_of_one_parent_share_its_full_pages() -> None:
    made = scheduler()
    made.add(request(40, beam_width=3))
    stepped(made)
    made.advance("a", [(0, 1), (0, 2), (0, 3)])
    stepped(made)
    for _ in range(9):
        made.advance("a", [(0, 1), (1, 2), (2, 3)])
        stepped(made)
    made.advance("a", [(2, 1), (2, 2), (2, 3)])
    assert pages(made) == (4, 4)  # those of the other two are free at once
    plan = stepped(made)
    assert pages(made) == (3 + 3, 12)  # three full pages in common, the fourth copied
    assert len(plan.copies[0]) == 2


# The same tokens.


@pytest.fixture(scope="module")
def llm(program: Program, params: Params) -> js.LLM:
    options = EngineOptions(max_sequences=4, max_step_tokens=32, page_size=8, prefix_cache=False)
    model = program.model
    return js.LLM(model.config, params, declare=model.declare, engine=options)


def assert_scores_are_those_of_the_text(llm: js.LLM, prompt: list[int], done: Completion) -> None:
    """Checks a completion's scores against those of its tokens read as one prompt, unshared."""
    assert done.logprobs is not None
    whole = [*prompt, *done.token_ids]
    read = llm.generate(whole, max_tokens=1, temperature=0, prompt_logprobs=0).prompt_logprobs
    wanted = [entry.logprob for entry in read[len(prompt) :]]
    np.testing.assert_allclose([entry.logprob for entry in done.logprobs], wanted, atol=2e-5)


@pytest.mark.parametrize(
    "length",
    [pytest.param(15, marks=pytest.mark.slow), 16, pytest.param(17, marks=pytest.mark.slow)],
)
def test_a_copied_page_is_what_the_parent_had(llm: js.LLM, length: int) -> None:
    prompt = np.random.default_rng(length).integers(0, 31, length).tolist()
    samples = llm.generate(prompt, n=4, max_tokens=20, temperature=1, seed=2, logprobs=0)
    assert len({sample.token_ids for sample in samples}) == 4
    beams = llm.beam_search(prompt, width=4, max_tokens=20)
    for done in [*samples, *beams]:
        assert_scores_are_those_of_the_text(llm, prompt, done)


def test_sharing_needs_fewer_pages_than_samples_apart(llm: js.LLM) -> None:
    most: list[tuple[int, int]] = []
    params = SamplingParams(n=4, max_tokens=13, temperature=1, seed=2).resolved({})
    llm.engine.submit(Request(id="a", prompt=tuple(range(30)), params=params), lambda event: None)
    while llm.engine.step():
        stats = llm.engine.metrics.scheduler
        most.append((stats.pages_held[0], stats.page_references[0]))
    # 30 + 12 tokens are written: 6 pages each, of which the 3 before the last prompt token's are
    # shared.
    assert max(most) == (3 + 4 * 3, 4 * 6)
