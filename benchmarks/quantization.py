"""What rounding costs in loss, and what it gives in speed on this machine's processor.

    python benchmarks/quantization.py --stdlib /usr/lib/python3.12      # where `tiny` learnt from
    python benchmarks/quantization.py --out benchmarks/results/quantization.json

Loss is that of `tiny` on the modules it never saw. Speed is decoding one sequence with a
135M-parameter Llama shape through the engine, and its weights' products alone; choices take turns,
and ratios are medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import machine  # noqa: E402  (the repository's root comes first)
from benchmarks.peers.model import write_checkpoint  # noqa: E402
from benchmarks.peers.ours import Ours  # noqa: E402
from benchmarks.peers.protocol import random_prompts  # noqa: E402
from jaxserve import load  # noqa: E402
from jaxserve.checkpoint import inspect, load_params  # noqa: E402
from jaxserve.checkpoint.locate import locate  # noqa: E402
from jaxserve.layers.decoder import Model  # noqa: E402
from jaxserve.layers.linear import linear  # noqa: E402
from jaxserve.layers.param import Declare, Weight, size_of  # noqa: E402
from jaxserve.pallas_kernels import kernel_set  # noqa: E402
from jaxserve.partitioning.collectives import LocalComm  # noqa: E402
from jaxserve.serving.model_files import kv_rounding, quantization  # noqa: E402
from jaxserve.training.corpus import read_corpus  # noqa: E402
from jaxserve.training.dataset import encode_documents  # noqa: E402
from jaxserve.training.objective import held_out_loss  # noqa: E402

CHOICES = (None, "w8a8")
ROUNDED = {
    "bf16": (None, None),
    "int8": ("int8", None),
    "w8a8": ("w8a8", None),
    "int8 KV": (None, "int8"),
    "fp8 KV": (None, "fp8"),
    "w8a8, int8 KV": ("w8a8", "int8"),
}
"""What is rounded of weights and activations, and of keys and values."""
EXPERTS = ("mixtral", "qwen3_moe")
WINDOW = 256
BATCHES = (1,)
PROMPT_TOKENS, DECODE_TOKENS = 128, 64


def main() -> None:
    """Measures and prints one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--stdlib", type=Path, help="default: that of the running Python")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--every", type=int, default=1, help="of the held-out windows, one in N")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    result = {
        "benchmark": "quantization",
        **machine.facts(),
        "loss": losses(options.stdlib, options.every),
        "experts": experts(),
        "speed": speeds(options.rounds),
    }
    text = json.dumps(result, indent=1)
    if options.out is not None:
        options.out.write_text(text + "\n")
    print(text)


def losses(stdlib: Path | None, every: int) -> dict[str, Any]:
    """Returns nats per token of `tiny` on held-out text, and by how much each choice is worse."""
    tokenizer = Tokenizer.from_file(str(locate("tiny") / "tokenizer.json"))
    held_out = np.asarray(encode_documents(read_corpus(stdlib).held_out, tokenizer))
    info, found = inspect(locate("tiny")), {}
    for key, (weights, kv) in ROUNDED.items():
        began = time.perf_counter()
        rounded, kept = quantization(weights, info), kv_rounding(kv)
        model = Model(info.config, Declare(info.dtype, quantize=rounded, kv_dtype=kept))
        found[key] = held_out_loss(model, load_params(info, model), held_out, WINDOW, every)
        sys.stderr.write(f"{key}: {found[key]:.5f} in {time.perf_counter() - began:.0f} s\n")
    whole = found["bf16"]
    return {
        "model": "tiny",
        "held_out_tokens": int(held_out.size),
        "window": WINDOW,
        "every": every,
        "nats_per_token": {key: round(loss, 5) for key, loss in found.items()},
        "worse_by": {key: round(loss / whole - 1, 5) for key, loss in found.items()},
    }


def experts() -> dict[str, Any]:
    """Returns nats per token of tiny models with experts, on the distribution of the unrounded.

    Their weights are random: what they predict is what Hugging Face's float32 logits say.
    """
    found = {}
    for name in EXPERTS:
        directory = ROOT / "tests" / "golden" / name
        golden = load_file(directory / "golden.safetensors")
        wanted = jax.nn.softmax(jnp.asarray(golden["logits"]))
        nats = {}
        for choice in (None, "int8", "w8a8"):
            llm = load(directory, dtype="float32", quantize=choice)
            chances = jax.nn.log_softmax(jnp.asarray(llm.logits(golden["prompt.0"])))
            nats[choice or "float32"] = -float(jnp.mean(jnp.sum(wanted * chances, axis=-1)))
        whole = nats["float32"]
        found[name] = {
            "nats_per_token": {key: round(loss, 5) for key, loss in nats.items()},
            "worse_by": {key: round(loss / whole - 1, 5) for key, loss in nats.items()},
        }
    return found


def speeds(rounds: int) -> dict[str, Any]:
    """Returns tokens per second by batch, and milliseconds of the weights' products alone."""
    model = write_checkpoint(ROOT / "build" / "llama-135m")
    engines: dict[str, Ours] = {}
    for choice in CHOICES:
        engines[name(choice)] = ours = Ours()
        ours.load(model, len(os.sched_getaffinity(0)), choice)
    chains = {key: chain(ours) for key, ours in engines.items()}
    rates: dict[str, dict[str, list[float]]] = {}
    for turn in range(-1, rounds):  # the first turn warms up
        for batch in BATCHES:
            prompts = random_prompts(batch, PROMPT_TOKENS, engines["bf16"].vocab_size, max(turn, 0))
            for key, ours in engines.items():
                sample = ours.decode(prompts, DECODE_TOKENS)
                if turn >= 0:
                    of_task = rates.setdefault(f"decode {batch} x {DECODE_TOKENS}", {})
                    of_task.setdefault(key, []).append(sample.tokens / sample.seconds)
        for key, run in chains.items():
            seconds = run()
            if turn >= 0:
                of_task = rates.setdefault("products of all weights, 2 rows", {})
                of_task.setdefault(key, []).append(1 / seconds)
    return {
        "model": "Llama shape, 135M parameters, random weights, bfloat16 activations",
        "rounds": rounds,
        "per_s": {
            task: {key: round(statistics.median(found), 2) for key, found in of_task.items()}
            for task, of_task in rates.items()
        },
        "over_bf16": {task: dict(_ratios(of_task)) for task, of_task in rates.items()},
    }


def chain(ours: Ours) -> Callable[[], float]:
    """Returns a function that times, in seconds, the products of all weights with two rows.

    What is rounded in a step, activations too, is rounded here.
    """
    program, params = ours.llm.program, plain(ours.llm.params)
    kernels, graph = kernel_set("xla"), nnx.graphdef(program.model.module())

    @jax.jit
    def run(params: Any, rows: dict[int, jax.Array]) -> list[jax.Array]:
        weights = [m for _, m in nnx.iter_modules(nnx.merge(graph, params)) if type(m) is Weight]
        return [
            linear(rows[size_of(w.inputs)].reshape(2, *shape(w)), w, LocalComm(), kernels)
            for w in weights
        ]

    def shape(weight: Weight) -> tuple[int, ...]:
        return tuple(axis.size for axis in weight.inputs)

    weights = [m for _, m in nnx.iter_modules(program.model.module()) if type(m) is Weight]
    rng = np.random.default_rng(0)
    rows = {
        size: jnp.asarray(rng.normal(size=(2, size)), jnp.bfloat16)
        for size in {size_of(weight.inputs) for weight in weights}
    }

    def timed() -> float:
        best = []
        for _ in range(10):
            began = time.perf_counter()
            jax.block_until_ready(run(params, rows))
            best.append(time.perf_counter() - began)
        return statistics.median(best)

    return timed


def plain(tree: Any) -> Any:
    """Returns a tree of mappings as one of dicts."""
    return {k: plain(v) for k, v in tree.items()} if isinstance(tree, Mapping) else tree


def name(choice: str | None) -> str:
    return "bf16" if choice is None else choice


def _ratios(of_task: dict[str, list[float]]) -> list[tuple[str, float]]:
    whole = of_task[name(None)]
    return [
        (key, round(statistics.median(a / b for a, b in zip(found, whole, strict=True)), 3))
        for key, found in of_task.items()
    ]


if __name__ == "__main__":
    main()
