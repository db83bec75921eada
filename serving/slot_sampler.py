"""The sampler of the running batch: parameters come from the slots.

    tokens = sample_slots(logits, positions, state, slots, needs)    # float32[R, V] -> int32[R]

Parts that no row needs are skipped. What is needed is data (see `slot_state.Needs`), so one program
serves every mix of requests; a row's token depends on its own logits, parameters, seed and position
alone, whatever the others need.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxserve.serving.request import MAX_BAD_WORD_TOKENS
from jaxserve.serving.sampler import Filters, Penalties, Sampling, adjusted, choose, first_largest
from jaxserve.serving.slot_state import NUM_COLUMNS, Column, Needs, SlotState


@jax.jit
def sample_slots(
    logits: Array, positions: Array, state: SlotState, slots: Array, needs: Array
) -> Array:
    """Returns int32[R], the next token of each row.

    Args:
        logits: float32[R, V].
        positions: int32[R], position of the token to be drawn.
        slots: int32[R].
        needs: int32[], `Needs` of all rows together.
    """

    def changed(logits: Array) -> Array:
        return _adjusted(logits, positions, state, slots)

    def drawn(logits: Array) -> Array:
        return choose(logits, positions, _drawing(state, slots, needs))

    logits = lax.cond((needs & Needs.ADJUST) > 0, changed, lambda logits: logits, logits)
    return lax.cond((needs & Needs.DRAW) > 0, drawn, first_largest, logits)


def _adjusted(logits: Array, positions: Array, state: SlotState, slots: Array) -> Array:
    """Returns logits after bias, lists, bad words, minimum length and penalties."""
    rows, vocab = logits.shape
    row = jnp.arange(rows)[:, None]
    params = state.params[slots]
    only_listed = (params[:, Column.ONLY_LISTED] > 0)[:, None]
    own = params[:, Column.HAS_VOCABULARY] > 0
    listed = jnp.where(own[:, None], state.listed_ids[slots], -1)
    at = jnp.where(listed >= 0, listed, vocab)  # past the end: dropped
    bias = jnp.where(jnp.broadcast_to(only_listed, logits.shape), -jnp.inf, 0.0)
    bias = bias.at[row, at].set(state.listed_bias[slots], mode="drop")
    history = state.history[slots]
    column = jnp.arange(history.shape[1])[None, :]
    prompt = params[:, Column.PROMPT_TOKENS][:, None]
    in_prompt = jnp.where(column < prompt, history, vocab)
    in_output = jnp.where((column >= prompt) & (column < positions[:, None]), history, vocab)
    penalties = Penalties(
        state.floats(slots, Column.REPETITION),
        state.floats(slots, Column.PRESENCE),
        state.floats(slots, Column.FREQUENCY),
        jnp.zeros((rows, vocab), bool).at[row, in_prompt].set(True, mode="drop"),
        jnp.zeros((rows, vocab), jnp.int32).at[row, in_output].add(1, mode="drop"),
    )
    sampling = Sampling(
        temperature=None,
        seed=params[:, :2].astype(jnp.uint32),
        sample_index=params[:, Column.SAMPLE_INDEX],
        stop_ids=params[:, Column.FIRST_STOP_ID : NUM_COLUMNS],
        min_tokens=params[:, Column.MIN_TOKENS],
        generated=positions - params[:, Column.PROMPT_TOKENS],
        bias=bias,
        penalties=penalties,
    )
    words = jnp.where(own[:, None, None], state.bad_words[slots], -1)
    banned = _ends_of_bad_words(history, positions, words)
    banned = jnp.where(banned >= 0, banned, vocab)
    return adjusted(logits, sampling).at[row, banned].set(-jnp.inf, mode="drop")


def _ends_of_bad_words(history: Array, positions: Array, words: Array) -> Array:
    """Returns int32[R, W], the last token of each word whose other tokens stand at the end, or -1.

    Args:
        history: int32[R, C], tokens at positions below `positions`.
        words: int32[R, W, M], -1 before a word's start.
    """
    back = jnp.arange(1 - MAX_BAD_WORD_TOKENS, 0)[None, :]
    at = positions[:, None] + back
    recent = jnp.take_along_axis(history, jnp.maximum(at, 0), axis=1)
    recent = jnp.where(at >= 0, recent, -2)[:, None, :]  # nothing stands before the start
    start = words[:, :, :-1]
    matches = jnp.all((start < 0) | (start == jnp.broadcast_to(recent, start.shape)), axis=-1)
    return jnp.where(matches, words[:, :, -1], -1)


def _drawing(state: SlotState, slots: Array, needs: Array) -> Sampling:
    """Returns what `choose` draws with."""
    params = state.params[slots]
    filters = Filters(
        params[:, Column.TOP_K],
        state.floats(slots, Column.TOP_P),
        state.floats(slots, Column.MIN_P),
        needed=(needs & Needs.FILTER) > 0,
    )
    return Sampling(
        temperature=state.floats(slots, Column.TEMPERATURE),
        seed=lax.bitcast_convert_type(
            params[:, Column.SEED_HIGH : Column.SEED_LOW + 1], jnp.uint32
        ),
        sample_index=params[:, Column.SAMPLE_INDEX],
        stop_ids=params[:, Column.FIRST_STOP_ID :],
        min_tokens=params[:, Column.MIN_TOKENS],
        generated=params[:, Column.MIN_TOKENS],
        filters=filters,
    )
