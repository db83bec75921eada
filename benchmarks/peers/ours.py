"""jaxserve as one of the engines that `decode.py` compares; see `protocol.py`.

python -m benchmarks.peers.ours
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

import jaxserve
from benchmarks.peers.protocol import Sample, serve
from benchmarks.step_profile import share_by_part
from jaxserve.serving.options import EngineOptions
from jaxserve.serving.request import Request, SamplingParams, TokenEvent


class Ours:
    """The engine under `LLM.generate`, token ids in and out."""

    def load(self, model: Path, threads: int, quantize: str | None = None) -> dict[str, Any]:
        """Loads the checkpoint; XLA takes one thread per core it may run on."""
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
        began = time.perf_counter()
        options = EngineOptions(prefix_cache=False)
        llm = jaxserve.load(model, quantize=quantize, engine=options, show="silent")
        self.llm = llm
        self.vocab_size = llm.config.vocab_size
        return {
            "seconds": time.perf_counter() - began,
            "engine": "jaxserve",
            "version": f"jaxserve {jaxserve.__version__}, jax {jax.__version__}",
            "settings": "engine, bfloat16, xla kernels, no prefix cache, compiled on first use",
            "threads": threads,
        }

    def prefill(self, prompts: list[list[int]]) -> Sample:
        """Times reading all prompts and choosing one token for each."""
        began = time.perf_counter()
        rows, _ = self._run(prompts, 1)
        return Sample(time.perf_counter() - began, sum(map(len, prompts)), rows[0])

    def decode(self, prompts: list[list[int]], tokens: int) -> Sample:
        """Times `tokens` greedy tokens for each prompt after its first."""
        rows, steps = self._run(prompts, 1 + tokens)
        first = next(i for i, (_, counts) in enumerate(steps) if min(counts) > 0)
        seconds = steps[-1][0] - steps[first][0]
        return Sample(seconds, sum(steps[-1][1]) - sum(steps[first][1]), rows[0])

    def profile(self, prompts: list[list[int]], tokens: int) -> dict[str, float]:
        """Returns the share of the processor time of decode steps that each part takes."""
        rows, step = self._submit(prompts, 1 + tokens)
        while not all(rows):
            step()
        programs = self.llm.runner.executables()
        return share_by_part(programs.values(), step)

    def _run(
        self, prompts: list[list[int]], count: int
    ) -> tuple[list[list[int]], list[tuple[float, list[int]]]]:
        """Returns each prompt's `count` new ids and, after each step, (time, ids of each)."""
        rows, step = self._submit(prompts, count)
        steps = []
        while step():
            steps.append((time.perf_counter(), [len(row) for row in rows]))
        return rows, steps

    def _submit(
        self, prompts: Sequence[Sequence[int]], count: int
    ) -> tuple[list[list[int]], Callable[[], bool]]:
        """Returns rows that fill with ids, and the function that makes a step."""
        engine = self.llm.engine
        rows: list[list[int]] = [[] for _ in prompts]
        params = SamplingParams(temperature=0, max_tokens=count, seed=0).resolved({})

        def sink(event: TokenEvent) -> None:
            rows[int(event.request_id)] += event.token_ids

        for index, prompt in enumerate(prompts):
            engine.submit(Request(id=str(index), prompt=tuple(prompt), params=params), sink)
        return rows, engine.step


if __name__ == "__main__":
    serve(Ours())
