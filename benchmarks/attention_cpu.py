"""Time of writing and attending for all layers of one step, by kind of step.

    python -m benchmarks.attention_cpu --json

Every layer writes its new keys and values into pages and attends; its output is the next layer's
query. `bound_ms` is the time to read the keys and values in use once, at the machine's bandwidth.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.machine import facts, read_bandwidth
from jaxserve.config import AttentionSpec, cache_spec
from jaxserve.pallas_kernels import KernelSet, kernel_set

SPEC = AttentionSpec(num_heads=9, num_kv_heads=3, head_dim=64)
NUM_LAYERS = 30


@dataclass(frozen=True)
class Shape:
    """A kind of step.

    Attributes:
        name: for people.
        contexts: tokens already in the cache, by sequence.
        counts: new tokens, by sequence.
        max_query: hint for the kernel.
    """

    name: str
    contexts: tuple[int, ...]
    counts: tuple[int, ...]
    max_query: int | None = None

    @property
    def lengths(self) -> tuple[int, ...]:
        """Returns the tokens of each sequence after the step."""
        return tuple(a + b for a, b in zip(self.contexts, self.counts, strict=True))


SHAPES = (
    *(
        Shape(f"decode {n} at {c}", (c - 1,) * n, (1,) * n, 1)
        for c in (128, 192)
        for n in (1, 8, 32)
    ),
    Shape("decode 1 at 2048", (2047,), (1,), 1),
    Shape("decode 8 at 2048", (2047,) * 8, (1,) * 8, 1),
    Shape("decode 32, one at 2048, others at 128", (2047, *(127,) * 31), (1,) * 32, 1),
    *(Shape(f"prefill {n}", (0,), (n,)) for n in (128, 512, 1024)),
    Shape("prefill 512 after 1024", (1024,), (512,)),
    Shape("prefill 8 of 128", (0,) * 8, (128,) * 8),
    Shape("mixed: decode 31 at 192, prefill 256", (*(191,) * 31, 0), (*(1,) * 31, 256)),
)


def step(
    kernels: KernelSet, shape: Shape, page_size: int, pages: list[Any], x: Any, arrays: Any
) -> tuple[Any, list[Any]]:
    """Returns (output of the last layer, the pages) after one step."""
    table, rows, starts, lengths, positions = arrays
    after = []
    for layer in pages:
        k = x[:, :: SPEC.num_heads // SPEC.num_kv_heads]
        layer = kernels.write_pages(layer, k, k, table, rows, positions, page_size=page_size)
        x = kernels.paged_attention(
            x,
            layer,
            table,
            starts,
            lengths,
            positions,
            SPEC,
            page_size=page_size,
            max_query=shape.max_query,
        )
        after.append(layer)
    return x, after


def measured(shape: Shape, page_size: int, dtype: str, rounds: int) -> dict[str, Any]:
    """Returns milliseconds of one step."""
    kernels = kernel_set("xla")
    rng = np.random.default_rng(0)
    rows = len(shape.counts)
    width = -(-max(*shape.lengths, 256) // page_size)
    num_pages = rows * width
    table = rng.permutation(num_pages).reshape(rows, width).astype(np.int32)
    positions = [np.arange(c, c + n) for c, n in zip(shape.contexts, shape.counts, strict=True)]
    arrays = (
        table,
        np.repeat(np.arange(rows, dtype=np.int32), shape.counts),
        np.cumsum([0, *shape.counts]).astype(np.int32),
        np.array(shape.lengths, np.int32),
        np.concatenate(positions).astype(np.int32),
    )
    arrays = jax.tree.map(jnp.asarray, arrays)
    tokens = sum(shape.counts)
    x = jnp.asarray(rng.normal(size=(tokens, SPEC.num_heads, SPEC.head_dim)), dtype)
    spec = cache_spec(SPEC, dtype)
    pages = [kernels.init_pages(num_pages, page_size, spec) for _ in range(NUM_LAYERS)]
    began = time.perf_counter()
    run = jax.jit(partial(step, kernels, shape, page_size), donate_argnums=0)
    run = run.lower(pages, x, arrays).compile()
    compiled = time.perf_counter() - began
    times = []
    for _ in range(rounds + 2):
        began = time.perf_counter()
        out, pages = run(pages, x, arrays)
        jax.block_until_ready((out, pages))
        times.append(time.perf_counter() - began)
    times = sorted(times[2:])
    kept = sum(shape.lengths) * spec.bytes_per_token * NUM_LAYERS
    return {
        "shape": shape.name,
        "page_size": page_size,
        "dtype": dtype,
        "median_ms": round(times[len(times) // 2] * 1e3, 3),
        "min_ms": round(times[0] * 1e3, 3),
        "compile_s": round(compiled, 2),
        "kv_bytes": kept,
    }


def results(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yields one result per shape and page size."""
    bandwidth = read_bandwidth()
    for shape in SHAPES:
        if options.only not in shape.name:
            continue
        for page_size in options.page_sizes:
            found = measured(shape, page_size, options.dtype, options.rounds)
            yield found | {"bound_ms": round(found["kv_bytes"] / bandwidth * 1e3, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--page-sizes", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--only", default="", help="shapes whose name contains this")
    options = parser.parse_args()
    found = []
    for result in results(options):
        found.append(result)
        if not options.json:
            print(
                f"{result['shape']:40s} page {result['page_size']:3d}  "
                f"median {result['median_ms']:9.3f}  min {result['min_ms']:9.3f}  "
                f"bound {result['bound_ms']:7.3f} ms  compile {result['compile_s']:6.2f} s",
                flush=True,
            )
    if options.json:
        print(json.dumps({"machine": facts(), "results": found}, indent=1))


if __name__ == "__main__":
    main()
