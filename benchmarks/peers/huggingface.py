"""Hugging Face transformers as a peer: `generate` in bfloat16 with PyTorch's fused attention.

    python -m benchmarks.peers.huggingface

`generate` makes every step itself; a streamer notes the time of each.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.streamers import BaseStreamer

from benchmarks.peers.protocol import Sample, TraceTask, serve


class StepClock(BaseStreamer):
    """Notes when each step's tokens reach the host.

    `generate` calls `put` once for the prompt, then for every step.
    """

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing to flush."""


class HuggingFace:
    """`generate` with its default growing cache."""

    cache_implementation: str | None = None

    def load(self, model: Path, threads: int) -> dict[str, Any]:
        torch.set_num_threads(threads)
        start = time.perf_counter()
        self.model = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
        return {
            "seconds": time.perf_counter() - start,
            "engine": "Hugging Face transformers",
            "version": f"transformers {transformers.__version__}, torch {torch.__version__}",
            "settings": "generate, bfloat16, sdpa, dynamic cache",
            "threads": torch.get_num_threads(),
        }

    def prefill(self, prompts: list[list[int]]) -> Sample:
        start = time.perf_counter()
        ids, _ = self._generate(prompts, 1)
        return Sample(time.perf_counter() - start, sum(map(len, prompts)), ids)

    def decode(self, prompts: list[list[int]], tokens: int) -> Sample:
        ids, times = self._generate(prompts, 1 + tokens)
        # times: the prompt, the first token, then the `tokens` that are measured.
        return Sample(times[-1] - times[1], len(prompts) * tokens, ids)

    @torch.inference_mode()
    def trace(self, task: TraceTask) -> Sample:
        """Times static batches: requests as they come, padded on the left, to the longest's end."""
        size = task.batch or len(task.prompts)
        first: list[int] = []
        start = time.perf_counter()
        for at in range(0, len(task.prompts), size):
            prompts = task.prompts[at : at + size]
            longest = max(task.outputs[at : at + size])
            width = max(map(len, prompts))
            ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
            out = self.model.generate(
                ids, attention_mask=mask, generation_config=self._config(longest)
            )
            first = first or out[0, width:].tolist()
        seconds = time.perf_counter() - start
        return Sample(seconds, sum(task.outputs), first[: task.outputs[0]])

    def _config(self, count: int) -> GenerationConfig:
        """Returns greedy generation of exactly `count` tokens."""
        return GenerationConfig(
            do_sample=False,
            max_new_tokens=count,
            eos_token_id=None,
            pad_token_id=0,
            cache_implementation=self.cache_implementation,
        )

    @torch.inference_mode()
    def _generate(self, prompts: list[list[int]], count: int) -> tuple[list[int], list[float]]:
        """Returns the first row's `count` new ids and the time of each step."""
        ids = torch.tensor(prompts)
        clock = StepClock()
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=self._config(count),
            streamer=clock,
        )
        return out[0, ids.shape[1] :].tolist(), clock.times


if __name__ == "__main__":
    serve(HuggingFace())
