"""A whole model on one GPU: decode against its bandwidth bound, and the engine's throughput.

    python benchmarks/model_gpu.py                    # a table, last of all; --json for an object
    python benchmarks/model_gpu.py --backend xla      # XLA's programs instead of our kernels
    python benchmarks/model_gpu.py --small            # a tiny model, interpreted on CPU: no timing

The shape is Llama-3-8B's and the weights are random, made on the device. The bound of a step is the
time in which its weights pass at the bandwidth of a copy, read and written bytes together. Where
torch and transformers are installed and see the GPU, Hugging Face's own model of the same shape
decodes in the same run, compiled and with a cache of fixed length.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if "--small" in sys.argv:
    # The interpreter's threads wait for each other: they need more than a small machine has.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import jax.numpy as jnp
import numpy as np

import jaxserve as js
from benchmarks.kernels_gpu import copy_bandwidth
from jaxserve.config import (
    Activation,
    AttentionSpec,
    KvDtype,
    LayerSpec,
    MlpSpec,
    ModelConfig,
    NormSpec,
    Quantization,
    RopeSpec,
)
from jaxserve.layers.decoder import Model
from jaxserve.layers.param import Declare
from jaxserve.serving.metrics import Distribution
from jaxserve.serving.options import EngineOptions

PROMPT_TOKENS = 128
KINDS: dict[str, tuple[Quantization | None, KvDtype | None]] = {
    "bf16": (None, None),
    "int8": (Quantization.INT8, None),
    "w8a8, int8 keys": (Quantization.W8A8, KvDtype.INT8),
}
"""How weights, and keys and values, are kept."""


def main() -> None:
    """Runs what was asked for and prints the table."""
    options = _options()
    small = options.small
    config = _config(small)
    bandwidth = copy_bandwidth(1 << 20 if small else 1 << 30)
    device = jax.devices()[0]
    result: dict[str, Any] = {
        "benchmark": "model_gpu",
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": device.device_kind,
        "measured": device.platform == "gpu",
        "backend": options.backend,
        "versions": {name: version(name) for name in ("jax", "jaxlib")},
        "copy_bandwidth_gb_s": round(bandwidth / 1e9, 1),
        "decode": [],
        "huggingface": {"skipped": "not reached"},
        "engine": [],
    }
    for kind in KINDS:
        result["decode"].append(decode(config, options, kind, bandwidth))
        _keep(result, options)
    result["huggingface"] = huggingface(config, options)
    _keep(result, options)
    for kind in KINDS:
        for count in [2] if small else [64, 256]:
            result["engine"].append(throughput(config, options, kind, count))
            _keep(result, options)
    print(json.dumps(result, indent=1) if options.json else table(result))


def _keep(result: dict[str, Any], options: argparse.Namespace) -> None:
    """Writes what is there so far: a later part that fails takes nothing with it."""
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--out", type=Path, help="also write the JSON object here")
    parser.add_argument("--small", action="store_true", help="a tiny model, on CPU")
    parser.add_argument("--backend", default="gpu", help="gpu or xla")
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


def _config(small: bool) -> ModelConfig:
    heads, kv_heads, head, ffn, count = (2, 1, 16, 32, 1) if small else (32, 8, 128, 14336, 32)
    layer = LayerSpec(
        AttentionSpec(heads, kv_heads, head, rope=RopeSpec(head, theta=500000.0)),
        MlpSpec(ffn, Activation.SILU, gated=True),
        NormSpec(),
    )
    vocab, context = (64, 64) if small else (128256, 8192)
    layers = (layer,) * count
    return ModelConfig("llama", vocab, heads * head, layers, NormSpec(), max_context_tokens=context)


def made(
    config: ModelConfig, options: argparse.Namespace, kind: str, sequences: int, tokens: int
) -> tuple[js.LLM, int]:
    """Returns a model with random weights made on the device, and the bytes that a step reads."""
    quantize, kv_dtype = KINDS[kind]
    declare = Declare.best(jax.default_backend(), "bfloat16")
    declare = Declare(
        "bfloat16", declare.orientation, fuse=True, quantize=quantize, kv_dtype=kv_dtype
    )
    shapes, tree = jax.tree.flatten(Model(config, declare).abstract_params())
    keys = jax.random.split(jax.random.key(0), len(shapes))
    params = jax.tree.unflatten(tree, [_random(x, k) for x, k in zip(shapes, keys, strict=True)])
    page = 16 if options.small else 64
    kept = 2 * config.layers[0].attention.num_kv_heads * config.layers[0].attention.head_dim
    kept *= len(config.layers) * 2  # bytes of a token in bfloat16, at most
    engine = EngineOptions(
        max_sequences=sequences, page_size=page, prefix_cache=False,
        max_step_tokens=max(16, sequences) if options.small else max(512, 2 * sequences),
        kv_bytes=(sequences + 1) * (-(-tokens // page) + 1) * page * kept,
    )  # fmt: skip
    llm = js.LLM(config, params, declare=declare, backend=options.backend, engine=engine)
    return llm, read_bytes(tree.unflatten(shapes))


def read_bytes(params: Any) -> int:
    """Returns the bytes of the weights that a step reads."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    # The embedding table, of whatever type, is not read, but for one row a token.
    return sum(
        x.size * x.dtype.itemsize
        for path, x in leaves
        if "'embedding'" not in jax.tree_util.keystr(path)
    )


def _random(like: Any, key: jax.Array) -> jax.Array:
    """Returns weights of the size that trained ones have."""
    if like.dtype == jnp.int8:
        return jax.jit(lambda k: jax.random.randint(k, like.shape, -127, 128, jnp.int8))(key)
    if like.dtype == jnp.float32 and len(like.shape) < 2:
        return jnp.full(like.shape, 0.02 / 64, like.dtype)
    if len(like.shape) < 2:
        return jnp.ones(like.shape, like.dtype)
    return jax.jit(lambda k: jax.random.normal(k, like.shape, like.dtype) * 0.02)(key)


def _prompts(config: ModelConfig, count: int, tokens: int) -> list[list[int]]:
    rng = np.random.default_rng(count)
    return rng.integers(0, config.vocab_size, (count, tokens)).tolist()


def decode(
    config: ModelConfig, options: argparse.Namespace, kind: str, bandwidth: float
) -> dict[str, Any]:
    """Returns tokens a second of one sequence, beside the bound."""
    short, long = (1, 3) if options.small else (8, 136)
    prompt = 4 if options.small else PROMPT_TOKENS
    llm, weight_bytes = made(config, options, kind, 1, prompt + long)
    prompts = _prompts(config, 1, prompt)

    def timed(tokens: int) -> float:
        began = time.perf_counter()
        llm.generate(prompts, max_tokens=tokens, temperature=0, ignore_eos=True)
        return time.perf_counter() - began

    timed(long)
    rounds = 1 if options.small else options.rounds
    times = [(timed(long) - timed(short)) / (long - short) for _ in range(rounds)]
    seconds = max(statistics.median(times), 1e-9)
    bound = weight_bytes / bandwidth
    return {
        "kind": kind,
        "tokens_per_s": round(1 / seconds, 2),
        "weight_gb": round(weight_bytes / 1e9, 3),
        "bound_tokens_per_s": round(1 / bound, 2),
        "of_bound": round(bound / seconds, 3),
    }


def throughput(
    config: ModelConfig, options: argparse.Namespace, kind: str, count: int
) -> dict[str, Any]:
    """Returns output tokens a second of many sequences, and how long the device waited for us."""
    prompt, output = (4, 2) if options.small else (PROMPT_TOKENS, 128)
    llm, _ = made(config, options, kind, count, prompt + output)
    prompts = _prompts(config, count, prompt)
    run = partial(llm.generate, prompts, max_tokens=output, temperature=0, ignore_eos=True)
    run()
    # Percentiles are of the newest steps, of which the first run's, which compile, are not.
    llm.engine._times.host_gap = Distribution()
    began = time.perf_counter()
    run()
    seconds = time.perf_counter() - began
    gap = llm.engine.metrics.host_gap_seconds
    return {
        "kind": kind,
        "sequences": count,
        "output_tokens_per_s": round(count * output / seconds, 1),
        "host_gap_ms": {
            "mean": round(gap.mean * 1e3, 4),
            "p50": round(gap.p50 * 1e3, 4),
            "p99": round(gap.p99 * 1e3, 4),
        },
    }


def huggingface(config: ModelConfig, options: argparse.Namespace) -> dict[str, Any]:
    """Returns tokens a second of Hugging Face's model, compiled; or why there are none."""
    if options.small or find_spec("torch") is None or find_spec("transformers") is None:
        return {"skipped": "--small" if options.small else "torch or transformers is not installed"}
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import LlamaConfig, LlamaForCausalLM  # pyright: ignore[reportMissingImports]

    if not torch.cuda.is_available():
        return {"skipped": "torch sees no GPU"}
    spec, mlp = config.layers[0].attention, config.layers[0].mlp
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=config.vocab_size, hidden_size=config.embed_dim,
                intermediate_size=mlp.ffn_dim, num_hidden_layers=len(config.layers),
                num_attention_heads=spec.num_heads, num_key_value_heads=spec.num_kv_heads,
                max_position_embeddings=config.max_context_tokens, tie_word_embeddings=False,
            )
        ).eval()  # fmt: skip
    model.forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
    prompt = torch.tensor(_prompts(config, 1, PROMPT_TOKENS), device="cuda")

    def timed(tokens: int) -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        model.generate(
            prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
            cache_implementation="static",
        )  # fmt: skip
        torch.cuda.synchronize()
        return time.perf_counter() - began

    for tokens in (136, 8, 136):
        timed(tokens)
    times = [(timed(136) - timed(8)) / 128 for _ in range(options.rounds)]
    versions = {name: version(name) for name in ("torch", "transformers")}
    return {"tokens_per_s": round(1 / statistics.median(times), 2), "versions": versions}


def table(result: dict[str, Any]) -> str:
    """Returns the result as text."""
    return "\n".join(_lines(result))


def _lines(result: dict[str, Any]) -> Iterator[str]:
    kind = "" if result["measured"] else " - interpreted: times mean nothing"
    yield f"{result['date']}, {result['device']}, jax {result['versions']['jax']}{kind}"
    yield f"copy: {result['copy_bandwidth_gb_s']} GB/s"
    yield f"{'decode, one sequence':<24}{'tokens/s':>12}{'bound':>12}{'of bound':>10}"
    for row in result["decode"]:
        yield (
            f"{row['kind']:<24}{row['tokens_per_s']:>12.2f}{row['bound_tokens_per_s']:>12.2f}"
            f"{row['of_bound']:>10.3f}"
        )
    theirs = result["huggingface"]
    yield f"{'Hugging Face, compiled':<24}" + (
        f"{theirs['tokens_per_s']:>12.2f}" if "tokens_per_s" in theirs else theirs["skipped"]
    )
    yield f"{'engine':<24}{'sequences':>12}{'tokens/s':>12}{'host gap p50':>16}{'p99, ms':>10}"
    for row in result["engine"]:
        gap = row["host_gap_ms"]
        yield (
            f"{row['kind']:<24}{row['sequences']:>12}{row['output_tokens_per_s']:>12.1f}"
            f"{gap['p50']:>16.3f} {gap['p99']:>9.3f}"
        )


if __name__ == "__main__":
    main()
