"""Hugging Face transformers as a peer, compiled: `torch.compile` over a static cache.

    python -m benchmarks.peers.huggingface_compiled

The first calls compile, for a minute or more each.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.peers.huggingface import HuggingFace
from benchmarks.peers.protocol import serve


class HuggingFaceCompiled(HuggingFace):
    """`generate` with a compiled forward pass and a cache of fixed length."""

    cache_implementation = "static"

    def load(self, model: Path, threads: int) -> dict[str, Any]:
        answer = super().load(model, threads)
        self.model.forward = torch.compile(self.model.forward)
        return {**answer, "settings": "generate, bfloat16, sdpa, static cache, torch.compile"}


if __name__ == "__main__":
    serve(HuggingFaceCompiled())
