"""llama.cpp as a peer, through the low-level API of llama-cpp-python.

    python -m benchmarks.peers.llama_cpp

A step is one `llama_decode` of a batch with one token for each sequence, as in llama.cpp's own
batched benchmark. All settings that touch speed are llama.cpp's defaults.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import time
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from benchmarks.peers.protocol import Sample, serve, vocab_size
from benchmarks.peers.to_gguf import write_gguf


class LlamaCpp:
    """A bfloat16 GGUF file; every sequence has its own stream of the KV cache."""

    def load(self, model: Path, threads: int) -> dict[str, Any]:
        path = write_gguf(model)
        start = time.perf_counter()
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        if not self.model:
            raise RuntimeError(f"llama.cpp could not load {path}; see its log on standard error")
        self.threads = threads
        self.vocab_size = vocab_size(model)
        return {
            "seconds": time.perf_counter() - start,
            "engine": "llama.cpp",
            "version": f"llama-cpp-python {importlib.metadata.version('llama-cpp-python')}",
            "settings": "llama_decode, bfloat16 GGUF, f16 cache, a stream per sequence",
            "system": llama_cpp.llama_print_system_info().decode(),
            "threads": threads,
        }

    def prefill(self, prompts: list[list[int]]) -> Sample:
        with Context(self, len(prompts), len(prompts[0])) as context:
            start = time.perf_counter()
            first = context.read(prompts)
            seconds = time.perf_counter() - start
        return Sample(seconds, sum(map(len, prompts)), [int(first[0])])

    def decode(self, prompts: list[list[int]], tokens: int) -> Sample:
        with Context(self, len(prompts), len(prompts[0]) + tokens) as context:
            ids = context.read(prompts)
            output = [int(ids[0])]
            start = time.perf_counter()
            for position in range(len(prompts[0]), len(prompts[0]) + tokens):
                ids = context.step(ids, position)
                output.append(int(ids[0]))
            seconds = time.perf_counter() - start
        return Sample(seconds, len(prompts) * tokens, output)


class Context:
    """A fresh KV cache for `num_seqs` sequences of at most `length` tokens each, freed on exit."""

    def __init__(self, engine: LlamaCpp, num_seqs: int, length: int) -> None:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = num_seqs * length
        params.n_batch = num_seqs * length
        params.n_seq_max = num_seqs
        params.n_threads = params.n_threads_batch = engine.threads
        params.kv_unified = False
        self.vocab_size = engine.vocab_size
        self.context = llama_cpp.llama_init_from_model(engine.model, params)
        if not self.context:
            raise RuntimeError(
                f"llama.cpp refused {num_seqs} sequences of {length} tokens; see standard error"
            )
        self.batch = llama_cpp.llama_batch_init(num_seqs * length, 0, 1)

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *exc_info: object) -> None:
        llama_cpp.llama_batch_free(self.batch)
        llama_cpp.llama_free(self.context)

    def read(self, prompts: list[list[int]]) -> np.ndarray:
        """Returns the first token of each prompt, int64[num_seqs]."""
        self.batch.n_tokens = 0
        for sequence, prompt in enumerate(prompts):
            for position, token in enumerate(prompt):
                self._add(token, position, sequence, wanted=position == len(prompt) - 1)
        ends = np.cumsum([len(prompt) for prompt in prompts]) - 1
        return self._run(ends)

    def step(self, ids: np.ndarray, position: int) -> np.ndarray:
        """Returns each sequence's next token, int64[num_seqs], given `ids` at `position`."""
        self.batch.n_tokens = 0
        for sequence, token in enumerate(ids.tolist()):
            self._add(token, position, sequence, wanted=True)
        return self._run(np.arange(len(ids)))

    def _add(self, token: int, position: int, sequence: int, wanted: bool) -> None:
        """Appends one token to the batch; `wanted` asks for its logits."""
        i = self.batch.n_tokens
        self.batch.token[i] = token
        self.batch.pos[i] = position
        self.batch.n_seq_id[i] = 1
        self.batch.seq_id[i][0] = sequence
        self.batch.logits[i] = wanted
        self.batch.n_tokens = i + 1

    def _run(self, rows: np.ndarray) -> np.ndarray:
        """Returns the greedy token of each of the batch's `rows` after running the batch."""
        status = llama_cpp.llama_decode(self.context, self.batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status} for {self.batch.n_tokens} tokens")
        logits = (self._logits(row) for row in rows.tolist())
        return np.array([row.argmax() for row in logits])

    def _logits(self, row: int) -> np.ndarray:
        """Returns the logits of one row of the batch, float32[V], in llama.cpp's memory."""
        pointer = llama_cpp.llama_get_logits_ith(self.context, row)
        floats = ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float * self.vocab_size))
        return np.frombuffer(floats.contents, np.float32)


if __name__ == "__main__":
    serve(LlamaCpp())
