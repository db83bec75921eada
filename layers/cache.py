"""What attention sees of earlier tokens.

`DenseCache` is the plain form: one row per sequence, the token of position p in place p of its
row, so rows of different length share a batch. A token whose position is -1 is padding and kept
nowhere.

    cache = DenseCache.create(config, 2, 256, declare, comm, kernels)   # 2 rows of 256 tokens
    cache = cache.begin(step)                               # this step's tokens get their places
    out, cache = cache.attend(layer, q, k, v, spec, kernels)      # in every layer
    cache = cache.end()
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, Self, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from jaxserve.config import AttentionSpec, ModelConfig, cache_spec
from jaxserve.errors import UnsupportedError, UsageError
from jaxserve.layers.param import Declare
from jaxserve.layers.step import Step
from jaxserve.pallas_kernels import KernelSet
from jaxserve.pallas_kernels.paged_attention.places import Extra
from jaxserve.partitioning.collectives import Comm
from jaxserve.partitioning.stripe import Stripe

PAGE_SIZE = 128
"""Places of a row come in such numbers."""


@dataclass(frozen=True)
class At:
    """Which layer: its index or, where layers repeat, that in the pattern and the turn int32[]."""

    index: int
    turn: Array | None = None


class Cache(Protocol):
    """Earlier keys and values, however they are kept."""

    def begin(self, step: Step) -> Self:
        """Returns the cache with places for the step's tokens."""
        ...

    def attend(
        self,
        layer: At,
        q: Array,
        k: Array,
        v: Array,
        spec: AttentionSpec,
        kernels: KernelSet,
        sink_q: Array | None = None,
        slopes: Array | None = None,
        stripe: Stripe | None = None,
    ) -> tuple[Array, Self]:
        """Returns (attention of q[T, N, H] as [T, N, H], the cache holding k and v[T, K, H]).

        Args:
            sink_q: [T, N, H], the queries as they meet the sink tokens of a streaming cache.
            slopes: float32[N], ALiBi's, where the spec has it.
            stripe: the share of every page that is kept here; None keeps pages whole.
        """
        ...

    def end(self) -> Self:
        """Returns the cache ready for the next step."""
        ...


AnyCache = TypeVar("AnyCache", bound=Cache)
"""The kind of cache that goes into a forward is the kind that comes out."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NoCache:
    """Nothing earlier: the tokens of a step are whole sequences that attend to themselves.

    Attributes:
        batch: number of sequences, all of length T / batch.
        positions: int32[batch, T / batch] within a step.
    """

    batch: int = field(metadata={"static": True})
    positions: Array | None = None

    def begin(self, step: Step) -> NoCache:
        """Returns the cache with the step's positions."""
        return replace(self, positions=step.positions.reshape(self.batch, -1))

    def attend(
        self,
        layer: At,
        q: Array,
        k: Array,
        v: Array,
        spec: AttentionSpec,
        kernels: KernelSet,
        sink_q: Array | None = None,
        slopes: Array | None = None,
        stripe: Stripe | None = None,
    ) -> tuple[Array, NoCache]:
        """Returns (causal attention within each sequence, itself)."""
        assert self.positions is not None
        _check_sinks(spec, self.positions.shape[1])
        out = kernels.attention(
            _by_sequence(q, self.batch),
            _heads_first(k, self.batch),
            _heads_first(v, self.batch),
            self.positions,
            self.positions,
            spec,
            own=True,
            slopes=slopes,
        )
        return out.reshape(q.shape), self

    def end(self) -> NoCache:
        """Returns the cache without positions."""
        return replace(self, positions=None)


class Striped(NamedTuple):
    """A step's positions as the pages kept here have them, and what attention is asked for.

    Attributes:
        kept, seen: int32[T], where a token is written and the last key that it sees.
        page_size: tokens of a page that are kept here.
        stripe: the share of every page that is kept here; None keeps pages whole.
    """

    kept: Array
    seen: Array
    page_size: int
    stripe: Stripe | None

    @classmethod
    def of(cls, positions: Array, page_size: int, stripe: Stripe | None) -> Striped:
        """Returns the positions themselves where pages are whole."""
        if stripe is None:
            return cls(positions, positions, page_size, None)
        kept, seen = stripe.kept(positions, page_size), stripe.seen(positions, page_size)
        return cls(kept, seen, page_size // stripe.count, stripe)

    def attend(
        self,
        kernels: KernelSet,
        new: tuple[Array, Array, Array],
        pages: Any,
        places: tuple[Array, Array, Array],
        kv_len: Array,
        spec: AttentionSpec,
        pinned_pages: int = 0,
        **options: Any,
    ) -> tuple[Array, Any]:
        """Returns (attention over the keys of all devices, the pages with the new tokens).

        Args:
            new: (q, k, v) of the step's tokens.
            places: (page table, row of each token, first token of each row).
            kv_len: int32[B], keys of each row that are kept here.
            options: see `paged_attention.reference`.
        """
        q, k, v = new
        table, row_of_token, q_start = places
        cut = {"page_size": self.page_size, "pinned_pages": pinned_pages}
        options |= cut | {"sink_tokens": spec.sink_tokens}
        if self.stripe is None:
            return kernels.write_and_attend(
                q, k, v, pages, table, row_of_token, q_start, kv_len, self.seen, spec, **options
            )
        pages = kernels.write_pages(pages, k, v, table, row_of_token, self.kept, **cut)
        found = kernels.paged_attention(
            q, pages, table, q_start, kv_len, self.seen, spec, outputs=(Extra.LSE,), **options
        )
        return self.stripe.merged(*found), pages


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DenseCache:
    """Keys and values of a batch of sequences of fixed greatest length, by position.

    It lies in pages that are given out in advance, so that a token's attention has the bits that
    it has when pages are given out as they are needed.

    Attributes:
        pages: per layer, as the kernels keep them; of layers that repeat, one after the other.
        table: int32[B, W], pages of each row.
        positions: int32[B * L] of the step under way.
    """

    pages: tuple[Any, ...]
    table: Array
    positions: Array | None = None

    @classmethod
    def create(
        cls,
        config: ModelConfig,
        batch: int,
        slots: int,
        declare: Declare,
        comm: Comm,
        kernels: KernelSet,
    ) -> DenseCache:
        """Returns an empty cache for `batch` sequences of at least `slots` tokens.

        On a mesh it is that of one device.

        Raises:
            UsageError: sequences, or the pieces of a page, do not divide over the devices.
        """
        width = -(-slots // PAGE_SIZE)
        batch = comm.rows(batch)
        table = jnp.arange(batch * width, dtype=jnp.int32).reshape(batch, width)
        turns = config.num_layers // len(config.pattern) if declare.stack else 1
        layers = config.pattern if declare.stack else config.layers
        own = (comm.local(declare.attention(layer.attention)) for layer in layers)
        specs = (cache_spec(spec, declare.cache_dtype) for spec in own)
        if PAGE_SIZE % comm.num_stripes:
            raise UsageError(
                f"pages of {PAGE_SIZE} tokens do not divide over {comm.num_stripes} devices along "
                f"x; use attention='sequence' with an x that divides {PAGE_SIZE}"
            )
        size = PAGE_SIZE // comm.num_stripes
        pages = tuple(kernels.init_pages(turns * table.size, size, spec) for spec in specs)
        return cls(pages, table)

    def begin(self, step: Step) -> DenseCache:
        """Returns the cache with the step's positions, a row's tokens in order."""
        return replace(self, positions=step.positions)

    def attend(
        self,
        layer: At,
        q: Array,
        k: Array,
        v: Array,
        spec: AttentionSpec,
        kernels: KernelSet,
        sink_q: Array | None = None,
        slopes: Array | None = None,
        stripe: Stripe | None = None,
    ) -> tuple[Array, DenseCache]:
        """Returns (attention of q over its row up to its position, the cache with k and v)."""
        assert self.positions is not None
        batch = self.table.shape[0]
        length = q.shape[0] // batch
        row = jnp.arange(batch + 1, dtype=jnp.int32)
        table = self.table
        if layer.turn is not None:
            table = table + layer.turn * table.size
        step = Striped.of(self.positions, PAGE_SIZE, stripe)
        out, pages = step.attend(
            kernels,
            (q, k, v),
            self.pages[layer.index],
            (table, jnp.repeat(row[:-1], length), row * length),
            jnp.max(step.seen.reshape(batch, length), axis=1) + 1,
            spec,
            q_sink=sink_q,
            slopes=slopes,
            max_query=length,
        )
        return out, replace(self, pages=_replaced(self.pages, layer.index, pages))

    def end(self) -> DenseCache:
        """Returns the cache without positions."""
        return replace(self, positions=None)


def _check_sinks(spec: AttentionSpec, num_tokens: int) -> None:
    """Checks that sequences end before the window leaves the sink tokens behind.

    Raises:
        UnsupportedError: they do not.
    """
    if spec.sink_tokens and spec.window is not None and num_tokens > spec.window:
        raise UnsupportedError(
            f"sequences of {num_tokens} tokens are longer than the window of {spec.window}, and "
            f"only the engine keeps sink_tokens={spec.sink_tokens} besides a window; use generate, "
            "whose prompt_logprobs score a prompt, or shorter sequences"
        )


def _by_sequence(x: Array, batch: int) -> Array:
    """Returns x[B * L, heads, H] as [B, L, heads, H]."""
    return x.reshape(batch, -1, *x.shape[1:])


def _heads_first(x: Array, batch: int) -> Array:
    """Returns x[B * L, heads, H] as [B, heads, L, H]."""
    return jnp.swapaxes(_by_sequence(x, batch), 1, 2)


def _replaced(items: tuple[Any, ...], index: int, item: Any) -> tuple[Any, ...]:
    return (*items[:index], item, *items[index + 1 :])
