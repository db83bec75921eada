"""From logits to tokens, every sampling parameter, row by row, on the device.

    sampling = Sampling.create([params], prompts=[[1, 5, 7]], stop_ids=[(0,)], vocab_size=V)
    sampled, sampling = sample(logits, positions, sampling)       # logits: float32[B, V]

The order is that of the field: bias, minimum length, penalties, temperature, min-p, top-k,
top-p, draw. A row's token depends on its own logits, parameters, seed and position alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxserve.errors import UsageError
from jaxserve.layers.sums import row_max, row_sum
from jaxserve.serving.request import GREEDY_BELOW, SamplingParams

Processor = Callable[[Array, Array], Array]
"""Function of logits float32[B, V] and the tokens before them int32[B, C], -1 past their end, row
by row; it gives the logits that tokens are chosen by. C may be any number from their length on."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Penalties:
    """What penalties need to know of earlier tokens.

    Attributes:
        repetition, presence, frequency: float32[B].
        in_prompt: bool[B, V], tokens of the prompt.
        counts: int32[B, V], occurrences in the output.
    """

    repetition: Array
    presence: Array
    frequency: Array
    in_prompt: Array
    counts: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Filters:
    """Parameters that cut off unlikely tokens.

    Attributes:
        top_k: int32[B].
        top_p, min_p: float32[B].
        needed: bool[], whether they cut off anything in any row; None where that is known.
    """

    top_k: Array
    top_p: Array
    min_p: Array
    needed: Array | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampling:
    """Sampling parameters and state of a batch. Parts that no row uses are None.

    Attributes:
        temperature: float32[B]; None when all rows are greedy.
        seed: uint32[B, 2], high and low word.
        sample_index: int32[B], which of `n` completions the row is.
        stop_ids: int32[B, M], tokens that end the row, -1 for none.
        min_tokens: int32[B].
        generated: int32[B], tokens drawn so far.
        bias: float32[B, V].
        num_logprobs: likeliest tokens to report; None reports nothing.
    """

    temperature: Array | None
    seed: Array
    sample_index: Array
    stop_ids: Array
    min_tokens: Array
    generated: Array
    bias: Array | None = None
    penalties: Penalties | None = None
    filters: Filters | None = None
    num_logprobs: int | None = field(default=None, metadata={"static": True})

    @classmethod
    def create(
        cls,
        rows: Sequence[SamplingParams],
        prompts: Sequence[Sequence[int]],
        stop_ids: Sequence[Sequence[int]],
        vocab_size: int,
        sample_indices: Sequence[int] | None = None,
    ) -> Self:
        """Returns the state before the first token.

        Args:
            rows: resolved parameters with seeds, one per row.
            prompts: token ids, which the repetition penalty looks at.
            stop_ids: tokens that end each row.
        """
        batch = len(rows)
        greedy = all(p.greedy for p in rows)
        asked = [p.logprobs for p in rows if p.logprobs is not None]
        return cls(
            temperature=None if greedy else _floats(rows, "temperature"),
            seed=_words([p.seed or 0 for p in rows]),
            sample_index=_column(sample_indices or [0] * batch),
            stop_ids=_padded(stop_ids),
            min_tokens=_ints(rows, "min_tokens"),
            generated=_column([0] * batch),
            bias=_bias(rows, vocab_size),
            penalties=_penalties(rows, prompts, vocab_size),
            filters=None if greedy else _filters(rows),
            num_logprobs=max(asked) if asked else None,
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampled:
    """Tokens of one step.

    Attributes:
        tokens: int32[B].
        stopped: bool[B], the token ends its row.
        logprobs: float32[B], of the chosen token before bias, penalties and temperature; or None.
        top_tokens, top_logprobs: [B, num_logprobs], likeliest first; or None.
    """

    tokens: Array
    stopped: Array
    logprobs: Array | None = None
    top_tokens: Array | None = None
    top_logprobs: Array | None = None


@jax.named_scope("sample")
def sample(
    logits: Array, positions: Array, sampling: Sampling, chosen_by: Array | None = None
) -> tuple[Sampled, Sampling]:
    """Returns (tokens, state after them).

    Args:
        logits: float32[B, V].
        positions: int32[B], position in its sequence of the token to be drawn.
        chosen_by: float32[B, V], what a processor made of the logits.
    """
    chosen_by = logits if chosen_by is None else chosen_by
    tokens = choose(adjusted(chosen_by, sampling), positions, sampling).astype(jnp.int32)
    is_stop = jnp.any(sampling.stop_ids == tokens[:, None], axis=1)
    stopped = is_stop & (sampling.generated >= sampling.min_tokens)
    after = replace(
        sampling,
        generated=sampling.generated + 1,
        penalties=_counted(sampling.penalties, tokens),
    )
    return reported(logits, tokens, stopped, sampling.num_logprobs), after


def processed(processor: Processor, logits: Array, tokens: Array, lengths: Array) -> Array:
    """Returns float32[B, V], what a processor makes of logits.

    Args:
        tokens: int32[B, C], those before the one to be drawn at indices below lengths int32[B].
    """
    column = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
    seen = jnp.where(column < lengths[:, None], tokens, -1)
    return jnp.asarray(processor(logits, seen), jnp.float32)


def check_processor(processor: Processor, vocab_size: int) -> None:
    """Checks a processor, before it is compiled into anything.

    Raises:
        UsageError: it is no function, or gives no logits.
    """
    if not callable(processor):
        raise UsageError(f"processor={processor!r:.80} is no function of logits and tokens")
    logits = jax.ShapeDtypeStruct((2, vocab_size), jnp.float32)
    found = jax.eval_shape(processor, logits, jax.ShapeDtypeStruct((2, 4), jnp.int32))
    if getattr(found, "shape", None) != logits.shape:
        raise UsageError(
            f"the processor makes {found} of logits float32[2, {vocab_size}]; give back logits of "
            "that shape"
        )


def adjusted(logits: Array, sampling: Sampling) -> Array:
    """Returns logits with bias, minimum length and penalties applied."""
    batch, vocab = logits.shape
    if sampling.bias is not None:
        logits = logits + sampling.bias
    too_short = (sampling.generated < sampling.min_tokens)[:, None]
    # Without stop tokens the index lies past the end and the update is dropped.
    stops = jnp.where(too_short & (sampling.stop_ids >= 0), sampling.stop_ids, vocab)
    logits = logits.at[jnp.arange(batch)[:, None], stops].set(-jnp.inf, mode="drop")
    if sampling.penalties is None:
        return logits
    p = sampling.penalties
    drawn = p.counts > 0
    repeated = jnp.where(p.in_prompt | drawn, p.repetition[:, None], 1.0)
    logits = jnp.where(logits > 0, logits / repeated, logits * repeated)
    logits = logits - p.frequency[:, None] * p.counts.astype(jnp.float32)
    return logits - p.presence[:, None] * drawn.astype(jnp.float32)


def choose(logits: Array, positions: Array, sampling: Sampling) -> Array:
    """Returns int[B]: the likeliest token of greedy rows, a drawn one of the others."""
    likeliest = first_largest(logits)
    if sampling.temperature is None:
        return likeliest
    greedy = sampling.temperature < GREEDY_BELOW
    scaled = logits / jnp.where(greedy, 1.0, sampling.temperature)[:, None]
    if sampling.filters is not None:
        scaled = _filtered(scaled, sampling.filters)
    weights = jnp.exp(scaled - row_max(scaled))
    # A sum taken in parallel may rise by rounding where the weight is zero: no step there.
    ladder = jnp.where(weights > 0, jnp.cumsum(weights, axis=-1), 0.0)
    goal = _uniform(sampling, positions)[:, None] * row_max(ladder)
    drawn = _first(ladder > goal)
    return jnp.where(greedy, likeliest, drawn)


def first_largest(values: Array) -> Array:
    """Returns int32[B], the first index of the largest of values[B, V].

    `jnp.argmax` as two plain reductions: on CPU five times faster.
    """
    return _first(values == row_max(values))


def _first(marks: Array) -> Array:
    """Returns int32[B], the first index at which marks[B, V] are true; 0 where none is.

    None is where constraints exclude every token, or a logit is no number: a row's own misfortune,
    which must not become a token outside the vocabulary.
    """
    size = marks.shape[1]
    index = lax.broadcasted_iota(jnp.int32, marks.shape, 1)
    first = jnp.min(jnp.where(marks, index, size), axis=-1)
    return jnp.where(first < size, first, 0)


def _uniform(sampling: Sampling, positions: Array) -> Array:
    """Returns float32[B] in [0, 1): a function of seed, sample index and position."""

    def one(seed: Array, index: Array, position: Array) -> Array:
        key = jax.random.wrap_key_data(seed, impl="threefry2x32")
        key = jax.random.fold_in(jax.random.fold_in(key, index), position)
        return jax.random.uniform(key)

    return jax.vmap(one)(sampling.seed, sampling.sample_index, positions)


def _filtered(logits: Array, filters: Filters) -> Array:
    """Returns logits without the tokens that the filters cut off."""

    def cut(logits: Array) -> Array:
        return jnp.where(_kept(logits, filters), logits, -jnp.inf)

    if filters.needed is None:
        return cut(logits)
    return lax.cond(filters.needed, cut, lambda logits: logits, logits)


def _kept(logits: Array, filters: Filters) -> Array:
    """Returns bool[B, V]: tokens that min-p, top-k and then top-p leave."""
    vocab = logits.shape[-1]
    relative = jnp.exp(logits - row_max(logits))
    kept = relative >= filters.min_p[:, None]
    count = jnp.where(filters.top_k > 0, jnp.minimum(filters.top_k, vocab), vocab)
    kept &= largest_until(logits, kept.astype(jnp.float32), count.astype(jnp.float32))
    mass = jnp.where(kept, relative, 0.0)
    total = row_sum(mass)
    # However small top_p is, as a float32 even zero, the likeliest token stays.
    enough = jnp.maximum(filters.top_p * total, jnp.finfo(jnp.float32).tiny)
    nucleus = largest_until(logits, mass, enough)
    return kept & (nucleus | (filters.top_p >= 1.0)[:, None])


def largest_until(values: Array, weights: Array, target: Array) -> Array:
    """Returns bool[B, V]: the fewest largest values whose weights reach `target`.

    Equal values are taken in order of index. All are taken where the target is out of reach.
    Bisection over the ordered bits of a float: 32 sums instead of a sort.

    Args:
        values: float32[B, V].
        weights: float32[B, V], not negative.
        target: float32[B], above zero.
    """
    bits = lax.bitcast_convert_type(values, jnp.int32)
    order = jnp.where(bits >= 0, bits, -(bits & 0x7FFFFFFF))  # -0.0 and 0.0 are equal

    def reached(threshold: Array) -> Array:
        above = jnp.where(order >= threshold[:, None], weights, 0.0)
        return row_sum(above) >= target

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # mean without overflow
        enough = reached(middle)
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    start = (
        jnp.full(values.shape[0], -(2**31), jnp.int32),
        jnp.full(values.shape[0], 2**31 - 1, jnp.int32),
    )
    edge = lax.fori_loop(0, 32, halve, start)[0][:, None]
    above = row_sum(jnp.where(order > edge, weights, 0.0))[:, None]
    tied = jnp.where(order == edge, weights, 0.0)
    before = jnp.cumsum(tied, axis=-1) - tied
    return (order > edge) | ((order == edge) & (above + before < target[:, None]))


def _counted(penalties: Penalties | None, tokens: Array) -> Penalties | None:
    if penalties is None:
        return None
    rows = jnp.arange(tokens.shape[0])
    return replace(penalties, counts=penalties.counts.at[rows, tokens].add(1))


def reported(logits: Array, tokens: Array, stopped: Array, count: int | None) -> Sampled:
    """Returns the tokens with the log-probabilities that are asked for."""
    if count is None:
        return Sampled(tokens, stopped)
    chosen, top_tokens, top_logprobs = logprobs(logits, tokens, count)
    return Sampled(tokens, stopped, chosen, top_tokens, top_logprobs)


def logprobs(logits: Array, tokens: Array, count: int) -> tuple[Array, Array, Array]:
    """Returns log-probabilities float32[B] of `tokens`, and the `count` likeliest tokens.

    These are int32[B, count], likeliest first, and their log-probabilities float32[B, count].
    """
    shifted = logits - row_max(logits)
    all_logprobs = shifted - jnp.log(row_sum(jnp.exp(shifted)))[:, None]
    chosen = jnp.take_along_axis(all_logprobs, tokens[:, None], axis=-1)[:, 0]
    top_logprobs, top_tokens = lax.top_k(all_logprobs, count)
    return chosen, top_tokens, top_logprobs


def _words(seeds: Sequence[int]) -> Any:
    """Returns uint32[B, 2], high and low word of each int64. Like all below, on the host."""
    return np.array([[seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF] for seed in seeds], np.uint32)


def _column(values: Sequence[int]) -> Any:
    return np.asarray(values, np.int32)


def _floats(rows: Sequence[SamplingParams], name: str) -> Any:
    return np.array([getattr(p, name) for p in rows], np.float32)


def _ints(rows: Sequence[SamplingParams], name: str) -> Any:
    largest = np.iinfo(np.int32).max
    return np.array([min(getattr(p, name) or 0, largest) for p in rows], np.int32)


def _padded(stop_ids: Sequence[Sequence[int]]) -> Any:
    """Returns int32[B, M], -1 past the end; M is a power of two, so that few programs differ."""
    longest = max((len(s) for s in stop_ids), default=0)
    width = 1 << max(longest - 1, 0).bit_length()
    return np.array([[*s, *[-1] * (width - len(s))] for s in stop_ids], np.int32)


def _bias(rows: Sequence[SamplingParams], vocab_size: int) -> Any:
    if not any(p.logit_bias or p.allowed_token_ids for p in rows):
        return None
    bias = np.zeros((len(rows), vocab_size), np.float32)
    for row, params in enumerate(rows):
        if params.allowed_token_ids:
            bias[row] = -np.inf
            bias[row, list(params.allowed_token_ids)] = 0.0
        for token, value in params.logit_bias.items():
            bias[row, token] += value
    return bias


def _penalties(
    rows: Sequence[SamplingParams], prompts: Sequence[Sequence[int]], vocab_size: int
) -> Penalties | None:
    neutral = all(
        p.repetition_penalty == 1 and not p.presence_penalty and not p.frequency_penalty
        for p in rows
    )
    if neutral:
        return None
    in_prompt: Any = np.zeros((len(rows), vocab_size), bool)
    counts: Any = np.zeros((len(rows), vocab_size), np.int32)
    for row, prompt in enumerate(prompts):
        in_prompt[row, list(prompt)] = True
    return Penalties(
        _floats(rows, "repetition_penalty"),
        _floats(rows, "presence_penalty"),
        _floats(rows, "frequency_penalty"),
        in_prompt,
        counts,
    )


def _filters(rows: Sequence[SamplingParams]) -> Filters | None:
    if all(not p.top_k and p.top_p == 1 and not p.min_p for p in rows):
        return None
    return Filters(_ints(rows, "top_k"), _floats(rows, "top_p"), _floats(rows, "min_p"))
