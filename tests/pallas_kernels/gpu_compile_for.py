"""Compiles the kernels for an H100 that is not here, and prints what came out as JSON by case.

Started by `test_gpu_compile.py` in a process of its own: what the assembler says goes to files, of
which XLA is told before JAX starts.
"""

import json
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

DUMP = Path(tempfile.mkdtemp())
os.environ |= {"MOSAIC_GPU_DUMP_PTXAS": "1", "MOSAIC_GPU_DUMP_TO": str(DUMP)}

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.sharding import NamedSharding, PartitionSpec  # noqa: E402

from jaxserve.config import Activation, AlibiSpec, AttentionSpec, cache_spec  # noqa: E402
from jaxserve.pallas_kernels.int8_matmul import Mode  # noqa: E402
from jaxserve.pallas_kernels.int8_matmul import gpu as int8_matmul  # noqa: E402
from jaxserve.pallas_kernels.paged_attention import gpu  # noqa: E402
from jaxserve.partitioning.mesh import MeshPlan  # noqa: E402
from jaxserve.planner.gpu_topology import Gpus  # noqa: E402

KIND = "NVIDIA H100 80GB HBM3"
ROWS, WIDTH = 8, 64
Shaped = Callable[..., Any]


def attention(
    shaped: Shaped, spec: AttentionSpec, pages_dtype: str = "bfloat16", page_size: int = 64,
    tokens: int = 256, sinks: int = 0, max_query: int | None = None,
) -> None:  # fmt: skip
    count = ROWS * WIDTH + 1
    empty = jax.eval_shape(lambda: gpu.init_pages(count, page_size, cache_spec(spec, pages_dtype)))
    pages = jax.tree.map(lambda x: shaped(x.shape, x.dtype), empty)
    q, whole = shaped((tokens, spec.num_heads, spec.head_dim), jnp.bfloat16), jnp.int32

    def call(q: Any, pages: Any, table: Any, q_start: Any, kv_len: Any, q_pos: Any) -> Any:
        return gpu.paged_attention(
            q, pages, table, q_start, kv_len, q_pos, spec, page_size=page_size,
            sink_tokens=sinks, max_query=max_query, q_sink=q if sinks else None, interpret=False,
        )  # fmt: skip

    rest = (ROWS, WIDTH), (ROWS + 1,), (ROWS,), (tokens,)
    jax.jit(call).lower(q, pages, *(shaped(shape, whole) for shape in rest)).compile()


def matmul(
    shaped: Shaped, rows: int, inputs: int, channels: int, mode: Mode, weights: Any = jnp.int8,
    *, rows_dtype: Any = jnp.bfloat16, dtype: str = "bfloat16",
    activation: Activation | None = None,
) -> None:  # fmt: skip
    def call(x: Any, w: Any, scales: Any) -> Any:
        return int8_matmul.int8_matmul(
            x, w, scales, 1, "out_in", dtype, mode=mode, activation=activation, interpret=False
        )

    w, scales = shaped((channels, inputs), weights), shaped((channels,), jnp.float32)
    jax.jit(call).lower(shaped((rows, inputs), rows_dtype), w, scales).compile()


def cases(shaped: Shaped, every: bool) -> dict[str, Callable[[], None]]:
    def paged(*args: Any, **kwargs: Any) -> Callable[[], None]:
        return lambda: attention(shaped, *args, **kwargs)

    def product(*args: Any, **kwargs: Any) -> Callable[[], None]:
        return lambda: matmul(shaped, *args, **kwargs)

    llama, fp8 = AttentionSpec(32, 8, 128), jnp.float8_e4m3fn
    few = {
        "llama": paged(llama),
        "llama, int8, decode": paged(llama, "int8", tokens=ROWS, max_query=1),
        "256, window, sinks": paged(
            AttentionSpec(16, 8, 256, window=300, soft_cap=50.0), tokens=ROWS, sinks=4, max_query=1
        ),
        "w8a16, 1 row": product(1, 4096, 4096, Mode.W8A16),
        "w8a16, fp8, 16 rows": product(16, 14336, 4096, Mode.W8A16, fp8),
        "w8a8, 8192 rows": product(8192, 4096, 28672, Mode.W8A8),
        "w8a8, odd": product(3, 391, 205, Mode.W8A8),
        "w8a16, float32 logits, 256 rows": product(256, 4096, 8192, Mode.W8A16, dtype="float32"),
        "w8a8, gelu, 256 rows": product(256, 4096, 8192, Mode.W8A8, activation=Activation.GELU),
    }
    if not every:
        return few
    return few | {
        "llama, int8": paged(llama, "int8"),
        "llama, fp8": paged(llama, "float8_e4m3fn"),
        "80": paged(AttentionSpec(32, 32, 80), page_size=16),
        "80, int8": paged(AttentionSpec(32, 32, 80), "int8", page_size=16),
        "96, alibi": paged(AttentionSpec(32, 32, 96, alibi=AlibiSpec(bfloat16=True))),
        "71 heads": paged(AttentionSpec(71, 1, 64), page_size=256),
        "64, int8": paged(AttentionSpec(32, 8, 64), "int8", page_size=128),
        "256": paged(AttentionSpec(16, 8, 256, window=300, soft_cap=50.0), sinks=4),
        "256, int8": paged(AttentionSpec(16, 8, 256), "int8"),
        "w8a16, float32 rows": product(256, 4096, 6144, Mode.W8A16, rows_dtype=jnp.float32),
        "w8a16, 11008 inputs, 32 rows": product(32, 11008, 4096, Mode.W8A16),
        "w8a8, 11008 inputs, 32 rows": product(32, 11008, 4096, Mode.W8A8),
        "w8a16, 1024 rows": product(1024, 4096, 6144, Mode.W8A16),
        "w8a16, 64 rows": product(64, 4096, 6144, Mode.W8A16),
        "w8a8, 64 rows": product(64, 4096, 6144, Mode.W8A8),
        "w8a8, 1 row": product(1, 4096, 28672, Mode.W8A8),
        "w8a8, fp8, 1024 rows": product(1024, 4096, 6144, Mode.W8A8, fp8),
    }


def compiled(run: Callable[[], None]) -> dict[str, Any]:
    """Returns what the assembler says of the kernels of a call, or the error."""
    for path in DUMP.iterdir():
        path.unlink()
    try:
        run()
    except Exception as error:  # the test shows it
        return {"error": f"{type(error).__name__}: {error}"[:500]}
    said = "".join(path.read_text() for path in DUMP.glob("*ptxas*"))
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    return {
        "kernels": len(spills),
        "spilled_bytes": sum(int(n) for pair in spills for n in pair),
        "registers": [int(n) for n in re.findall(r"Used (\d+) registers", said)],
    }


def main() -> None:
    sharding = NamedSharding(Gpus(KIND, MeshPlan(1, 1, 1)).mesh(), PartitionSpec())

    def shaped(shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    found = {name: compiled(run) for name, run in cases(shaped, "--every" in sys.argv).items()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
