"""Our kernels for Hopper beside XLA's programs and JAX's own kernels, timed on the GPU.

    python benchmarks/kernels_gpu.py                    # a table, last of all; --json for an object
    python benchmarks/kernels_gpu.py --out FILE         # writes the object too
    python benchmarks/kernels_gpu.py --small            # tiny shapes, interpreted on CPU: no timing

Each program has several sets of operands, together larger than the second-level cache, and one
call works through all of them; its time over their number is one figure, after two calls that
compile and warm up. Programs take turns over the rounds and the median is kept. The bandwidth that
shares are of is that of a copy, measured in the same run. Every program's result is compared with
float64 on the host: the error is that of one row, over the largest element.

Imports JAX, NumPy and this package alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
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
from jax import Array, lax

from jaxserve.config import AttentionSpec, cache_spec
from jaxserve.pallas_kernels import kernel_set
from jaxserve.pallas_kernels.int8_matmul import Mode
from jaxserve.pallas_kernels.paged_attention import gpu

CACHE_BYTES = 200 << 20
"""Operands of a call; the second-level cache of an H100 has 50 MB."""

PEAK = {"bf16": 989e12, "int8": 1979e12, "fp8": 1979e12}
"""Dense operations a second of an H100 SXM, by datasheet."""

PAGE_SIZE = 64


@dataclass(frozen=True)
class Program:
    """One program of a case.

    Attributes:
        run: takes one set of operands.
        sets: operands.
    """

    name: str
    run: Callable[..., Array]
    sets: Sequence[tuple[Any, ...]]


@dataclass(frozen=True)
class Case:
    """One shape.

    Attributes:
        moved_bytes, operations: that a call cannot do without.
        peak: key of `PEAK`.
        row: of a result that is checked, from the first on.
        wanted: float64 of it.
        programs: makers of programs, ours first; one may not exist for a shape.
    """

    name: str
    moved_bytes: float
    operations: float
    peak: str
    row: int
    wanted: Callable[[], np.ndarray]
    programs: Sequence[Callable[[], Program]] = field(repr=False)


def main() -> None:
    """Runs the cases and prints the table."""
    options = _options()
    bandwidth = copy_bandwidth(1 << 20 if options.small else 1 << 30)
    rows: list[dict[str, Any]] = []
    for case in cases(options.small):
        if options.only in case.name:
            _say(case.name)
            rows += measured(case, 1 if options.small else options.rounds, bandwidth)
    device = jax.devices()[0]
    result = {
        "benchmark": "kernels_gpu",
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": device.device_kind,
        "measured": device.platform == "gpu",
        "versions": {name: version(name) for name in ("jax", "jaxlib")},
        "copy_bandwidth_gb_s": round(bandwidth / 1e9, 1),
        "rounds": options.rounds,
        "rows": rows,
    }
    text = json.dumps(result, indent=1)
    if options.out is not None:
        options.out.write_text(text + "\n")
    print(text if options.json else table(result))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--out", type=Path, help="also write the JSON object here")
    parser.add_argument("--small", action="store_true", help="tiny shapes, on CPU")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--rounds", type=int, default=9)
    return parser.parse_args()


def copy_bandwidth(size: int) -> float:
    """Returns bytes read and written a second by a copy, the median of nine."""
    x = jnp.zeros(size, jnp.uint8)
    copy = jax.jit(lambda x: x + jnp.uint8(1))
    jax.block_until_ready(copy(x))
    times = []
    for _ in range(9):
        began = time.perf_counter()
        jax.block_until_ready(copy(x))
        times.append(time.perf_counter() - began)
    return 2 * size / statistics.median(times)


def measured(case: Case, rounds: int, bandwidth: float) -> list[dict[str, Any]]:
    """Returns a row for each program of a case."""
    ready: dict[str, tuple[Callable[[], Any], int]] = {}
    rows: dict[str, dict[str, Any]] = {}
    wanted = case.wanted()
    for make in case.programs:
        name = make.__name__ if not isinstance(make, partial) else make.func.__name__
        try:
            program = make()
            name = program.name
            whole = jax.jit(lambda sets, run=program.run: [run(*one) for one in sets])
            call = partial(whole, program.sets)
            jax.block_until_ready(call())
            found = jax.block_until_ready(call())
        except Exception as error:  # another program's limits are a result, too
            rows[name] = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:160]}
            continue
        row = np.asarray(found[0][case.row].astype(jnp.float32), np.float64)
        error = np.abs(row.reshape(wanted.shape) - wanted).max() / np.abs(wanted).max()
        rows[name] = {"error_of_float64": float(f"{error:.2e}")}
        ready[name] = call, len(program.sets)
    times: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(rounds):
        for name, (call, count) in ready.items():
            began = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append((time.perf_counter() - began) / count)
    for name, found in times.items():
        seconds = statistics.median(found)
        rows[name] |= {
            "us": round(seconds * 1e6, 2),
            "of_copy_bandwidth": round(case.moved_bytes / seconds / bandwidth, 3),
            "of_peak": round(case.operations / seconds / PEAK[case.peak], 3),
        }
    return [{"case": case.name, "program": name, **row} for name, row in rows.items()]


def cases(small: bool) -> list[Case]:
    """Returns decode attention, prompts, and matmuls of a Llama-3-8B."""
    spec = AttentionSpec(4, 2, 64) if small else AttentionSpec(32, 8, 128)
    decode = [(2, 100)] if small else [(1, 4096), (16, 512), (16, 4096), (64, 4096), (16, 32768)]
    shapes = [(200, 128)] if small else [(4096, 6144), (4096, 28672), (14336, 4096)]
    rows = (1, 70) if small else (1, 16, 64, 256, 2048, 8192)
    found = [
        attention(spec, batch, context, 1, pages)
        for batch, context in decode
        for pages in ("bfloat16", "int8", "float8_e4m3fn")
    ]
    found += [attention(spec, 1, 40 if small else 4096, 40 if small else 4096, "bfloat16")]
    for inputs, channels in shapes:
        for count in rows:
            for mode in Mode:
                for weights in ("int8", "float8_e4m3fn"):
                    found.append(matmul(inputs, channels, count, mode, weights))
    return found


def attention(spec: AttentionSpec, batch: int, context: int, new: int, dtype: str) -> Case:
    """Returns attention of the newest tokens of some sequences."""
    width = -(-context // PAGE_SIZE)
    heads, head, tokens = spec.num_kv_heads, spec.head_dim, batch * new
    element = jnp.dtype(dtype).itemsize
    size = 2 * batch * context * heads * (head * element + (4 if element == 1 else 0))
    count = max(1, -(-CACHE_BYTES // size)) if batch * context > 1000 else 2
    rng = np.random.default_rng(0)
    ids = rng.permutation(np.arange(1, batch * width + 1)).reshape(batch, width)
    table = jnp.asarray(ids, jnp.int32)
    starts = jnp.arange(batch + 1, dtype=jnp.int32) * new
    lengths = jnp.full(batch, context, jnp.int32)
    q_pos = jnp.tile(jnp.arange(context - new, context, dtype=jnp.int32), batch)
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (tokens, spec.num_heads, head), jnp.bfloat16)
    k, v = (
        jax.random.normal(key, (batch * context, heads, head), jnp.bfloat16) for key in keys[1:]
    )
    row = jnp.repeat(jnp.arange(batch, dtype=jnp.int32), context)
    positions = jnp.tile(jnp.arange(context, dtype=jnp.int32), batch)

    def paged(backend: str) -> Program:
        kernels = kernel_set(backend)

        def filled(k: Array, v: Array, row: Array, positions: Array) -> Any:
            pages = kernels.init_pages(batch * width + 1, PAGE_SIZE, cache_spec(spec, dtype))
            return kernels.write_pages(pages, k, v, table, row, positions, page_size=PAGE_SIZE)

        def run(q: Array, pages: Any) -> Array:
            return kernels.paged_attention(
                q, pages, table, starts, lengths, q_pos, spec, page_size=PAGE_SIZE, max_query=new
            )

        fill = jax.jit(filled)
        name = "ours" if backend == "gpu" else backend
        return Program(name, run, [(q, fill(k, v, row, positions)) for _ in range(count)])

    def ours() -> Program:
        return paged("gpu")

    def xla() -> Program:
        return paged("xla")

    def jax_triton() -> Program:
        """Returns JAX's own kernel for paged decoding."""
        from jax.experimental.pallas.ops.gpu import paged_attention as theirs

        pages = ours().sets[0][1]
        if pages.scales is not None:
            raise NotImplementedError("pages with scales of tokens are laid out otherwise")
        both = [jnp.swapaxes(x, 0, 1) for x in (pages.keys, pages.values)]

        def run(q: Array, k: Array, v: Array) -> Array:
            return theirs.paged_attention(q * spec.score_scale, k, v, table, lengths)

        return Program("jax paged", run, [(q, *(x + 0 for x in both)) for _ in range(count)])

    def jax_whole() -> Program:
        """Returns JAX's attention over whole sequences, which cuDNN computes."""
        shape = batch, context, heads, head
        whole = q.reshape(batch, new, spec.num_heads, head), k.reshape(shape), v.reshape(shape)

        def run(*qkv: Array) -> Array:
            on_gpu = jax.default_backend() == "gpu"
            out = jax.nn.dot_product_attention(
                *qkv, is_causal=new > 1, implementation="cudnn" if on_gpu else "xla"
            )
            return out.reshape(tokens, spec.num_heads, head)

        return Program("jax cudnn, unpaged", run, [tuple(x + 0 for x in whole)] * count)

    def wanted() -> np.ndarray:
        pages: gpu.Pages = ours().sets[0][1]
        return exact_attention(spec, pages, np.asarray(ids[0]), q[new - 1], context - 1)

    theirs = [jax_triton] if new == 1 else []
    theirs += [jax_whole] if element == 2 else []
    seen = context if new == 1 else context / 2
    return Case(
        f"{'decode' if new == 1 else 'prompt'} {batch} x {context}, {dtype}",
        size + 4 * tokens * spec.num_heads * head,
        4.0 * tokens * spec.num_heads * head * seen, "bf16", new - 1, wanted, [ours, xla, *theirs],
    )  # fmt: skip


def exact_attention(
    spec: AttentionSpec, pages: gpu.Pages, ids: np.ndarray, q: Array, position: int
) -> np.ndarray:
    """Returns float64[1, N, H], attention of one query over the keys up to its position."""

    def rows(x: Array, scales: Array | None) -> np.ndarray:
        wide = np.asarray(x[ids].astype(jnp.float32), np.float64)
        if scales is not None:
            wide = wide * np.asarray(scales[ids], np.float64)[..., None]
        return np.moveaxis(wide, 1, 0).reshape(spec.num_kv_heads, -1, spec.head_dim)

    of_k, of_v = pages.scales or (None, None)
    k, v = (rows(x, s)[:, : position + 1] for x, s in ((pages.keys, of_k), (pages.values, of_v)))
    group = spec.num_heads // spec.num_kv_heads
    wide = np.asarray(q.astype(jnp.float32), np.float64).reshape(-1, group, spec.head_dim)
    scores = np.einsum("KGH,KSH->KGS", wide, k) * spec.score_scale
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    out = np.einsum("KGS,KSH->KGH", weights, v) / weights.sum(axis=-1)[..., None]
    return out.reshape(1, spec.num_heads, spec.head_dim)


def matmul(inputs: int, channels: int, rows: int, mode: Mode, weights: str) -> Case:
    """Returns a product with a rounded weight."""
    size = inputs * channels
    count = max(2, -(-CACHE_BYTES // size)) if size > 1 << 20 else 2
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (rows, inputs), jnp.bfloat16)
    w = jax.random.randint(keys[1], (channels, inputs), -127, 128).astype(weights)
    scales = jnp.full(channels, 1 / 127 / np.sqrt(inputs), jnp.float32)
    ws = [(x, w + jnp.zeros((), w.dtype)) for _ in range(count)]

    def ours() -> Program:
        product = kernel_set("gpu").int8_matmul
        return Program(
            "ours", lambda x, w: product(x, w, scales, 1, "out_in", "bfloat16", mode=mode), ws
        )

    def xla() -> Program:
        if weights != "int8" and mode is Mode.W8A8:
            raise NotImplementedError("rows are rounded to int8")
        product = kernel_set("xla").int8_matmul
        return Program(
            "xla", lambda x, w: product(x, w, scales, 1, "out_in", "bfloat16", mode=mode), ws
        )

    def xla_dot() -> Program:
        """Returns XLA's dot of rows that are rounded already."""
        rounded = x.astype(jnp.float32) * (127 / jnp.max(jnp.abs(x.astype(jnp.float32))))
        sets = [(rounded.astype(weights), w) for _, w in ws]
        sums = jnp.int32 if weights == "int8" else jnp.float32
        factor = jnp.max(jnp.abs(x.astype(jnp.float32))) / 127

        def run(x: Array, w: Array) -> Array:
            y = lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=sums)
            return (y.astype(jnp.float32) * (scales * factor)).astype(jnp.bfloat16)

        return Program(f"xla dot of {weights}", run, sets)

    def xla_bfloat16() -> Program:
        sets = [(x, w.astype(jnp.bfloat16)) for _, w in ws]

        def run(x: Array, w: Array) -> Array:
            y = lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
            return (y * scales).astype(jnp.bfloat16)

        return Program("xla dot of bfloat16", run, sets)

    def jax_mixed() -> Program:
        """Returns JAX's own kernel of int8 times bfloat16, whose left side is the weight."""
        from jax.experimental.pallas.ops.gpu import hopper_mixed_type_matmul_mgpu as theirs

        config = theirs.TuningConfig(64, 64, 64, 4)

        def run(x: Array, w: Array) -> Array:
            y = theirs.mixed_matmul_kernel(w, x.T, out_dtype=jnp.bfloat16, config=config)
            return (y.T * scales).astype(jnp.bfloat16)

        return Program("jax mixed", run, ws)

    def wanted() -> np.ndarray:
        first = np.asarray(x[:1].astype(jnp.float32), np.float64)
        wide = np.asarray(w.astype(jnp.float32), np.float64)
        return first @ wide.T * np.asarray(scales, np.float64)

    theirs = [xla_dot] if mode is Mode.W8A8 else [jax_mixed] if weights == "int8" else []
    short = "fp8" if weights != "int8" else "int8"
    return Case(
        f"{mode} {rows} x {inputs} x {channels}, {weights}",
        size + 2.0 * rows * (inputs + channels), 2.0 * rows * size,
        short if mode is Mode.W8A8 else "bf16", 0, wanted, [ours, xla, *theirs, xla_bfloat16],
    )  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """Returns the result as text."""
    kind = "" if result["measured"] else " - interpreted: times mean nothing"
    lines = [
        f"{result['date']}, {result['device']}, jax {result['versions']['jax']}{kind}",
        f"copy: {result['copy_bandwidth_gb_s']} GB/s",
        f"{'case':<40}{'program':<22}{'us':>12}{'of copy':>9}{'of peak':>9}{'error':>10}",
    ]
    for row in result["rows"]:
        start = f"{row['case']:<40}{row['program']:<22}"
        if "error" in row:
            lines.append(f"{start}  {row['error']}")
            continue
        lines.append(
            f"{start}{row['us']:>12.2f}{row['of_copy_bandwidth']:>9.3f}{row['of_peak']:>9.3f}"
            f"{row['error_of_float64']:>10.1e}"
        )
    return "\n".join(lines)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
