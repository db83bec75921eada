"""Compiles the kernels for a TPU that is not here, and prints what came out as JSON by case.

Started by `test_tpu_compile.py`, one process a chip: the compiler may abort.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.config import Activation, AlibiSpec, AttentionSpec, cache_spec
from jaxserve.pallas_kernels.int8_matmul import Mode
from jaxserve.pallas_kernels.int8_matmul import tpu as int8_matmul
from jaxserve.pallas_kernels.paged_attention import tpu
from jaxserve.pallas_kernels.paged_attention.places import row_of_tokens
from jaxserve.pallas_kernels.paged_attention.tiles import Tile, tile_for
from jaxserve.pallas_kernels.ragged_matmul import tpu as ragged_matmul

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import tpu_cycles  # pyright: ignore[reportMissingImports] - a script beside the package

ROWS, WIDTH = 8, 16
TWO_CORES = ("v4", "v5p")


def attention(
    shaped: Callable[..., Any],
    cores: int,
    spec: AttentionSpec,
    pages_dtype: str = "bfloat16",
    page_size: int = 128,
    tokens: int = ROWS,
    store: bool = False,
    chip: str | None = None,
    **options: Any,
) -> Any:
    """Returns the compiled call; with `store`, new keys and values are stored by it.

    With `chip`, its blocks have the sizes that the kernel chooses there, and small ones otherwise.
    """
    count = ROWS * WIDTH + 1
    empty = jax.eval_shape(lambda: tpu.init_pages(count, page_size, cache_spec(spec, pages_dtype)))
    pages = jax.tree.map(lambda x: shaped(x.shape, x.dtype), empty)
    heads, head = spec.num_kv_heads, spec.head_dim
    q = shaped((tokens, spec.num_heads, head), jnp.bfloat16)
    k = shaped((tokens, heads, head), jnp.bfloat16) if store else None
    whole = jnp.int32
    rest = (
        shaped((ROWS, WIDTH), whole), shaped((ROWS + 1,), whole), shaped((ROWS,), whole),
        shaped((tokens,), whole),
    )  # fmt: skip
    tile = Tile(256, 256, 16, cores)
    if chip is not None:
        tile = tile_for(spec, page_size, WIDTH, pages_dtype, chip)

    def call(pages: Any, q: Any, k: Any, rest: Any) -> Any:
        table, q_start, kv_len, q_pos = rest
        at = q_start, kv_len, q_pos, spec
        given: dict[str, Any] = {"page_size": page_size, "tile": tile, **options}
        if store:
            row = row_of_tokens(q_start, tokens)
            return tpu.write_and_attend(q, k, k, pages, table, row, *at, interpret=False, **given)
        return tpu.paged_attention(q, pages, table, *at, interpret=False, **given)

    donated = (0,) if store else ()
    return jax.jit(call, donate_argnums=donated).lower(pages, q, k, rest).compile()


def matmul(shaped: Callable[..., Any], rows: int, mode: Mode, orientation: str) -> Any:
    inputs, channels = 1025, 643
    shape = (channels, inputs) if orientation == "out_in" else (inputs, channels)

    def call(x: Any, w: Any, scales: Any) -> Any:
        return int8_matmul.int8_matmul(
            x, w, scales, 1, orientation, "bfloat16", mode=mode, activation=Activation.GELU,
            interpret=False,
        )  # fmt: skip

    given = shaped((rows, inputs), jnp.bfloat16), shaped(shape, jnp.int8)
    return jax.jit(call).lower(*given, shaped((channels,), jnp.float32)).compile()


def experts(shaped: Callable[..., Any], mode: Mode, rows: int = 300) -> Any:
    groups, inputs, channels = 5, 1100, 643

    def call(x: Any, w: Any, sizes: Any, scales: Any) -> Any:
        return ragged_matmul.ragged_matmul(
            x, w, sizes, "bfloat16", scales=scales, mode=mode, interpret=False
        )

    given = (
        shaped((rows, inputs), jnp.bfloat16), shaped((groups, channels, inputs), jnp.int8),
        shaped((groups,), jnp.int32), shaped((groups, channels), jnp.float32),
    )  # fmt: skip
    return jax.jit(call).lower(*given).compile()


def cases(chip: str) -> dict[str, Callable[[], Any]]:
    shaped = tpu_cycles._shaped(tpu_cycles.CHIPS[chip])
    cores = 2 if chip in TWO_CORES else 1

    def paged(*args: Any, **kwargs: Any) -> Callable[[], Any]:
        return lambda: attention(shaped, cores, *args, **kwargs)

    def product(*args: Any) -> Callable[[], Any]:
        return lambda: matmul(shaped, *args)

    return {
        "stored, decode": paged(AttentionSpec(8, 2, 128), store=True, max_query=1),
        "stored, int8": paged(AttentionSpec(8, 2, 128), "int8", store=True, max_query=1),
        "int8, mixed": paged(AttentionSpec(4, 2, 64), "int8", 16, 40),
        "fp8, window": paged(
            AttentionSpec(2, 1, 256, window=300, soft_cap=9.0), "float8_e4m3fn",
            sink_tokens=4, max_query=1,
        ),
        "71 heads": paged(AttentionSpec(71, 1, 64, alibi=AlibiSpec(bfloat16=True)), max_query=1),
        "128 heads, 8 of keys": paged(AttentionSpec(128, 8, 64), tokens=40, store=True, chip=chip),
        "96 heads": paged(
            AttentionSpec(96, 96, 128), page_size=256, store=True, chip=chip, max_query=1
        ),
        "80 features": paged(AttentionSpec(4, 2, 80), tokens=20, max_query=4),
        "w8a16, one row": product(1, Mode.W8A16, "out_in"),
        "w8a16, rows": product(300, Mode.W8A16, "in_out"),
        "experts, w8a16": lambda: experts(shaped, Mode.W8A16),
        "experts, w8a8": lambda: experts(shaped, Mode.W8A8, 2000),
        "w8a8": product(300, Mode.W8A8, "in_out"),
    }  # fmt: skip


def main(chip: str) -> None:
    found = {}
    for name, compile_case in cases(chip).items():
        try:
            memory = compile_case().memory_analysis()
        except Exception as error:  # the test asks which cases a chip refuses, and why
            found[name] = {"error": str(error)[:500]}
        else:
            found[name] = {
                "arguments": memory.argument_size_in_bytes,
                "aliased": memory.alias_size_in_bytes,
            }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
