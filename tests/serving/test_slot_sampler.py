"""Sampling from slots: against the functional sampler row by row, and against hand-worked sets."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.serving.request import Request, SamplingParams
from jaxserve.serving.sampler import Sampling, sample
from jaxserve.serving.slot_sampler import sample_slots
from jaxserve.serving.slot_state import (
    Needs,
    SlotState,
    admit,
    admit_vocabulary,
    needs,
    param_row,
    vocabulary_rows,
)

VOCAB = 61
SLOTS = 32
HISTORY = 24
PROMPT = (3, 7, 7, 11)
INF = float("inf")

_draw = jax.jit(sample_slots)
_admit = jax.jit(admit)
_admit_vocabulary = jax.jit(admit_vocabulary)
_functional = jax.jit(sample)


@dataclass(frozen=True)
class Row:
    """A sequence in a slot: what was asked, and its output so far."""

    request: Request
    output: tuple[int, ...] = ()
    sample_index: int = 0

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.request.prompt + self.output


def row(
    output: Sequence[int] = (),
    prompt: Sequence[int] = PROMPT,
    stop_ids: Sequence[int] = (),
    bad_word_ids: Sequence[Sequence[int]] = (),
    sample_index: int = 0,
    **fields: Any,
) -> Row:
    fields = {"seed": 5, "max_tokens": 16, **fields}
    request = Request(
        id="r",
        prompt=tuple(prompt),
        params=SamplingParams(**fields).resolved({}),
        stop_ids=tuple(stop_ids),
        bad_word_ids=tuple(map(tuple, bad_word_ids)),
    )
    return Row(request, tuple(output), sample_index)


def drawn(logits: Any, rows: Sequence[Row]) -> list[int]:
    """Returns the tokens of rows that are in one batch, in slots from the last one down."""
    state = SlotState.create(SLOTS, HISTORY)
    slots = np.arange(SLOTS - 1, SLOTS - 1 - len(rows), -1).astype(np.int32)
    state = _admit(state, slots, np.stack([param_row(r.request, r.sample_index) for r in rows]))
    changed = [(s, r) for s, r in zip(slots, rows, strict=True) if needs(r.request) & Needs.ADJUST]
    for slot, r in changed:
        upload = vocabulary_rows([r.request], [r.tokens], HISTORY)
        state = _admit_vocabulary(state, np.array([slot], np.int32), upload)
    wanted = Needs.NOTHING
    for r in rows:
        wanted |= needs(r.request)
    # Two programs serve every test: batches of SLOTS rows, and a row beside padding.
    size = SLOTS if len(rows) > 2 else 2
    scores = np.zeros((size, np.shape(logits)[1]), np.float32)
    scores[: len(rows)] = logits
    positions = np.array([len(r.tokens) for r in rows] + [0] * (size - len(rows)), np.int32)
    spare = np.full(size - len(rows), SLOTS, np.int32)
    found = _draw(scores, positions, state, np.concatenate([slots, spare]), np.int32(wanted))
    return np.asarray(found)[: len(rows)].tolist()


def functional(logits: Any, rows: Sequence[Row]) -> list[int]:
    """Returns the tokens that `sampler.sample` draws after the rows' outputs."""
    requests = [r.request for r in rows]
    state = Sampling.create(
        [r.params for r in requests],
        [r.prompt for r in requests],
        [r.stop_ids for r in requests],
        VOCAB,
        [r.sample_index for r in rows],
    )
    state = replace(state, generated=np.array([len(r.output) for r in rows], np.int32))
    if state.penalties is not None:
        counts = np.stack([np.bincount(r.output or (0,), minlength=VOCAB) for r in rows])
        counts[[not r.output for r in rows]] = 0
        state = replace(state, penalties=replace(state.penalties, counts=counts.astype(np.int32)))
    positions = np.array([len(r.tokens) for r in rows], np.int32)
    sampled, _ = _functional(np.asarray(logits, np.float32), positions, state)
    return np.asarray(sampled.tokens).tolist()


def scores(count: int, seed: int = 0, vocab: int = VOCAB) -> np.ndarray:
    """Returns float32[count, vocab], with several largest values in some rows."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(count, vocab)).astype(np.float32) * 2
    values[::3] = np.round(values[::3])
    return values


OUTPUT = (11, 5, 5, 9)

EACH: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "temperature": {"temperature": 1.7},
    "cold": {"temperature": 0.3},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.2},
    "all filters": {"top_k": 20, "top_p": 0.9, "min_p": 0.01, "temperature": 1.3},
    "repetition": {"repetition_penalty": 1.8},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": -1.5, "temperature": 0},
    "bias": {"logit_bias": {2: 3.5, 60: -100.0, 0: 1.0}},
    "allowed": {"allowed_token_ids": (0, 4, 9, 60), "logit_bias": {4: 1.0, 5: 90.0}},
    "min_tokens": {"min_tokens": 5, "stop_ids": (1, 60), "temperature": 0},
    "enough tokens": {"min_tokens": 4, "stop_ids": (1, 60), "temperature": 0},
    "everything": {
        "temperature": 1.2,
        "top_k": 40,
        "top_p": 0.95,
        "min_p": 0.005,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.3,
        "logit_bias": {7: 2.0, 11: -1.0},
        "min_tokens": 12,
        "stop_ids": (8,),
    },
}


@pytest.mark.parametrize("fields", EACH.values(), ids=list(EACH))
def test_a_row_draws_what_the_functional_sampler_draws(fields: dict[str, Any]) -> None:
    rows = [
        row(OUTPUT[: seed % 5], sample_index=seed % 3, **{"seed": seed * 2**33 - seed, **fields})
        for seed in range(SLOTS)
    ]
    logits = scores(SLOTS)
    assert drawn(logits, rows) == functional(logits, rows)


def test_rows_of_mixed_needs_draw_what_each_draws_alone() -> None:
    cases = [*EACH.values(), {"temperature": 0, "bad_word_ids": [(4,), (9, 2)]}]
    rows = [row(OUTPUT, seed=seed, **fields) for seed, fields in enumerate(cases)]
    assert {needs(r.request) for r in rows} >= {
        Needs.NOTHING,
        Needs.DRAW,
        Needs.DRAW | Needs.FILTER,
        Needs.ADJUST,
        Needs.DRAW | Needs.ADJUST,
    }
    for seed in range(8):
        logits = scores(len(rows), seed)
        alone = [drawn(logits[i : i + 1], [rows[i]])[0] for i in range(len(rows))]
        assert drawn(logits, rows) == alone
        assert drawn(logits[::-1], rows[::-1]) == alone[::-1]


def test_penalties_count_prompt_and_output_apart() -> None:
    # Token 7 stands twice in the prompt, 5 twice in the output, 11 once in each.
    logits = np.full((3, VOCAB), -9.0)
    logits[:, [5, 7, 11, 20]] = [4.0, 3.9, 3.8, 1.9]
    rows = [
        row(OUTPUT, temperature=0, frequency_penalty=1.0),  # 5: 2.0, 7: 3.9, 11: 2.8
        row(OUTPUT, temperature=0, presence_penalty=0.15),  # 5: 3.85, 7: 3.9, 11: 3.65
        row(OUTPUT, temperature=0, repetition_penalty=2.2),  # 5: 1.82, 7: 1.77, 11: 1.73, 20: 1.9
    ]
    assert drawn(logits, rows) == [7, 7, 20]
    assert drawn(-logits[:1], [row(OUTPUT, temperature=0)]) == [0]  # the lowest of equals


def test_tokens_drawn_later_than_the_position_are_not_counted() -> None:
    # A slot's history keeps what an earlier sequence left behind its own end.
    logits = np.zeros((1, VOCAB))
    logits[0, [5, 6]] = [2.0, 1.9]
    before, after = row(OUTPUT[:1]), row(OUTPUT)
    state = SlotState.create(SLOTS, HISTORY)
    penal = row(OUTPUT[:1], temperature=0, frequency_penalty=1.0)
    state = _admit(state, np.array([0], np.int32), param_row(penal.request, 0)[None])
    upload = vocabulary_rows([penal.request], [after.tokens], HISTORY)
    state = _admit_vocabulary(state, np.array([0], np.int32), upload)
    slots = np.array([0, SLOTS], np.int32)
    wide = np.concatenate([logits, logits]).astype(np.float32)
    found = [
        int(_draw(wide, np.array([len(r.tokens), 0], np.int32), state, slots, Needs.ADJUST)[0])
        for r in (before, after)
    ]
    assert found == [5, 6]


def test_a_slot_keeps_nothing_of_the_sequence_before() -> None:
    # A row that needs no adjusting is not sent lists; it must not use those that lie in its slot.
    logits = np.zeros((2, VOCAB), np.float32)
    logits[:, [4, 5, 6]] = [3.0, 2.0, 1.0]
    before = [
        row((1,), temperature=0, logit_bias={4: -50.0, 6: 50.0}),
        row((1,), temperature=0, bad_word_ids=[(4,)]),
    ]
    assert drawn(logits, before) == [6, 5]
    state = SlotState.create(SLOTS, HISTORY)
    slots = np.array([0, 1], np.int32)
    state = _admit(state, slots, np.stack([param_row(r.request, 0) for r in before]))
    for slot, r in zip(slots, before, strict=True):
        upload = vocabulary_rows([r.request], [r.tokens], HISTORY)
        state = _admit_vocabulary(state, slot[None], upload)
    after = row((1,), temperature=0)
    state = _admit(state, slots, np.stack([param_row(after.request, 0)] * 2))
    positions = np.full(2, len(after.tokens), np.int32)
    assert _draw(logits, positions, state, slots, np.int32(Needs.ADJUST)).tolist() == [4, 4]


def test_filters_leave_the_tokens_worked_out_by_hand() -> None:
    # Probabilities 0.4, 0.3, 0.2, 0.1.
    logits = np.full((SLOTS, VOCAB), -INF)
    logits[:, :4] = np.log([0.4, 0.3, 0.2, 0.1])

    def found(**fields: Any) -> set[int]:
        outputs = [(0,) * (1 + step) for step in range(4)]
        rows = [[row(o, seed=s, **fields) for s in range(SLOTS)] for o in outputs]
        return {token for some in rows for token in drawn(logits, some)}

    assert found() == {0, 1, 2, 3}
    assert found(top_k=2) == {0, 1}
    assert found(top_p=0.65) == {0, 1}
    assert found(top_p=0.75) == {0, 1, 2}
    assert found(min_p=0.45) == {0, 1, 2}
    assert found(min_p=0.8) == {0}
    assert found(top_k=3, logit_bias={0: -100.0}) == {1, 2, 3}
    assert found(allowed_token_ids=(1, 3)) == {1, 3}
    assert found(allowed_token_ids=(1, 3), min_tokens=9, stop_ids=(3,)) == {1}


def test_bad_words_are_never_completed() -> None:
    logits = np.zeros((3, VOCAB))
    logits[:, [4, 2, 6]] = [3.0, 2.0, 1.0]
    fields: dict[str, Any] = {"temperature": 0}
    single = row((1,), bad_word_ids=[(4,)], **fields)
    both = row((1,), bad_word_ids=[(4,), (2,)], **fields)
    assert drawn(logits, [single, both, row((1,), **fields)]) == [2, 6, 4]
    words = [(9, 4), (8, 9, 2), (1, 2, 3, 4, 5, 6, 7, 4)]
    ends = [(0, 9), (8, 9), (9, 8)]
    rows = [row(end, bad_word_ids=words, **fields) for end in ends]
    assert drawn(logits, rows) == [2, 6, 4]
    long = row((1, 2, 3, 4, 5, 6, 7), bad_word_ids=words, **fields)
    longer = row((1, 2, 3, 4, 5, 6, 8), bad_word_ids=words, **fields)
    assert drawn(logits[:2], [long, longer]) == [2, 4]


def test_a_bad_word_may_begin_in_the_prompt_but_not_before_it() -> None:
    logits = np.zeros((3, VOCAB))
    logits[:, [4, 2]] = [3.0, 2.0]
    words = [(0, 0, 4), (9, 4)]
    rows = [
        row((), prompt=(9,), bad_word_ids=words, temperature=0),
        row((), prompt=(0,), bad_word_ids=words, temperature=0),
        row((), prompt=(0, 0), bad_word_ids=words, temperature=0),
    ]
    assert drawn(logits, rows) == [2, 4, 2]


def test_stop_tokens_wait_for_the_minimum() -> None:
    logits = np.zeros((3, VOCAB))
    logits[:, [8, 9, 10]] = [3.0, 2.0, 1.0]
    fields: dict[str, Any] = {"temperature": 0, "stop_ids": (8, 9)}
    rows = [row((0,) * done, min_tokens=2, **fields) for done in (0, 1, 2)]
    assert drawn(logits, rows) == [10, 10, 8]


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_row_without_any_token_left_still_draws_from_the_vocabulary(temperature: float) -> None:
    # What was asked contradicts itself; the other rows, and the pages, must not suffer.
    rows = [
        row(allowed_token_ids=(5,), stop_ids=(5,), min_tokens=9, temperature=temperature),
        row(allowed_token_ids=(5,), bad_word_ids=[(5,)], temperature=temperature),
        row(temperature=0),
    ]
    logits = np.zeros((3, VOCAB))
    logits[:, 7] = 1.0
    found = drawn(logits, rows)
    assert found == [0, 0, 7]
    assert functional(logits[:1], rows[:1]) == [0]


def test_logits_that_are_no_numbers_give_a_token_of_the_vocabulary() -> None:
    logits = np.full((2, VOCAB), np.nan)
    logits[1] = np.linspace(0.0, 1.0, VOCAB)
    cases: list[dict[str, Any]] = [{"temperature": 0}, {"temperature": 1.0}, {"top_p": 0.5}]
    for fields in cases:
        hurt, whole = drawn(logits, [row(**fields)] * 2)
        assert hurt == 0
        assert whole == functional(logits[1:], [row(**fields)])[0]


def test_a_vocabulary_smaller_than_the_lists_is_no_trouble() -> None:
    logits = jnp.zeros((2, 6)).at[:, 3].set(1.0)
    rows = [row(prompt=(1, 3), temperature=0, logit_bias={2: 5.0}), row(prompt=(1,), temperature=0)]
    assert drawn(logits, rows) == [2, 3]
