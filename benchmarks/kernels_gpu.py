"""Our kernels for Hopper beside XLA's programs and JAX's own kernels, timed on the GPU.

    python benchmarks/kernels_gpu.py                    # a table, last of all; --json for an object
    python benchmarks/kernels_gpu.py --out FILE         # writes the object too
    python benchmarks/kernels_gpu.py --small            # tiny shapes, interpreted on CPU: no timing

Each program has several sets of operands, together larger than the second-level cache, and one
call works through all of them. Many calls are enqueued before the last is waited for, so that
starting one hides behind the one before; the time over their number and the sets' is one figure,
after two calls that compile and warm up. Programs take turns over the rounds and the median is
kept. The bandwidth that shares are of is that of a copy, measured in the same run. Rows of every
program's result, drawn at random, are compared with float64 on the host, in w8a8 of rows that are
rounded exactly; the error is over the largest element. Where one of this package's own programs is
further off than its type explains, the exit status is 1.

Imports JAX, NumPy and this package alone.
"""

from __future__ import annotations

import argparse
import json
import math
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

CALLS = 32
"""Calls that are enqueued before the last of them is waited for."""

CHECKED = 4
"""Rows of a result that are compared."""

PAGE_SIZE = 64


@dataclass(frozen=True)
class Program:
    """One program of a case.

    Attributes:
        run: takes one set of operands.
        sets: operands.
        own: this package's; its error is bounded.
    """

    name: str
    run: Callable[..., Array]
    sets: Sequence[tuple[Any, ...]]
    own: bool = False


@dataclass(frozen=True)
class Case:
    """One shape.

    Attributes:
        moved_bytes, operations: that a call cannot do without.
        peak: key of `PEAK`.
        rows: of a result that are checked.
        limit: greatest error of this package's programs.
        wanted: float64 of those rows.
        programs: makers of programs, ours first; one may not exist for a shape.
    """

    name: str
    moved_bytes: float
    operations: float
    peak: str
    rows: np.ndarray
    limit: float
    wanted: Callable[[], np.ndarray]
    programs: Sequence[Callable[[], Program]] = field(repr=False)


def main() -> None:
    """Runs the cases and prints the table; status 1 where a result is wrong or missing."""
    options = _options()
    bandwidth = copy_bandwidth(1 << 20 if options.small else 1 << 30)
    rows: list[dict[str, Any]] = []
    for case in cases(options.small):
        if options.only in case.name:
            _say(case.name)
            turns = (1, 1) if options.small else (options.rounds, CALLS)
            rows += measured(case, *turns, bandwidth)
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
    if not all(row["ok"] for row in rows):
        raise SystemExit(1)


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


def measured(case: Case, rounds: int, calls: int, bandwidth: float) -> list[dict[str, Any]]:
    """Returns a row for each program of a case; `calls` are enqueued at a time."""
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
            said = f"{type(error).__name__}: {error}".splitlines()[0][:160]
            rows[name] = {"error": said, "ok": name != "ours"}
            continue
        error = error_of(found[0][case.rows], wanted)
        ok = not program.own or error <= case.limit
        rows[name] = {"error_of_float64": float(f"{error:.2e}"), "ok": ok}
        ready[name] = call, len(program.sets)
    times: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(rounds):
        for name, (call, count) in ready.items():
            began = time.perf_counter()
            for _ in range(calls - 1):
                call()
            jax.block_until_ready(call())
            times[name].append((time.perf_counter() - began) / (count * calls))
    for name, found in times.items():
        seconds = statistics.median(found)
        rows[name] |= {
            "us": round(seconds * 1e6, 2),
            "of_copy_bandwidth": round(case.moved_bytes / seconds / bandwidth, 3),
            "of_peak": round(case.operations / seconds / PEAK[case.peak], 3),
        }
    return [{"case": case.name, "program": name, **row} for name, row in rows.items()]


def error_of(found: Array, wanted: np.ndarray) -> float:
    """Returns the greatest difference over the greatest element; not a number passes no limit."""
    wide = np.asarray(found.astype(jnp.float32), np.float64).reshape(wanted.shape)
    return float(np.abs(wide - wanted).max() / np.abs(wanted).max())


def drawn(rows: int) -> np.ndarray:
    """Returns the numbers of the rows that are checked, in order."""
    return np.sort(np.random.default_rng(rows).choice(rows, min(rows, CHECKED), replace=False))


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
    checked = drawn(tokens)
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
        sets = [(q, fill(k, v, row, positions)) for _ in range(count)]
        return Program(name, run, sets, own=True)

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
        shares = math.gcd(16, width)
        both = [jnp.swapaxes(x, 0, 1) for x in (pages.keys, pages.values)]

        def run(q: Array, k: Array, v: Array) -> Array:
            return theirs.paged_attention(
                q * spec.score_scale, k, v, table, lengths,
                k_splits=shares, pages_per_compute_block=math.gcd(8, width // shares),
            )  # fmt: skip

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

        return Program(
            "jax cudnn, unpaged", run, [tuple(x + 0 for x in whole) for _ in range(count)]
        )

    def wanted() -> np.ndarray:
        pages: gpu.Pages = ours().sets[0][1]
        rows = [
            exact_attention(spec, pages, ids[i // new], q[i], context - new + i % new)
            for i in checked
        ]
        return np.concatenate(rows)

    theirs = [jax_triton] if new == 1 else []
    theirs += [jax_whole] if element == 2 else []
    seen = context if new == 1 else context / 2
    return Case(
        f"{'decode' if new == 1 else 'prompt'} {batch} x {context}, {dtype}",
        size + 4 * tokens * spec.num_heads * head,
        4.0 * tokens * spec.num_heads * head * seen, "bf16", checked, 1e-2, wanted,
        [ours, xla, *theirs],
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
            "ours", lambda x, w: product(x, w, scales, 1, "out_in", "bfloat16", mode=mode), ws,
            own=True,
        )  # fmt: skip

    def xla() -> Program:
        if weights != "int8" and mode is Mode.W8A8:
            raise NotImplementedError("rows are rounded to int8")
        product = kernel_set("xla").int8_matmul
        return Program(
            "xla", lambda x, w: product(x, w, scales, 1, "out_in", "bfloat16", mode=mode), ws,
            own=True,
        )  # fmt: skip

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

        # Two groups of 64 channels, and no more rows than there are, in whole swizzles.
        right = next((n for n in (16, 32, 64) if rows <= n), 128)
        config = theirs.TuningConfig(
            64, right, 64, 4, epi_tile_n=min(right, 64), wg_dimension=theirs.MatmulDimension.M
        )
        filled = jnp.pad(x, ((0, -rows % right), (0, 0)))

        def run(x: Array, w: Array) -> Array:
            y = theirs.mixed_matmul_kernel(w, x.T, out_dtype=jnp.bfloat16, config=config)
            return (y.T[:rows] * scales).astype(jnp.bfloat16)

        return Program("jax mixed", run, [(filled, w) for _, w in ws])

    def wanted() -> np.ndarray:
        some = np.asarray(x[checked].astype(jnp.float32), np.float64)
        if mode is Mode.W8A8:
            some = exactly_rounded(some, weights)
        wide = np.asarray(w.astype(jnp.float32), np.float64)
        return some @ wide.T * np.asarray(scales, np.float64)

    checked = drawn(rows)
    theirs = [xla_dot] if mode is Mode.W8A8 else [jax_mixed] if weights == "int8" else []
    short = "fp8" if weights != "int8" else "int8"
    return Case(
        f"{mode} {rows} x {inputs} x {channels}, {weights}",
        size + 2.0 * rows * (inputs + channels), 2.0 * rows * size,
        short if mode is Mode.W8A8 else "bf16", checked,
        2e-2 if short == "fp8" and mode is Mode.W8A8 else 5e-3, wanted,
        [ours, xla, *theirs, xla_bfloat16],
    )  # fmt: skip


def exactly_rounded(rows: np.ndarray, weights: str) -> np.ndarray:
    """Returns what rows of float64 stand for once they are of the weights' type."""
    most = 127.0 if weights == "int8" else 448.0
    unit = np.abs(rows).max(axis=-1, keepdims=True) / most
    if weights == "int8":
        return np.round(rows / unit) * unit
    return np.asarray(jnp.asarray(rows / unit, weights).astype(jnp.float32), np.float64) * unit


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
            f"{row['error_of_float64']:>10.1e}{'' if row['ok'] else '  WRONG'}"
        )
    return "\n".join(lines)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
