"""The host loop over a fixed batch, against the loop on the device."""

import logging
from collections.abc import Iterator, Sequence

import jax
import pytest

from jaxserve.layers.decoder import Params
from jaxserve.serving import static_batch
from jaxserve.serving.generation import Program
from jaxserve.serving.request import SamplingParams
from jaxserve.serving.static_batch import CompiledSteps, Row, RowToken, StaticBatch, at_least

from .conftest import Continue

PROMPTS = [(3, 14, 15), (9, 2, 6, 5, 3, 5, 8), (1,)]
COUNT = 24


@pytest.fixture(scope="module", autouse=True)
def small_buckets() -> Iterator[None]:
    """Starts the ladder low, so that a short run outgrows its first bucket."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(static_batch, "MIN_SLOTS", 32)
        yield


class Steps(CompiledSteps):
    """Compiled steps that note what they report."""

    def __init__(self, program: Program, params: Params) -> None:
        self.reports: list[tuple[str, float]] = []
        super().__init__(program, params, lambda what, s: self.reports.append((what, s)))


@pytest.fixture(scope="module")
def steps(program: Program, params: Params) -> Steps:
    return Steps(program, params)


@pytest.fixture(scope="module")
def expected(continued: Continue) -> list[list[int]]:
    """Returns the greedy continuations of the prompts."""
    return [continued(prompt, COUNT)[0] for prompt in PROMPTS]


def greedy(prompt: Sequence[int], max_tokens: int = COUNT, stop_ids: tuple[int, ...] = ()) -> Row:
    params = SamplingParams(temperature=0, max_tokens=max_tokens).resolved({})
    return Row(tuple(prompt), params, stop_ids)


def run(batch: StaticBatch, rows: int) -> list[list[RowToken]]:
    """Returns the tokens of each row."""
    out: list[list[RowToken]] = [[] for _ in range(rows)]
    for tokens in batch:
        assert tokens
        for row, token in tokens.items():
            out[row].append(token)
    return out


def ids(tokens: Sequence[RowToken]) -> list[int]:
    return [token.token_id for token in tokens]


@pytest.mark.parametrize(
    ("size", "smallest", "step"),
    [(1, 1, 1), (2, 1, 2), (3, 1, 4), (16, 16, 16), (17, 16, 32), (5, 16, 16), (129, 128, 256)],
)
def test_the_ladder_has_powers_of_two_from_a_smallest_one(
    size: int, smallest: int, step: int
) -> None:
    assert at_least(size, smallest) == step


def test_a_batch_that_outgrows_its_bucket_gives_the_tokens_of_one_loop(
    steps: Steps, expected: list[list[int]]
) -> None:
    # Three rows run as four; 16 slots of prompts and 24 tokens do not fit in 32.
    found = run(StaticBatch(steps, [greedy(prompt) for prompt in PROMPTS]), 3)
    assert [ids(row) for row in found] == expected
    for row in found:
        assert [token.last for token in row] == [False] * (COUNT - 1) + [True]
        assert not any(token.stopped for token in row)


def test_every_row_has_its_own_length(steps: Steps, expected: list[list[int]]) -> None:
    rows = [greedy(p, n) for p, n in zip(PROMPTS, (1, 5, 3), strict=True)]
    found = run(StaticBatch(steps, rows), 3)
    assert [ids(row) for row in found] == [expected[0][:1], expected[1][:5], expected[2][:3]]
    assert [row[-1].last for row in found] == [True, True, True]


def test_a_finished_row_yields_nothing_more(steps: Steps, expected: list[list[int]]) -> None:
    batch = StaticBatch(steps, [greedy(prompt, 8) for prompt in PROMPTS])
    found: list[list[int]] = [[], [], []]
    for tokens in batch:
        for row, token in tokens.items():
            found[row].append(token.token_id)
        if len(found[1]) == 2:
            batch.finish(1)
    assert found == [expected[0][:8], expected[1][:2], expected[2][:8]]


def test_a_batch_without_rows_left_ends(steps: Steps) -> None:
    batch = StaticBatch(steps, [greedy(prompt) for prompt in PROMPTS])
    steps_seen = 0
    for tokens in batch:
        steps_seen += 1
        for row in tokens:
            batch.finish(row)
    assert steps_seen == 1


def test_a_stop_token_is_marked_and_the_last(steps: Steps, expected: list[list[int]]) -> None:
    row = expected[1]
    end = next(i for i in range(2, COUNT) if row[i] not in row[:i])
    rows = [greedy(p, 16, (row[end],) if p == PROMPTS[1] else ()) for p in PROMPTS]
    found = run(StaticBatch(steps, rows), 3)
    assert ids(found[1]) == row[: end + 1]
    assert [t.stopped for t in found[1]] == [t.last for t in found[1]] == [False] * end + [True]
    assert ids(found[0]) == expected[0][:16]


def test_logprobs_and_sample_index_are_the_rows_own(program: Program, params: Params) -> None:
    asked, indices = (None, 0, 2, 1), (0, 1, 0, 2)
    rows = [
        Row(
            PROMPTS[0],
            SamplingParams(seed=7, temperature=1.5, max_tokens=6, logprobs=count).resolved({}),
            sample_index=index,
        )
        for count, index in zip(asked, indices, strict=True)
    ]
    first, other, same, third = run(StaticBatch(CompiledSteps(program, params), rows), 4)
    assert ids(first) == ids(same)
    assert ids(first) != ids(other) != ids(third) != ids(first)
    assert {token.logprob for token in first} == {None}
    for row, count in ((other, 0), (same, 2), (third, 1)):
        for token in row:
            assert token.logprob is not None
            assert token.logprob.token_id == token.token_id
            top = [logprob for _, logprob in token.logprob.top]
            assert len(top) == count
            assert top == sorted(top, reverse=True)
            assert all(token.logprob.logprob <= logprob < 0 for logprob in top[:1])


def test_prompts_of_one_bucket_share_one_program(
    program: Program, params: Params, caplog: pytest.LogCaptureFixture
) -> None:
    steps = Steps(program, params)

    def one(length: int, max_tokens: int) -> int:
        """Returns the number of programs that were compiled for a prompt of this length."""
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING, logger="jax"):
            run(StaticBatch(steps, [greedy(range(1, length + 1), max_tokens)]), 1)
        return sum(record.getMessage().startswith("Compiling ") for record in caplog.records)

    assert one(3, 4) >= 2  # the first step and those that follow
    assert [one(length, 2 * length) for length in (1, 2, 7)] == [0, 0, 0]
    assert one(16, 3) == 0
    ((what, seconds),) = steps.reports
    assert what == "prefill of 1 x 16 tokens and decode for 1 rows x 32 slots"
    assert seconds > 0
