"""One serving step as a pure function: packed tokens of many sequences in, one token a row out.

    compiled = jax.jit(partial(serving_step, program, shape, geometry), donate_argnums=(1, 2))
    result, pages, state = compiled(params, pages, state, packed)

The step reads the newest token of rows that decode from `SlotState` and leaves the next one there,
so a step can be dispatched before the host has seen the result of the one before.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxserve.layers.decoder import Output, Params, forward, logits_of
from jaxserve.layers.step import Step
from jaxserve.partitioning.layout import Stage
from jaxserve.serving.batch import Batch, StepShape, positions_of, unpack
from jaxserve.serving.generation import Program
from jaxserve.serving.kv_cache import CacheGeometry, PagedCache, Pages
from jaxserve.serving.request import MAX_LOGPROBS
from jaxserve.serving.sampler import Processor, logprobs, processed
from jaxserve.serving.scheduler import RowKind
from jaxserve.serving.slot_sampler import sample_slots
from jaxserve.serving.slot_state import Column, Needs, SlotState


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepOutput:
    """What a step sends to the host.

    Attributes:
        tokens: int32[R].
        logprobs, top_logprobs: float32[R], [R, MAX_LOGPROBS]; zeros unless a row asks.
        top_tokens: int32[R, MAX_LOGPROBS].
        prompt_logprobs, prompt_top_logprobs, prompt_top_tokens: the same for each of the T tokens
            and the prompt's token after it.
    """

    tokens: Array
    logprobs: Array
    top_tokens: Array
    top_logprobs: Array
    prompt_logprobs: Array
    prompt_top_tokens: Array
    prompt_top_logprobs: Array


def serving_step(
    program: Program,
    shape: StepShape,
    geometry: CacheGeometry,
    params: Params,
    pages: list[Pages],
    state: SlotState,
    packed: Array,
    processor: Processor | None = None,
) -> tuple[StepOutput, list[Pages], SlotState]:
    """Returns (results, pages, state) of one step; see `batch.pack` for `packed`.

    A processor changes the logits that the tokens of all rows are chosen by.
    """
    program = program.of(shape.decode_only)
    comm = program.comm
    batch = unpack(packed, shape, geometry.widths)
    positions, kv_len = positions_of(batch, state.num_cached)
    row_of_token = batch.rows_of_tokens
    decodes = (batch.kinds == RowKind.DECODE)[row_of_token]
    slot_of_token = batch.slots[row_of_token]
    tokens = jnp.where(decodes, state.last_token[slot_of_token], batch.tokens)
    prompt = state.params[slot_of_token, Column.PROMPT_TOKENS]
    step = Step(tokens, positions, jnp.where(positions < prompt, prompt, positions + 1))
    own = partial(comm.tokens, stage=Stage.QUERY)
    cache = PagedCache(
        pages,
        tuple(own(table) for table in batch.tables),
        own(batch.row_of_token),
        own(batch.q_start),
        own(kv_len),
        geometry,
        shape.decode_only,
    )
    rows = comm.spread_rows(jnp.maximum(batch.ends - 1, 0))
    output, cache = forward(
        program.model,
        params,
        step,
        cache,
        comm,
        program.kernels,
        rows=rows,
        target=Stage.SAMPLED,
    )
    mine = partial(comm.tokens, stage=Stage.SAMPLED)
    with jax.named_scope("sample"):
        spread = [mine(comm.spread_rows(x)) for x in (kv_len, batch.slots)]
        logits = output.logits
        if processor is not None:
            logits = processed(processor, logits, state.history[spread[1]], spread[0])
        drawn = sample_slots(logits, spread[0], state, spread[1], batch.needs)
    scores = _logprobs(output.logits, drawn, batch.needs)
    drawn, *scores = (comm.gather_rows(x)[: batch.slots.shape[0]] for x in (drawn, *scores))
    result = StepOutput(
        drawn,
        *scores,
        *_prompt_logprobs(program, params, output, batch, tokens),
    )
    return result, cache.pages, _advanced(state, batch, drawn, kv_len)


def _advanced(state: SlotState, batch: Batch, drawn: Array, kv_len: Array) -> SlotState:
    """Returns the slots after the step; rows in the middle of a prompt keep their last token."""
    spare = state.last_token.shape[0] - 1
    samples = batch.kinds != RowKind.CHUNK
    drawing = jnp.where(samples, batch.slots, spare)
    at = jnp.minimum(kv_len, state.history.shape[1] - 1)
    return replace(
        state,
        last_token=state.last_token.at[drawing].set(drawn),
        num_cached=state.num_cached.at[batch.slots].set(kv_len),
        history=state.history.at[drawing, at].set(drawn),
    )


def _logprobs(logits: Array, drawn: Array, needs: Array) -> tuple[Array, Array, Array]:
    """Returns log-probabilities of the drawn and the likeliest tokens, or zeros."""
    rows = logits.shape[0]

    def wanted(logits: Array) -> tuple[Array, Array, Array]:
        return logprobs(logits, drawn, min(MAX_LOGPROBS, logits.shape[1]))

    def unwanted(logits: Array) -> tuple[Array, Array, Array]:
        return _zeros(rows, min(MAX_LOGPROBS, logits.shape[1]))

    return lax.cond((needs & Needs.LOGPROBS) > 0, wanted, unwanted, logits)


def _prompt_logprobs(
    program: Program, params: Params, output: Output, batch: Batch, tokens: Array
) -> tuple[Array, Array, Array]:
    """Returns log-probabilities of the token after each token, R tokens at a time, or zeros."""
    size, rows, comm = tokens.shape[0], batch.slots.shape[0], program.comm
    count = min(MAX_LOGPROBS, program.model.config.vocab_size)
    blocks = -(-size // rows)

    def block(of: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        at, following = (comm.spread_rows(x) for x in of)
        logits = logits_of(
            program.model, params, output.hidden, at, comm, program.kernels, Stage.SAMPLED
        )
        found = logprobs(logits, comm.tokens(following, Stage.SAMPLED), count)
        chosen, top_tokens, top_logprobs = (comm.gather_rows(x)[:rows] for x in found)
        return chosen, top_tokens, top_logprobs

    def wanted() -> tuple[Array, Array, Array]:
        ends = jnp.where(batch.counts > 0, batch.ends - 1, size)
        after = jnp.roll(tokens, -1).at[ends].set(batch.next_tokens, mode="drop")
        index = jnp.minimum(jnp.arange(blocks * rows, dtype=jnp.int32), size - 1)
        following = after[index].reshape(blocks, rows)
        chosen, top_tokens, top_logprobs = lax.map(block, (index.reshape(blocks, rows), following))
        return (
            chosen.reshape(-1)[:size],
            top_tokens.reshape(-1, count)[:size],
            top_logprobs.reshape(-1, count)[:size],
        )

    return lax.cond((batch.needs & Needs.PROMPT_LOGPROBS) > 0, wanted, lambda: _zeros(size, count))


def _zeros(rows: int, count: int) -> tuple[Array, Array, Array]:
    floats = jnp.zeros((rows, count), jnp.float32)
    return jnp.zeros(rows, jnp.float32), jnp.zeros((rows, count), jnp.int32), floats
