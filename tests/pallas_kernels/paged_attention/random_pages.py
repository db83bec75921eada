"""The TPU kernel beside the definition, on the same random pages."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxserve.config import AttentionSpec
from jaxserve.pallas_kernels.paged_attention import reference, tpu
from jaxserve.pallas_kernels.paged_attention.mosaic import row_lanes, value_lane
from jaxserve.pallas_kernels.paged_attention.places import Extra
from jaxserve.pallas_kernels.paged_attention.tiles import Tile

SMALL = Tile(128, 128, 16)
"""Blocks so small that short sequences have several."""


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        runs: (tokens before, new tokens) of each sequence.
        sinks, pinned: sink tokens and pinned pages.
        options: the call's arrays by name: q_sink, sink_logits, mask, scales.
        tokens: packed tokens, the rest padding; None adds three.
    """

    spec: AttentionSpec
    runs: Sequence[tuple[int, int]]
    page_size: int = 16
    width: int = 20
    dtype: str = "float32"
    pages_dtype: str | None = None
    sinks: int = 0
    pinned: int = 0
    options: Sequence[str] = ()
    max_query: int | None = None
    tokens: int | None = None


class Both(NamedTuple):
    """(attention, lse) of the kernel and of the definition."""

    found: tuple[np.ndarray, np.ndarray]
    wanted: tuple[np.ndarray, np.ndarray]

    def check(self, atol: float = 2e-6) -> None:
        """Fails where they differ."""
        for found, wanted in zip(self.found, self.wanted, strict=True):
            np.testing.assert_allclose(found, wanted, atol=atol, rtol=atol)
        assert np.abs(self.wanted[0]).max() > 0.01


def filled(case: Case, rng: np.random.Generator) -> tuple[reference.Pages, tpu.Pages]:
    """Returns the same numbers as the definition keeps them and as the kernel does."""
    heads, head = case.spec.num_kv_heads, case.spec.head_dim
    count = len(case.runs) * case.width + 1
    dtype = jnp.dtype(case.pages_dtype or case.dtype)
    shape = count, case.page_size, heads, head
    factor = 40 if dtype == jnp.int8 else 1
    k, v = (jnp.asarray(rng.normal(size=shape) * factor, dtype) for _ in range(2))
    rows = np.zeros((count, heads, case.page_size, row_lanes(head)), dtype)
    for lane, x in zip((0, value_lane(head)), (k, v), strict=True):
        rows[..., lane : lane + head] = np.asarray(x).transpose(0, 2, 1, 3)
    if dtype.itemsize > 1:
        return reference.Pages(k, v), tpu.Pages(jnp.asarray(rows))
    scales = rng.uniform(0.5, 1.5, (2, *shape[:3])).astype(np.float32) / factor
    flat = scales.transpose(1, 0, 3, 2).reshape(count, -1)
    keys, values = map(jnp.asarray, scales)
    return (
        reference.Pages(k, v, (keys, values)),
        tpu.Pages(jnp.asarray(rows), jnp.asarray(flat)),
    )


def arrays(case: Case, rng: np.random.Generator) -> tuple[Any, ...]:
    """Returns (q, page table, q_start, kv_len, q_pos)."""
    counts = [new for _, new in case.runs]
    tokens = case.tokens or sum(counts) + 3
    rows = len(case.runs)
    ids = rng.permutation(np.arange(1, rows * case.width + 1)).reshape(rows, case.width)
    positions = [np.arange(old, old + new) for old, new in case.runs]
    padding = np.full(tokens - sum(counts), -1)
    q = rng.normal(size=(tokens, case.spec.num_heads, case.spec.head_dim))
    return (
        jnp.asarray(q, case.dtype),
        ids.astype(np.int32),
        np.cumsum([0, *counts]).astype(np.int32),
        np.array([old + new for old, new in case.runs], np.int32),
        np.concatenate([*positions, padding]).astype(np.int32),
    )


def options(case: Case, rng: np.random.Generator, tokens: int) -> dict[str, Any]:
    heads, kv_heads = case.spec.num_heads, case.spec.num_kv_heads
    count = len(case.runs) * case.width + 1
    tree = rng.random((tokens, 5)) < 0.7
    tree[:, 0] = True
    scale = rng.uniform(0.5, 1.5, (2, count, kv_heads)).astype(np.float32)
    known = {
        "q_sink": jnp.asarray(rng.normal(size=(tokens, heads, case.spec.head_dim)), case.dtype),
        "sink_logits": rng.normal(size=heads).astype(np.float32),
        "mask": tree,
        "scales": (jnp.asarray(scale[0]), jnp.asarray(scale[1])),
    }
    return {name: known[name] for name in case.options}


def both(
    case: Case, tile: Tile = SMALL, interpret: Any = None, seed: int = 0, lse: bool = True
) -> Both:
    """Returns what kernel and definition make of the same call."""
    rng = np.random.default_rng(seed)
    plain, rows = filled(case, rng)
    q, *others = arrays(case, rng)
    table, q_start, kv_len, q_pos = others
    rest = table, q_start, kv_len, q_pos, case.spec
    given: dict[str, Any] = {
        "page_size": case.page_size,
        "pinned_pages": case.pinned,
        "sink_tokens": case.sinks,
        "max_query": case.max_query,
        "outputs": (Extra.LSE,),
        **options(case, rng, q.shape[0]),
    }
    wanted = reference.paged_attention(q, plain, *rest, **given)
    if not lse:
        given["outputs"] = ()
    found = tpu.paged_attention(q, rows, *rest, **given, tile=tile, interpret=interpret)
    found = found if lse else (found, wanted[1])

    def floats(pair: Any) -> tuple[np.ndarray, np.ndarray]:
        out, log = (np.asarray(x.astype(jnp.float32)) for x in pair)
        return out, log

    return Both(floats(found), floats(wanted))
