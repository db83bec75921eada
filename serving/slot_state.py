"""What the device knows of each running sequence, one row ("slot") each.

    state = SlotState.create(num_slots=32, history_tokens=2048)
    row = param_row(request, sample_index=0)                             # NumPy, on the host
    state = admit(state, slots, rows)                    # int32[A], int32[A, NUM_COLUMNS]

Sampling parameters are uploaded once, when a sequence gets its slot; the newest token never
leaves the device on its way into the next step. A spare last row takes what padding writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum, IntFlag
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxserve.serving.request import (
    MAX_ALLOWED_TOKENS,
    MAX_BAD_WORD_FORMS,
    MAX_BAD_WORD_TOKENS,
    MAX_BIASED_TOKENS,
    MAX_STOP_IDS,
    Request,
)

MAX_LISTED_TOKENS = max(MAX_ALLOWED_TOKENS, MAX_BIASED_TOKENS)


class Needs(IntFlag):
    """Parts of the sampler that a row uses; a step runs those that any of its rows uses."""

    NOTHING = 0
    ADJUST = 1  # bias, allowed or bad words, minimum length, penalties
    DRAW = 2
    FILTER = 4
    LOGPROBS = 8
    PROMPT_LOGPROBS = 16


class Column(IntEnum):
    """Columns of `SlotState.params`; floats are kept as their bits."""

    PROMPT_TOKENS = 0
    SEED_HIGH = 1
    SEED_LOW = 2
    SAMPLE_INDEX = 3
    TOP_K = 4
    MIN_TOKENS = 5
    ONLY_LISTED = 6
    HAS_VOCABULARY = 7  # history, listed tokens and bad words are its own, not its predecessor's
    TEMPERATURE = 8
    TOP_P = 9
    MIN_P = 10
    REPETITION = 11
    PRESENCE = 12
    FREQUENCY = 13
    FIRST_STOP_ID = 14


NUM_COLUMNS = Column.FIRST_STOP_ID + MAX_STOP_IDS


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SlotState:
    """State of S slots and a spare one.

    Attributes:
        last_token: int32[S + 1], newest token, not yet in the cache.
        num_cached: int32[S + 1], tokens of the sequence that are in the cache.
        params: int32[S + 1, NUM_COLUMNS], see `Column`.
        history: int32[S + 1, C], tokens of sequences that penalties or bad words look at.
        listed_ids, listed_bias: [S + 1, MAX_LISTED_TOKENS], tokens with a bias of their own, -1
            past the end; where ONLY_LISTED, no other token may be drawn.
        bad_words: int32[S + 1, MAX_BAD_WORD_FORMS, MAX_BAD_WORD_TOKENS], -1 before a word's start.
    """

    last_token: Array
    num_cached: Array
    params: Array
    history: Array
    listed_ids: Array
    listed_bias: Array
    bad_words: Array

    @classmethod
    def create(cls, num_slots: int, history_tokens: int) -> Self:
        """Returns empty slots."""
        rows = num_slots + 1
        return cls(
            last_token=jnp.zeros(rows, jnp.int32),
            num_cached=jnp.zeros(rows, jnp.int32),
            params=jnp.zeros((rows, NUM_COLUMNS), jnp.int32),
            history=jnp.zeros((rows, history_tokens), jnp.int32),
            listed_ids=jnp.full((rows, MAX_LISTED_TOKENS), -1, jnp.int32),
            listed_bias=jnp.zeros((rows, MAX_LISTED_TOKENS), jnp.float32),
            bad_words=jnp.full((rows, MAX_BAD_WORD_FORMS, MAX_BAD_WORD_TOKENS), -1, jnp.int32),
        )

    def floats(self, slots: Array, column: Column) -> Array:
        """Returns float32[R], a column of the rows `slots`."""
        return lax.bitcast_convert_type(self.params[slots, column], jnp.float32)


class Vocabulary(NamedTuple):
    """Uploads of the rows that need more than scalars; int32 and float32 by slot.

    Attributes:
        history: int32[A, C].
        listed_ids, listed_bias: [A, MAX_LISTED_TOKENS].
        bad_words: int32[A, MAX_BAD_WORD_FORMS, MAX_BAD_WORD_TOKENS].
    """

    history: Any
    listed_ids: Any
    listed_bias: Any
    bad_words: Any


def admit(state: SlotState, slots: Array, params: Array) -> SlotState:
    """Returns the state with parameters int32[A, NUM_COLUMNS] in `slots` int32[A]."""
    return replace(state, params=state.params.at[slots].set(params))


def admit_vocabulary(state: SlotState, slots: Array, rows: Vocabulary) -> SlotState:
    """Returns the state with history, listed tokens and bad words in `slots` int32[A]."""
    return replace(
        state,
        history=state.history.at[slots].set(rows.history),
        listed_ids=state.listed_ids.at[slots].set(rows.listed_ids),
        listed_bias=state.listed_bias.at[slots].set(rows.listed_bias),
        bad_words=state.bad_words.at[slots].set(rows.bad_words),
    )


def needs(request: Request) -> Needs:
    """Returns the parts of the sampler that a request uses."""
    p = request.params
    penalties = p.repetition_penalty != 1 or p.presence_penalty or p.frequency_penalty
    lists = p.logit_bias or p.allowed_token_ids or request.bad_word_ids
    found = Needs.NOTHING
    if penalties or lists or p.min_tokens:
        found |= Needs.ADJUST
    if not p.greedy:
        found |= Needs.DRAW
        if p.top_k or p.top_p != 1 or p.min_p:
            found |= Needs.FILTER
    if p.logprobs is not None or request.beam_width > 1:
        found |= Needs.LOGPROBS
    if p.prompt_logprobs is not None:
        found |= Needs.PROMPT_LOGPROBS
    return found


def param_row(request: Request, sample_index: int) -> np.ndarray:
    """Returns int32[NUM_COLUMNS], the scalars and stop tokens of a request."""
    p = request.params
    row = np.full(NUM_COLUMNS, -1, np.int32)
    words = np.array([p.seed or 0], np.int64).view(np.uint32)  # low word first
    largest = np.iinfo(np.int32).max
    row[: Column.TEMPERATURE] = [
        len(request.prompt),
        words[1].view(np.int32),
        words[0].view(np.int32),
        sample_index,
        min(p.top_k or 0, largest),
        min(p.min_tokens or 0, largest),
        bool(p.allowed_token_ids),
        bool(needs(request) & Needs.ADJUST),
    ]
    row[Column.TEMPERATURE : Column.FIRST_STOP_ID] = np.array(
        [
            p.temperature,
            p.top_p,
            p.min_p,
            p.repetition_penalty,
            p.presence_penalty,
            p.frequency_penalty,
        ],
        np.float32,
    ).view(np.int32)
    row[Column.FIRST_STOP_ID : Column.FIRST_STOP_ID + len(request.stop_ids)] = request.stop_ids
    return row


def vocabulary_rows(
    requests: Sequence[Request], tokens: Sequence[Sequence[int]], history_tokens: int
) -> Vocabulary:
    """Returns the uploads of sequences whose tokens so far are `tokens`.

    Of a sequence longer than `history_tokens` its beginning is kept.
    """
    rows = len(requests)
    out = Vocabulary(
        np.zeros((rows, history_tokens), np.int32),
        np.full((rows, MAX_LISTED_TOKENS), -1, np.int32),
        np.zeros((rows, MAX_LISTED_TOKENS), np.float32),
        np.full((rows, MAX_BAD_WORD_FORMS, MAX_BAD_WORD_TOKENS), -1, np.int32),
    )
    for row, (request, known) in enumerate(zip(requests, tokens, strict=True)):
        early = known[:history_tokens]
        out.history[row, : len(early)] = early
        p = request.params
        listed = p.allowed_token_ids or tuple(p.logit_bias)
        out.listed_ids[row, : len(listed)] = listed
        out.listed_bias[row, : len(listed)] = [p.logit_bias.get(token, 0.0) for token in listed]
        for index, word in enumerate(request.bad_word_ids):
            out.bad_words[row, index, -len(word) :] = word
    return out
