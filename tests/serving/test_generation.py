"""The functional core against its own whole-sequence logits, one token at a time."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from jaxserve.errors import UsageError
from jaxserve.layers.decoder import Params
from jaxserve.serving.generation import (
    Generated,
    Program,
    Prompts,
    advance,
    generate,
    logits,
    start,
)
from jaxserve.serving.request import SamplingParams
from jaxserve.serving.sampler import Sampling

from .conftest import VOCAB, Continuation, Continue

# The first two rows are greedy, the third draws for the prompt of the first.
PROMPTS = [(3, 14, 15), (9, 2, 6, 5, 3, 5, 8), (3, 14, 15)]
ROWS = [
    SamplingParams(temperature=0.0, logprobs=0),
    SamplingParams(temperature=0.0, logprobs=0),
    SamplingParams(temperature=1.3, seed=4, logprobs=0),
]
LENGTH, SLOTS, COUNT = 8, 32, 10

compiled = jax.jit(generate, static_argnames=("program", "slots", "max_tokens"))
compiled_start = jax.jit(start, static_argnames=("program", "slots"))
compiled_advance = jax.jit(advance, static_argnames="program")
compiled_logits = jax.jit(logits, static_argnames="program")


def padded(prompts: Sequence[Sequence[int]], filler: int = 0) -> Prompts:
    tokens = np.full((len(prompts), LENGTH), filler, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    return Prompts(jnp.asarray(tokens), jnp.array([len(p) for p in prompts]))


def sampling(rows: Sequence[int], stops: Sequence[Sequence[int]]) -> Sampling:
    resolved = [ROWS[row].resolved({}) for row in rows]
    # Written as one token that a row cannot draw, so that every state has the same shape.
    stops = [stop or (VOCAB,) for stop in stops]
    return Sampling.create(resolved, [PROMPTS[row] for row in rows], stops, VOCAB)


def run(
    program: Program,
    params: Params,
    stops: Sequence[Sequence[int]] = ((), (), ()),
    slots: int = SLOTS,
) -> Generated:
    """Returns what the loop on the device generates for all rows."""
    state = sampling(range(3), stops)
    return jax.device_get(compiled(program, params, padded(PROMPTS), state, slots, COUNT))


class Hosted:
    """A loop on the host over some of the rows. Its constructor writes it."""

    def __init__(self, program: Program, params: Params, rows: Sequence[int]) -> None:
        # What stands in the padding does not matter.
        prompts = padded([PROMPTS[row] for row in rows], filler=7)
        state = sampling(rows, [()] * len(rows))
        sampled, self.progress = compiled_start(program, params, prompts, state, slots=SLOTS)
        drawn = [sampled]
        for _ in range(COUNT - 1):
            sampled, self.progress = compiled_advance(program, params, self.progress)
            drawn.append(sampled)
        self.tokens = np.stack([step.tokens for step in drawn], axis=1)
        self.logprobs = np.stack([np.asarray(step.logprobs) for step in drawn], axis=1)


@pytest.fixture(scope="module")
def expected(continued: Continue) -> list[Continuation]:
    """Returns the continuations of the greedy rows."""
    return [continued(prompt, COUNT) for prompt in PROMPTS[:2]]


def test_the_greedy_continuation_is_that_of_whole_sequences(
    program: Program, params: Params, expected: list[Continuation]
) -> None:
    found = run(program, params)
    assert found.lengths.tolist() == [COUNT] * 3
    assert found.logprobs is not None
    for row, (tokens, logprobs) in enumerate(expected):
        assert found.tokens[row].tolist() == tokens
        np.testing.assert_allclose(found.logprobs[row], logprobs, atol=1e-5)
        assert len(set(tokens)) > 3  # not one token over and over


def test_the_steps_of_a_host_loop_are_those_of_the_device_loop(
    program: Program, params: Params
) -> None:
    found, wanted = Hosted(program, params, range(3)), run(program, params)
    assert wanted.logprobs is not None
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    np.testing.assert_allclose(found.logprobs, wanted.logprobs, atol=1e-5)
    assert found.progress.positions.tolist() == [len(p) + COUNT - 1 for p in PROMPTS]


@pytest.mark.parametrize("row", range(3))
def test_a_row_alone_goes_on_as_in_a_batch(program: Program, params: Params, row: int) -> None:
    alone = Hosted(program, params, [row])
    np.testing.assert_array_equal(alone.tokens[0], run(program, params).tokens[row])


def test_the_room_of_the_cache_changes_no_token(program: Program, params: Params) -> None:
    wider = run(program, params, slots=2 * SLOTS)
    np.testing.assert_array_equal(wider.tokens, run(program, params).tokens)


def test_a_row_ends_with_its_stop_token(program: Program, params: Params) -> None:
    whole = run(program, params)
    row = whole.tokens[0].tolist()
    end = next(i for i in range(2, COUNT) if row[i] not in row[:i])
    found = run(program, params, stops=[(row[end],), (), ()])
    assert found.lengths.tolist() == [end + 1, COUNT, COUNT]
    assert found.tokens[0].tolist() == row[: end + 1] + [-1] * (COUNT - end - 1)
    np.testing.assert_array_equal(found.tokens[1:], whole.tokens[1:])
    assert found.logprobs is not None
    assert whole.logprobs is not None
    np.testing.assert_array_equal(found.logprobs[0, end + 1 :], 0)
    np.testing.assert_array_equal(found.logprobs[0, : end + 1], whole.logprobs[0, : end + 1])


def test_the_loop_ends_with_its_last_row(program: Program, params: Params) -> None:
    calls: list[int] = []

    def counted(*args: Any, **options: Any) -> Any:
        jax.debug.callback(lambda: calls.append(1))
        return program.kernels.write_and_attend(*args, **options)

    counting = replace(program, kernels=replace(program.kernels, write_and_attend=counted))
    first = run(program, params).tokens[:, 0].tolist()
    found = run(counting, params, stops=[(token,) for token in first])
    jax.effects_barrier()
    assert found.tokens[:, 0].tolist() == first
    assert (found.tokens[:, 1:] == -1).all()
    assert len(calls) == program.model.config.num_layers  # the prompts, and no step after them


def test_an_equal_program_is_not_traced_again(program: Program, params: Params) -> None:
    traces: list[int] = []

    def counted(*args: Any) -> Array:
        traces.append(1)
        return program.kernels.matmul(*args)

    kernels = replace(program.kernels, matmul=counted)
    tokens = np.zeros((1, 2), np.int32)
    compiled_logits(replace(program, kernels=kernels), params, tokens)
    once = len(traces)
    again = replace(program, kernels=replace(kernels), model=replace(program.model))
    compiled_logits(again, params, tokens)
    assert len(traces) == once > 0


def test_a_cache_that_is_too_short_is_refused(program: Program, params: Params) -> None:
    prompts, state = padded(PROMPTS[:1]), sampling([0], [()])
    with pytest.raises(UsageError, match="slots=12 cannot hold prompts of 8 tokens and max_tok"):
        generate(program, params, prompts, state, 12, 5)
    with pytest.raises(UsageError, match="slots=7 cannot hold prompts of 8 tokens"):
        start(program, params, prompts, state, 7)
