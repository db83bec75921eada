"""jaxserve as one of the engines that `throughput.py` compares; see `protocol.py`.

python -m benchmarks.peers.ours_trace
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax

import jaxserve
from benchmarks.peers.protocol import Sample, TraceTask, serve
from jaxserve.benchmark.compiles import CompileCount
from jaxserve.benchmark.metrics import KvWaste, Latencies
from jaxserve.benchmark.run import observe
from jaxserve.benchmark.trace import TraceRequest
from jaxserve.serving.options import EngineOptions

OPTIONS = EngineOptions(max_sequences=64, prefix_cache=False)
"""Without a prefix cache, because rounds repeat the prompts; vLLM's is off, too."""


class OursTrace:
    """The engine under `LLM.generate`; the first run of a trace compiles what the next ones use."""

    def load(self, model: Path, threads: int) -> dict[str, Any]:
        """Loads the checkpoint; XLA takes one thread per core it may run on."""
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
        began = time.perf_counter()
        self.llm = jaxserve.load(model, engine=OPTIONS, show="silent")
        return {
            "seconds": time.perf_counter() - began,
            "engine": "jaxserve",
            "version": f"jaxserve {jaxserve.__version__}, jax {jax.__version__}",
            "settings": f"bfloat16, {OPTIONS.max_sequences} sequences, "
            f"{OPTIONS.max_step_tokens} tokens a step, pages of {OPTIONS.page_size}",
            "threads": threads,
        }

    def trace(self, task: TraceTask) -> Sample:
        """Times all requests, and adds what the engine tells of the run."""
        trace = [
            TraceRequest(tuple(prompt), count, 0.0)
            for prompt, count in zip(task.prompts, task.outputs, strict=True)
        ]
        began = time.perf_counter()
        with CompileCount() as compiles:
            records, samples = observe(self.llm.engine, trace, self.llm.config.max_context_tokens)
        seconds = time.perf_counter() - began
        if [record.output_tokens for record in records] != task.outputs:
            raise RuntimeError("the engine gave other numbers of tokens than it was asked for")
        waste = KvWaste.of(samples)
        gap = self.llm.engine.metrics.host_gap_seconds
        extra = {
            "kv_waste": None if waste is None else asdict(waste),
            "most_running": max((sample.running for sample in samples), default=0),
            "host_gap_s": {"p50": gap.p50, "p99": gap.p99},
            "programs_compiled": compiles.total,
            "latencies_s": asdict(Latencies.of(records)),
        }
        return Sample(seconds, sum(task.outputs), records[0].token_ids, extra)


if __name__ == "__main__":
    serve(OursTrace())
