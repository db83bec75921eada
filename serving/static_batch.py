"""Drives the functional core from the host: a fixed batch of rows, token by token.

    steps = CompiledSteps(program, params)
    batch = StaticBatch(steps, [Row(prompt=(1, 5, 7), params=params, stop_ids=(0,))])
    for tokens in batch:                      # {row: RowToken} of the rows that still run
        ...                                   # batch.finish(row) ends one early

Shapes come from short ladders, so nothing compiles again per token or per prompt length.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxserve.layers.decoder import Params
from jaxserve.serving.generation import Program, Progress, Prompts, advance, start
from jaxserve.serving.request import SamplingParams, TokenLogprob
from jaxserve.serving.sampler import Sampled, Sampling

MAX_ROWS = 32
"""Rows of one batch; more prompts run as several batches."""

MIN_PROMPT = 16
MIN_SLOTS = 128


@dataclass(frozen=True)
class Row:
    """One completion to make.

    Attributes:
        prompt: token ids, at least one.
        params: resolved parameters with seed and max_tokens.
        stop_ids: tokens that end the row.
        sample_index: which of the prompt's `n` completions it is.
    """

    prompt: tuple[int, ...]
    params: SamplingParams
    stop_ids: tuple[int, ...] = ()
    sample_index: int = 0


class RowToken(NamedTuple):
    """A token of one row: `stopped` marks a stop token, `last` the row's last token."""

    token_id: int
    stopped: bool
    last: bool
    logprob: TokenLogprob | None


def at_least(size: int, smallest: int) -> int:
    """Returns the ladder step for `size`: a power of two, at least `smallest`."""
    return max(smallest, 1 << (size - 1).bit_length())


CompileReport = Callable[[str, float], None]
"""Called with what was compiled and the seconds it took."""


class CompiledSteps:
    """The executables of one program, one per bucket; itself the only writer of that table."""

    def __init__(
        self, program: Program, params: Params, report: CompileReport | None = None
    ) -> None:
        self.program = program
        self.params = params
        self._report = report
        self._start = jax.jit(partial(start, program), static_argnames="slots")
        self._advance = jax.jit(partial(advance, program), donate_argnums=1)
        self._grow = jax.jit(_grown, static_argnums=1)
        self._executables: dict[Any, Any] = {}

    def start(self, prompts: Prompts, sampling: Sampling, slots: int) -> tuple[Sampled, Progress]:
        """Returns the first tokens; see `generation.start`."""
        key = ("start", slots, _shapes((prompts, sampling)))
        if key not in self._executables:
            self._compile_pair(key, prompts, sampling, slots)
        return self._executables[key](self.params, prompts, sampling)

    def advance(self, progress: Progress) -> tuple[Sampled, Progress]:
        """Returns the next tokens; `progress` is used up. See `generation.advance`."""
        key = ("advance", _shapes(progress))
        if key not in self._executables:
            began = time.perf_counter()
            self._executables[key] = self._advance.lower(self.params, progress).compile()
            self._tell(f"decode for {_size(progress)}", began)
        return self._executables[key](self.params, progress)

    def grow(self, progress: Progress, slots: int) -> Progress:
        """Returns the batch with room for `slots` tokens a row."""
        return self._grow(progress, slots)

    def decode_programs(self) -> list[str]:
        """Returns the compiled decode steps as HLO text, for profiles."""
        return [run.as_text() for key, run in self._executables.items() if key[0] == "advance"]

    def _compile_pair(self, key: Any, prompts: Prompts, sampling: Sampling, slots: int) -> None:
        """Compiles a first step and, at the same time, the steps that follow it."""
        began = time.perf_counter()
        first = self._start.lower(self.params, prompts, sampling, slots=slots)
        with ThreadPoolExecutor(max_workers=1) as thread:
            compiling = thread.submit(first.compile)
            after = jax.tree.map(
                lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), first.out_info[1]
            )
            follow = ("advance", _shapes(after))
            if follow not in self._executables:
                self._executables[follow] = self._advance.lower(self.params, after).compile()
            self._executables[key] = compiling.result()
        rows, length = prompts.tokens.shape
        self._tell(f"prefill of {rows} x {length} tokens and decode for {_size(after)}", began)

    def _tell(self, what: str, began: float) -> None:
        if self._report is not None:
            self._report(what, time.perf_counter() - began)


class StaticBatch:
    """Rows that start together. Iterating yields one dict of tokens per step.

    A step is dispatched before the tokens of the one before are read, so the host's work hides
    behind the device's; what surplus steps draw for finished rows is dropped.
    """

    def __init__(self, steps: CompiledSteps, rows: Sequence[Row]) -> None:
        self._steps = steps
        self._rows = tuple(rows)
        self._live = set(range(len(rows)))
        self._drawn = 0

    def finish(self, row: int) -> None:
        """Ends a row; no further token of it is yielded."""
        self._live.discard(row)

    def __iter__(self) -> Iterator[dict[int, RowToken]]:
        prompts, sampling, slots = self._begin()
        used = prompts.tokens.shape[1]
        sampled, progress = self._steps.start(prompts, sampling, slots)
        yield self._collect(sampled)
        pending: Sampled | None = None
        longest = max(row.params.max_tokens or 1 for row in self._rows)
        for _ in range(longest - 1):
            if not self._live:
                return
            if used + 2 > slots:
                slots *= 2
                progress = self._steps.grow(progress, slots)
            sampled, progress = self._steps.advance(progress)
            used += 1
            if pending is not None:
                yield self._collect(pending)
            pending = sampled
        if pending is not None and self._live:
            yield self._collect(pending)

    def _begin(self) -> tuple[Prompts, Sampling, int]:
        """Returns prompts and sampling state padded to the ladder, and the cache's room."""
        batch = at_least(len(self._rows), 1)
        rows = [*self._rows, *[self._rows[0]] * (batch - len(self._rows))]
        length = at_least(max(len(row.prompt) for row in rows), MIN_PROMPT)
        tokens: Any = np.zeros((batch, length), np.int32)
        for index, row in enumerate(rows):
            tokens[index, : len(row.prompt)] = row.prompt
        lengths: Any = np.array([len(row.prompt) for row in rows], np.int32)
        sampling = Sampling.create(
            [row.params for row in rows],
            [row.prompt for row in rows],
            [row.stop_ids for row in rows],
            self._steps.program.model.config.vocab_size,
            [row.sample_index for row in rows],
        )
        slots = at_least(length + 2, MIN_SLOTS)
        return Prompts(tokens, lengths), sampling, slots

    def _collect(self, sampled: Sampled) -> dict[int, RowToken]:
        """Returns the tokens of the rows that run, and ends those that reach their last."""
        host = jax.device_get(sampled)
        self._drawn += 1
        out: dict[int, RowToken] = {}
        for index in sorted(self._live):
            params = self._rows[index].params
            stopped = bool(host.stopped[index])
            last = stopped or self._drawn >= (params.max_tokens or 1)
            token = int(host.tokens[index])
            out[index] = RowToken(token, stopped, last, _logprob(host, index, params))
            if last:
                self._live.discard(index)
        return out


def _logprob(host: Sampled, row: int, params: SamplingParams) -> TokenLogprob | None:
    if params.logprobs is None:
        return None
    assert host.logprobs is not None
    assert host.top_tokens is not None
    assert host.top_logprobs is not None
    top = zip(
        host.top_tokens[row, : params.logprobs].tolist(),
        host.top_logprobs[row, : params.logprobs].tolist(),
        strict=True,
    )
    return TokenLogprob(int(host.tokens[row]), float(host.logprobs[row]), tuple(top))


def _grown(progress: Progress, slots: int) -> Progress:
    return replace(progress, cache=progress.cache.grown(slots))


def _shapes(tree: Any) -> Any:
    """Returns a hashable summary of shapes, dtypes and structure."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves)


def _size(progress: Any) -> str:
    rows, slots = progress.cache.slot_positions.shape
    return f"{rows} rows x {slots} slots"
