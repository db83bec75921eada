"""vLLM's CPU backend as a peer: its offline `LLM`, stepped by hand to tell prefill from decode.

    python -m benchmarks.peers.vllm_cpu

Set up as vLLM's CPU documentation asks: libtcmalloc and Intel's OpenMP are preloaded, and the
OpenMP threads are bound to cores, one each. The engine lives in this process: its scheduler and
its worker as separate processes would poll each other on the cores that compute, and go on for a
second after each call, into the next engine's turn.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.peers.protocol import Sample, TraceTask, serve

if TYPE_CHECKING:
    from vllm import LLM

TCMALLOC = "libtcmalloc_minimal.so.4"
KV_CACHE_GIB = 2


class Vllm:
    """`LLM` in bfloat16, compiled as it does by default, prefix caching off."""

    llm: LLM

    def load(self, model: Path, threads: int) -> dict[str, Any]:
        cores = sorted(os.sched_getaffinity(0))[:threads]
        if len(cores) < threads:
            raise ValueError(
                f"threads={threads} exceeds the cores of this process; use at most {len(cores)}"
            )
        os.environ |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
            # What vLLM gives its worker process, which does not exist here.
            "OMP_NUM_THREADS": str(threads),
            "KMP_AFFINITY": f"granularity=fine,explicit,proclist=[{','.join(map(str, cores))}]",
            "KMP_BLOCKTIME": "5",
            "KMP_TPAUSE": "0",
        }
        import torch  # reads the environment, as vLLM does
        from vllm import LLM

        start = time.perf_counter()
        self.llm = LLM(
            str(model),
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=2048,
            enable_prefix_caching=False,
        )
        return {
            "seconds": time.perf_counter() - start,
            "engine": "vLLM CPU",
            "version": f"vllm-cpu {importlib.metadata.version('vllm-cpu')}",
            "settings": "LLM in one process, bfloat16, compiled, no prefix cache, "
            "tcmalloc and iomp5 preloaded",
            "threads": torch.get_num_threads(),
        }

    def prefill(self, prompts: list[list[int]]) -> Sample:
        start = time.perf_counter()
        rows, _ = self._generate(prompts, 1)
        return Sample(time.perf_counter() - start, sum(map(len, prompts)), rows[0])

    def decode(self, prompts: list[list[int]], tokens: int) -> Sample:
        rows, steps = self._generate(prompts, 1 + tokens)
        first = next(i for i, (_, counts) in enumerate(steps) if min(counts) > 0)
        seconds = steps[-1][0] - steps[first][0]
        return Sample(seconds, sum(steps[-1][1]) - sum(steps[first][1]), rows[0])

    def trace(self, task: TraceTask) -> Sample:
        """Times one call of `LLM.generate` with all requests."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in task.prompts]
        params = [
            SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
            for count in task.outputs
        ]
        start = time.perf_counter()
        done = self.llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        rows = [list(request.outputs[0].token_ids) for request in done]
        if [len(row) for row in rows] != task.outputs:
            raise RuntimeError("vLLM generated other numbers of tokens than it was asked for")
        return Sample(seconds, sum(map(len, rows)), rows[0])

    def _generate(
        self, prompts: list[list[int]], count: int
    ) -> tuple[list[list[int]], list[tuple[float, list[int]]]]:
        """Returns each prompt's `count` new ids and, after each step, (time, ids of each)."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0.0,
            max_tokens=count,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        engine = self.llm.llm_engine
        rows: dict[str, list[int]] = {}
        for i, prompt in enumerate(prompts):
            rows[str(i)] = []
            engine.add_request(str(i), TokensPrompt(prompt_token_ids=prompt), params)
        steps = []
        while engine.has_unfinished_requests():
            for output in engine.step():
                rows[output.request_id] += output.outputs[0].token_ids
            steps.append((time.perf_counter(), [len(row) for row in rows.values()]))
        return list(rows.values()), steps


def preload() -> None:
    """Starts this process again with libtcmalloc and libiomp5 preloaded, unless it has them."""
    libraries = [find_tcmalloc(), Path(sys.prefix) / "lib" / "libiomp5.so"]
    for library in libraries:
        if not library.exists():
            raise FileNotFoundError(f"{library} is missing; see benchmarks/peers/README.md")
    wanted = ":".join(map(str, libraries))
    if os.environ.get("LD_PRELOAD") != wanted:
        os.execve(sys.executable, sys.orig_argv, {**os.environ, "LD_PRELOAD": wanted})


def find_tcmalloc() -> Path:
    """Returns where the system keeps libtcmalloc."""
    folders = [Path("/usr/lib/x86_64-linux-gnu"), Path("/usr/lib64"), Path("/usr/lib")]
    return next((f / TCMALLOC for f in folders if (f / TCMALLOC).exists()), folders[0] / TCMALLOC)


if __name__ == "__main__":
    preload()
    serve(Vllm())
