"""Sampling, row by row, against sorted oracles, hand-worked numbers and expected frequencies."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jaxserve.serving import sampler
from jaxserve.serving.request import SamplingParams
from jaxserve.serving.sampler import Sampled, Sampling, largest_until, sample

INF = float("inf")
UNTIMED = settings(deadline=None, derandomize=True, max_examples=60)

compiled = jax.jit(sample)
compiled_largest = jax.jit(largest_until)


@dataclass
class Batch:
    """Rows that draw together; `state` is written by `draw` alone."""

    state: Sampling
    positions: np.ndarray

    def draw(self, logits: Any) -> Sampled:
        sampled, self.state = compiled(np.asarray(logits, np.float32), self.positions, self.state)
        self.positions = self.positions + 1
        return jax.device_get(sampled)


def batch(
    rows: Sequence[SamplingParams],
    vocab: int,
    prompts: Sequence[Sequence[int]] | None = None,
    stops: Sequence[Sequence[int]] | None = None,
    indices: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
) -> Batch:
    prompts = prompts or [(0,)] * len(rows)
    stops = stops or [()] * len(rows)
    resolved = [row.resolved({}) for row in rows]
    state = Sampling.create(resolved, prompts, stops, vocab, indices)
    at = [len(p) for p in prompts] if positions is None else positions
    return Batch(state, np.asarray(at, np.int32))


def seeded(count: int, **fields: Any) -> list[SamplingParams]:
    return [SamplingParams(seed=seed, **fields) for seed in range(count)]


# Most tests draw for this many rows of eight tokens, and so share one compiled program.
COUNT = 2048


def tokens_drawn(row: Sequence[float], **fields: Any) -> set[int]:
    """Returns the tokens that come up among many draws from one row of at most eight logits."""
    padded = [*row, *[-INF] * (8 - len(row))]
    return set(batch(seeded(COUNT, **fields), 8).draw([padded] * COUNT).tokens.tolist())


# Greedy


def test_greedy_takes_the_lowest_index_of_equal_logits() -> None:
    logits = [[1, 3, 3, 2], [0.0, -0.0, -1, 0.0], [-0.0, 0.0, -1, -2], [-INF, -INF, -5, -INF]]
    alone = batch([SamplingParams(temperature=0)] * 4, 4)
    assert alone.state.temperature is None
    assert alone.draw(logits).tokens.tolist() == [1, 0, 0, 2]
    mixed = batch([*[SamplingParams(temperature=0)] * 4, SamplingParams(seed=1)], 4)
    assert mixed.draw([*logits, [0, 0, 0, 0]]).tokens.tolist()[:4] == [1, 0, 0, 2]


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-9}, {"top_p": 1e-50}])
def test_the_narrowest_filter_is_greedy(narrow: dict[str, Any]) -> None:
    # A few values only, so that most rows have several largest; zeros of both signs.
    rng = np.random.default_rng(0)
    logits = rng.choice([-0.0, 0.0, -1.0, -INF], (COUNT, 8)).astype(np.float32)
    logits[:, 5] = -0.5  # never all -inf
    found = batch(seeded(COUNT, **narrow), 8).draw(logits).tokens
    np.testing.assert_array_equal(found, logits.argmax(axis=1))


# Filters


dyadic = st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0])
values = st.sampled_from([-INF, -3.5, -1.0, -1e-30, -0.0, 0.0, 1e-30, 1.0, 7.0, 1e30])


@UNTIMED
@given(
    st.lists(st.tuples(values, dyadic), min_size=9, max_size=9), st.sampled_from([0.25, 1, 2.5, 8])
)
def test_the_largest_values_are_taken_until_their_weights_reach_the_target(
    pairs: list[tuple[float, float]], target: float
) -> None:
    value, weight = (np.array(column, np.float32)[None] for column in zip(*pairs, strict=True))
    found = compiled_largest(value, weight, np.array([target], np.float32))[0]
    order = sorted(range(9), key=lambda i: (-pairs[i][0], i))
    before = accumulate((pairs[i][1] for i in order), initial=0.0)
    wanted = {i for i, sum_before in zip(order, before, strict=False) if sum_before < target}
    assert set(np.flatnonzero(found)) == wanted


def oracle(logits: np.ndarray, params: SamplingParams) -> set[int]:
    """Returns the tokens that min-p, top-k and top-p leave, by sorting in float64.

    Rejects an example where rounding could decide.
    """
    assert params.temperature and params.top_p is not None and params.min_p is not None
    scaled = logits / params.temperature
    mass = np.exp(scaled - scaled.max())
    assume(np.abs(mass - params.min_p).min() > 1e-4)
    order = [int(i) for i in np.argsort(-scaled, kind="stable") if mass[i] >= params.min_p]
    order = order[: params.top_k or None]
    before = np.concatenate([[0.0], np.cumsum(mass[order])])
    goal = params.top_p * before[-1]
    if params.top_p == 1:
        return set(order)
    assume(np.abs(before - goal).min() > 1e-4)
    return {token for token, sum_before in zip(order, before, strict=False) if sum_before < goal}


@UNTIMED
@given(
    st.lists(st.sampled_from([0.0, -0.0, -0.5, -1.0, -INF]), min_size=7, max_size=7),
    st.sampled_from([0, 1, 2, 3, 6, 7, 20, 2**40]),
    st.floats(0.01, 1.0) | st.just(1.0),
    st.sampled_from([0.0, 0.05, 0.5, 0.8]),
    st.sampled_from([0.5, 1.0, 2.0]),
)
def test_exactly_the_tokens_that_the_filters_leave_are_drawn(
    logits: list[float], top_k: int, top_p: float, min_p: float, temperature: float
) -> None:
    row = np.array([*logits, 0.0], np.float32)
    params = SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p, temperature=temperature)
    # The rarest token left has a probability above 1 in 65: so many draws do not miss it.
    wanted = {token for token in oracle(row.astype(float), params) if np.isfinite(row[token])}
    fields = {"top_k": top_k, "top_p": top_p, "min_p": min_p, "temperature": temperature}
    assert tokens_drawn(row.tolist(), **fields) == wanted


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        # Four equal tokens: half the probability is that of the first two, exactly.
        ({"top_p": 0.5}, {0, 1}),
        ({"top_p": 0.51}, {0, 1, 2}),
        ({"top_k": 3}, {0, 1, 2}),
        ({"min_p": 1.0}, {0, 1, 2, 3}),
        # Top-p is of what top-k left.
        ({"top_k": 2, "top_p": 0.5}, {0}),
        ({}, {0, 1, 2, 3}),
    ],
)
def test_filters_take_equal_tokens_in_order(fields: dict[str, Any], wanted: set[int]) -> None:
    assert tokens_drawn([1.0, 1.0, 1.0, 1.0], **fields) == wanted


def test_rounding_never_draws_a_token_of_no_probability(monkeypatch: pytest.MonkeyPatch) -> None:
    # Sums over prefixes are taken in parallel, so one may exceed the one before it although the
    # weight between them is zero. Aim at just these places.
    rng = np.random.default_rng(0)
    logits = rng.normal(size=2048).astype(np.float32) * 3
    logits[rng.random(2048) < 0.8] = -INF
    sums = np.asarray(jnp.cumsum(jnp.exp(logits - logits.max())[None], axis=-1))[0]
    false_steps = np.flatnonzero((np.diff(sums) > 0) & np.isneginf(logits[1:]))
    goals = (sums[false_steps] / sums[-1]).astype(np.float32)
    aimed = np.concatenate([goals, np.nextafter(goals, 0), np.nextafter(goals, 1)])
    aimed = np.append(aimed, [0.0, 1 - 2**-24]).astype(np.float32)
    monkeypatch.setattr(sampler, "_uniform", lambda *_: aimed)
    rows = batch(seeded(len(aimed)), 2048)
    tiled = np.tile(logits, (len(aimed), 1))
    drawn, _ = jax.jit(lambda *arrays: sample(*arrays))(tiled, rows.positions, rows.state)
    assert len(false_steps) > 0
    assert np.isfinite(logits[drawn.tokens]).all()


# Draws


@pytest.mark.parametrize("varied", ["seed", "position", "sample index"])
@pytest.mark.parametrize(
    ("fields", "weights"),
    [
        ({}, [8, 4, 2, 1, 1]),
        ({"temperature": 0.5}, [64, 16, 4, 1, 1]),
        ({"top_k": 3}, [8, 4, 2, 0, 0]),
    ],
)
def test_tokens_are_drawn_as_often_as_they_should_be(
    varied: str, fields: dict[str, Any], weights: list[int]
) -> None:
    span = range(COUNT)
    alike = [SamplingParams(seed=5, **fields)] * COUNT
    drawn = batch(
        seeded(COUNT, **fields) if varied == "seed" else alike,
        8,
        indices=span if varied == "sample index" else None,
        positions=span if varied == "position" else [9] * COUNT,
    ).draw([[*np.log([8, 4, 2, 1, 1]), -INF, -INF, -INF]] * COUNT)
    seen = np.bincount(drawn.tokens, minlength=5)
    expected = np.array(weights) / sum(weights) * COUNT
    possible = expected > 0
    assert len(seen) == 5
    assert (seen[~possible] == 0).all()
    chi_square = ((seen - expected)[possible] ** 2 / expected[possible]).sum()
    assert chi_square < 30  # four degrees of freedom at most: once in 200,000 by chance


def test_the_same_seed_draws_the_same_tokens() -> None:
    logits = np.zeros((3, 1000))
    rows = [SamplingParams(seed=3), SamplingParams(seed=3), SamplingParams(seed=4)]
    drawing = batch(rows, 1000)
    first, second = drawing.draw(logits).tokens, drawing.draw(logits).tokens
    assert first[0] == first[1] != first[2]
    assert second[0] == second[1]
    assert first[0] != second[0]
    again = batch(rows, 1000)
    np.testing.assert_array_equal(again.draw(logits).tokens, first)


def test_every_bit_of_a_seed_counts() -> None:
    seeds = [0, 1, 2**32, 2**63 - 1, -1, -(2**63)]
    drawn = batch([SamplingParams(seed=s) for s in seeds], 100_000).draw(np.zeros((6, 100_000)))
    assert len(set(drawn.tokens.tolist())) == 6


def test_the_completions_of_one_prompt_differ() -> None:
    # Not even shifted: the second draws at position 8 what no other draws at 9, 7 or 6.
    rows = [SamplingParams(seed=3)] * 8
    indices, positions = [0, 1, 2, 3, 1, 2, 3, 0], [9, 9, 9, 9, 8, 7, 6, 8]
    drawn = batch(rows, 100_000, indices=indices, positions=positions)
    assert len(set(drawn.draw(np.zeros((8, 100_000))).tokens.tolist())) == 8


MIXED = [
    SamplingParams(temperature=0),
    SamplingParams(seed=1),
    SamplingParams(seed=2, temperature=0.7, top_k=9, top_p=0.8, min_p=0.01),
    SamplingParams(
        seed=3,
        repetition_penalty=1.4,
        presence_penalty=0.3,
        frequency_penalty=0.2,
        logit_bias={3: 2.0},
        min_tokens=2,
        logprobs=2,
    ),
]
PROMPTS = [(0, 1), (4,), (5, 6, 7), (3, 8)]
STOPS = [(), (2, 3), (), (1,)]


def test_a_rows_tokens_depend_on_the_row_alone() -> None:
    steps = np.random.default_rng(4).normal(size=(3, 4, 64)).astype(np.float32)

    def tokens(order: Sequence[int]) -> list[list[int]]:
        drawing = batch(
            [MIXED[i] for i in order], 64, [PROMPTS[i] for i in order], [STOPS[i] for i in order]
        )
        return [drawing.draw(step[list(order)]).tokens.tolist() for step in steps]

    together = np.array(tokens([0, 1, 2, 3]))
    np.testing.assert_array_equal(np.array(tokens([3, 2, 1, 0]))[:, ::-1], together)
    for row in range(4):
        np.testing.assert_array_equal(np.array(tokens([row]))[:, 0], together[:, row])


# Adjustments. Tokens: 1 is in the prompt, 2 was drawn twice and 3 once, 0 and 4 are new.

REPEAT, PRESENT, FREQUENT = (
    {"repetition_penalty": 2.0},
    {"presence_penalty": 1.5},
    {"frequency_penalty": 1.5},
)
ALL = {"repetition_penalty": 2.0, "presence_penalty": 0.5, "frequency_penalty": 0.25}


@pytest.mark.parametrize(
    ("fields", "token", "logit", "adjusted"),
    [
        (REPEAT, 1, 4.0, 2.0),
        (REPEAT, 2, 4.0, 2.0),
        (REPEAT, 2, -1.0, -2.0),
        (REPEAT, 0, 4.0, 4.0),
        ({"repetition_penalty": 0.5}, 1, 2.0, 4.0),
        (PRESENT, 2, 3.0, 1.5),
        (PRESENT, 1, 3.0, 3.0),
        ({"presence_penalty": -1.5}, 3, 3.0, 4.5),
        (FREQUENT, 2, 3.0, 0.0),
        (FREQUENT, 3, 3.0, 1.5),
        (FREQUENT, 1, 3.0, 3.0),
        (ALL, 2, 4.0, 4.0 / 2 - 0.5 - 2 * 0.25),
        ({"logit_bias": {0: 1.25}}, 0, 1.0, 2.25),
        (REPEAT | {"logit_bias": {1: 1.0}}, 1, 3.0, (3.0 + 1.0) / 2),
    ],
)
def test_a_logit_is_adjusted_as_worked_out_by_hand(
    fields: dict[str, Any], token: int, logit: float, adjusted: float
) -> None:
    # Another token just below or above the adjusted logit loses or wins.
    rows = batch([SamplingParams(temperature=0, **fields)] * 2, 5, prompts=[(1, 1)] * 2)
    for drawn in (2, 3, 2):
        assert (
            rows.draw([[1e3 * (t == drawn) for t in range(5)]] * 2).tokens.tolist() == [drawn] * 2
        )
    logits = np.full((2, 5), -50.0)
    logits[:, 4] = adjusted - 0.01, adjusted + 0.01
    logits[:, token] = logit
    assert rows.draw(logits).tokens.tolist() == [token, 4]


def test_no_stop_token_is_drawn_before_the_minimum() -> None:
    stops = [(2, 3), (2,), ()]
    fields = [{"min_tokens": 2}, {}, {"min_tokens": 2}]
    rows = batch([SamplingParams(temperature=0, **f) for f in fields], 4, stops=stops)
    # The last row has no stop token; the likeliest of its tokens is the last of all.
    logits = [[0, 1, 3, 2], [0, 1, 3, 2], [0, 1, 2, 3]]
    drawn = [rows.draw(logits) for _ in range(3)]
    assert [d.tokens.tolist() for d in drawn] == [[1, 2, 3], [1, 2, 3], [2, 2, 3]]
    assert [d.stopped.tolist() for d in drawn] == [
        [False, True, False],
        [False, True, False],
        [True, True, False],
    ]


def test_the_minimum_holds_for_draws_and_against_a_bias() -> None:
    fields: dict[str, Any] = {"min_tokens": 1, "logit_bias": {2: 100.0}}
    rows = batch(seeded(64, **fields), 4, stops=[(2,)] * 64)
    assert 2 not in rows.draw(np.zeros((64, 4))).tokens.tolist()
    assert set(rows.draw(np.zeros((64, 4))).tokens.tolist()) == {2}


# Log-probabilities


def test_logprobs_are_those_of_the_model_before_any_adjustment() -> None:
    logits = np.random.default_rng(5).normal(size=(2, 12)) * 3
    logits[1, :2] = 9.0  # equal: the lower index comes first
    fields: dict[str, Any] = {"logit_bias": {7: 100.0}, "repetition_penalty": 3.0}
    rows = batch(
        [
            SamplingParams(temperature=0, logprobs=1, **fields),
            SamplingParams(seed=1, temperature=0.1, top_k=2, logprobs=3),
        ],
        12,
    )
    drawn = rows.draw(logits)
    assert drawn.tokens[0] == 7
    wanted = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert drawn.logprobs is not None
    assert drawn.top_logprobs is not None
    assert drawn.top_tokens is not None
    np.testing.assert_allclose(drawn.logprobs, wanted[[0, 1], drawn.tokens], atol=1e-5)
    likeliest = np.argsort(-logits, axis=1, kind="stable")[:, :3]
    np.testing.assert_array_equal(drawn.top_tokens, likeliest)
    np.testing.assert_allclose(
        drawn.top_logprobs, np.take_along_axis(wanted, likeliest, axis=1), atol=1e-5
    )


def test_no_alternatives_may_be_asked_for() -> None:
    drawn = batch([SamplingParams(temperature=0, logprobs=0)], 3).draw([[0, 0, 0]])
    assert drawn.logprobs is not None
    assert drawn.top_tokens is not None
    np.testing.assert_allclose(drawn.logprobs, -np.log(3), rtol=1e-6)
    assert drawn.top_tokens.shape == (1, 0)


def test_what_no_row_uses_is_left_out_of_the_program() -> None:
    plain = batch(seeded(2), 4).state
    assert (plain.bias, plain.penalties, plain.filters, plain.num_logprobs) == (None,) * 4
    assert batch([SamplingParams(temperature=0, top_k=3)], 4).state.filters is None
    assert batch(seeded(2, top_p=0.5), 4).state.filters is not None
    assert batch(seeded(2, presence_penalty=1), 4).state.penalties is not None


def test_stop_ids_are_padded_to_a_power_of_two() -> None:
    state = batch(seeded(3), 9, stops=[(1,), (2, 3, 4), ()]).state
    wanted = [[1, -1, -1, -1], [2, 3, 4, -1], [-1, -1, -1, -1]]
    np.testing.assert_array_equal(state.stop_ids, wanted)
    assert batch(seeded(2), 9).state.stop_ids.shape == (2, 1)
