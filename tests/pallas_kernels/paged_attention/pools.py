"""Sequences with random queries, keys and values, laid into pages in random order."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.config import AttentionSpec, cache_spec
from jaxserve.pallas_kernels import kernel_set

LONGEST = 700


@dataclass(frozen=True)
class Run:
    """New tokens of one sequence: `count` from position `start` on; the rest is in the cache."""

    sequence: int
    start: int
    count: int


@dataclass(frozen=True)
class Pool:
    """How sequences lie in pages.

    Attributes:
        spec, dtype: of the attention.
        page_size: tokens of a page.
        width: columns of the page table.
        pinned_pages: leading columns that never turn.
        backend: of the kernels.
        first_page: the pages of the pool before it stay unused.
        written: sequences are written this many tokens at a time.
        pages_dtype: of the pages; None takes `dtype`.
    """

    spec: AttentionSpec
    dtype: str = "float32"
    page_size: int = 16
    width: int = 48
    pinned_pages: int = 0
    backend: str = "xla"
    first_page: int = 1
    written: int = LONGEST
    pages_dtype: str | None = None

    def call(
        self,
        runs: Sequence[Run],
        padding: int = 0,
        options: dict[str, Any] | None = None,
        static: tuple[tuple[str, Any], ...] = (),
    ) -> Any:
        """Returns paged attention of the runs and `padding` more tokens, as float32 arrays."""
        tokens = [read(self.spec, run.sequence) for run in runs]
        table, pages = self.filled(
            [run.sequence for run in runs], [r.start + r.count for r in runs]
        )
        shape = padding, self.spec.num_heads, self.spec.head_dim
        queries = [t.q[r.start : r.start + r.count] for t, r in zip(tokens, runs, strict=True)]
        q = np.concatenate([*queries, np.ones(shape, np.float32)])
        positions = [np.arange(r.start, r.start + r.count) for r in runs]
        q_pos = np.concatenate([*positions, np.full(padding, -1)]).astype(np.int32)
        starts = np.cumsum([0, *(r.count for r in runs)]).astype(np.int32)
        lengths = np.array([r.start + r.count for r in runs], np.int32)
        arrays = jnp.asarray(q, self.dtype), pages, table, starts, lengths, q_pos, options or {}
        out = compiled(self, static)(*arrays)
        return jax.tree.map(lambda x: np.asarray(x.astype(jnp.float32)), out)

    def filled(self, sequences: Sequence[int], lengths: Sequence[int]) -> tuple[Any, Any]:
        """Returns (page tables, pages) with the first tokens of some sequences."""
        kernels = kernel_set(self.backend)
        rows = len(sequences)
        num_pages = self.first_page + rows * self.width
        ids = np.random.default_rng(rows).permutation(np.arange(self.first_page, num_pages))
        table = jnp.asarray(ids.reshape(rows, self.width), jnp.int32)
        spec = cache_spec(self.spec, self.pages_dtype or self.dtype)
        pages = kernels.init_pages(num_pages, self.page_size, spec)
        for row, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
            tokens = read(self.spec, sequence)
            for start in range(0, length, self.written):
                # One shape for every piece, its tail padding.
                at = start + np.arange(self.written)
                positions = np.where(at < length, at, -1).astype(np.int32)
                k, v = (jnp.asarray(x[at % LONGEST], self.dtype) for x in (tokens.k, tokens.v))
                pages = writer(self)(pages, k, v, table, np.full_like(positions, row), positions)
        return table, pages


@dataclass(frozen=True)
class Tokens:
    """Queries, keys and values of one sequence by position."""

    q: np.ndarray = field(repr=False)
    k: np.ndarray = field(repr=False)
    v: np.ndarray = field(repr=False)


@cache
def read(spec: AttentionSpec, sequence: int) -> Tokens:
    """Returns the tokens of a sequence, the same at every call."""
    rng = np.random.default_rng(sequence)
    heads = spec.num_heads, spec.num_kv_heads, spec.num_kv_heads
    return Tokens(*(rng.normal(size=(LONGEST, n, spec.head_dim)).astype(np.float32) for n in heads))


@cache
def compiled(pool: Pool, static: tuple[tuple[str, Any], ...]) -> Any:
    kernels = kernel_set(pool.backend)

    def attend(
        q: Any, pages: Any, table: Any, starts: Any, lengths: Any, q_pos: Any, options: Any
    ) -> Any:
        return kernels.paged_attention(
            q,
            pages,
            table,
            starts,
            lengths,
            q_pos,
            pool.spec,
            page_size=pool.page_size,
            pinned_pages=pool.pinned_pages,
            **options,
            **dict(static),
        )

    return jax.jit(attend)


@cache
def writer(pool: Pool) -> Any:
    kernels = kernel_set(pool.backend)

    def write(pages: Any, k: Any, v: Any, table: Any, rows: Any, positions: Any) -> Any:
        return kernels.write_pages(
            pages,
            k,
            v,
            table,
            rows,
            positions,
            page_size=pool.page_size,
            pinned_pages=pool.pinned_pages,
        )

    return jax.jit(write, donate_argnums=0)
