"""jaxserve as one of the engines that `decode.py` compares; see `protocol.py`.

python -m benchmarks.peers.ours
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

import jaxserve
from benchmarks.peers.protocol import Sample, serve
from benchmarks.step_profile import share_by_part
from jaxserve.serving.request import SamplingParams
from jaxserve.serving.static_batch import Row, StaticBatch


class Ours:
    """The loop under `LLM.generate`, token ids in and out."""

    def load(self, model: Path, threads: int) -> dict[str, Any]:
        """Loads the checkpoint; XLA takes one thread per core it may run on."""
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
        began = time.perf_counter()
        llm = jaxserve.load(model, show="silent")
        self.steps = llm.steps
        self.vocab_size = llm.config.vocab_size
        return {
            "seconds": time.perf_counter() - began,
            "engine": "jaxserve",
            "version": f"jaxserve {jaxserve.__version__}, jax {jax.__version__}",
            "settings": f"bfloat16, {self.steps.program.kernels.backend} kernels",
            "threads": threads,
        }

    def prefill(self, prompts: list[list[int]]) -> Sample:
        """Times reading all prompts and choosing one token for each."""
        began = time.perf_counter()
        ids, _ = self._run(prompts, 1)
        return Sample(time.perf_counter() - began, sum(map(len, prompts)), ids)

    def decode(self, prompts: list[list[int]], tokens: int) -> Sample:
        """Times `tokens` greedy tokens for each prompt after its first."""
        ids, seconds = self._run(prompts, 1 + tokens)
        return Sample(seconds, len(prompts) * tokens, ids)

    def profile(self, prompts: list[list[int]], tokens: int) -> dict[str, float]:
        """Returns the share of a decode step's processor time that each part takes."""
        batch = StaticBatch(self.steps, _rows(prompts, 1 + tokens))
        return share_by_part(self.steps, batch)

    def _run(self, prompts: list[list[int]], count: int) -> tuple[list[int], float]:
        """Returns the first row's ids and the seconds from its first token to its last."""
        ids: list[int] = []
        first = 0.0
        for tokens in StaticBatch(self.steps, _rows(prompts, count)):
            ids.append(tokens[0].token_id)
            if len(ids) == 1:
                first = time.perf_counter()
        return ids, time.perf_counter() - first


def _rows(prompts: Sequence[Sequence[int]], count: int) -> list[Row]:
    params = SamplingParams(temperature=0, max_tokens=count).resolved({})
    return [Row(tuple(prompt), params) for prompt in prompts]


if __name__ == "__main__":
    serve(Ours())
