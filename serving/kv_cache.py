"""The pool of KV pages on the device, and the cache that one step sees of it.

    pages = create_pool(model, geometry, kernels)
    cache = PagedCache(pages, batch views ..., geometry)               # inside a step
    output, cache = forward(model, params, step, cache, comm, kernels, rows)

A sequence has one page table per cache group; layers of a group share it. How keys and values lie
within a page is the kernels' choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxserve.config import AttentionSpec, CacheSpec
from jaxserve.layers.cache import At, Striped
from jaxserve.layers.decoder import Model
from jaxserve.layers.step import Step
from jaxserve.pallas_kernels import KernelSet
from jaxserve.partitioning.stripe import Stripe

Pages = Any
"""Pages of one layer: whatever the kernels' `init_pages` returns."""


@dataclass(frozen=True)
class GroupGeometry:
    """Size of one cache group.

    Attributes:
        spec: what its layers keep of a token.
        layers: their indices.
        num_pages: pages in the pool.
        table_width: columns of a page table.
        pinned_pages: leading pages that hold sink tokens.
    """

    spec: CacheSpec
    layers: tuple[int, ...]
    num_pages: int
    table_width: int
    pinned_pages: int = 0


@dataclass(frozen=True)
class CacheGeometry:
    """Sizes of the pool; static in every compiled step.

    Attributes:
        page_size: tokens of a page.
        stripes: devices over which every page is cut.
    """

    page_size: int
    groups: tuple[GroupGeometry, ...]
    stripes: int = 1

    @property
    def widths(self) -> tuple[int, ...]:
        """Returns the columns of a page table by group."""
        return tuple(group.table_width for group in self.groups)

    @property
    def num_tokens(self) -> int:
        """Returns the tokens that the group with the most pages holds."""
        return max(group.num_pages for group in self.groups) * self.page_size

    @property
    def num_bytes(self) -> int:
        """Returns the bytes of all pages."""
        kept = self.page_size // self.stripes
        return sum(g.num_pages * kept * g.spec.bytes_per_token * len(g.layers) for g in self.groups)

    def group_of(self, layer: int) -> int:
        """Returns the index of the group that a layer belongs to."""
        return next(i for i, group in enumerate(self.groups) if layer in group.layers)


def create_pool(model: Model, geometry: CacheGeometry, kernels: KernelSet) -> list[Pages]:
    """Returns empty pages, one entry per layer; of layers that repeat, one per layer of a turn."""
    layers = model.config.num_layers // model.turns
    pages: list[Pages] = [None] * layers
    for group in geometry.groups:
        for layer in group.layers:
            if layer < layers:
                number = model.turns * group.num_pages
                size = geometry.page_size // geometry.stripes
                pages[layer] = kernels.init_pages(number, size, group.spec)
    return pages


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PagedCache:
    """The pool as the layers of one step see it.

    Attributes:
        pages: per layer; of layers that repeat, one after the other.
        tables: per group int32[R, W].
        row_of_token: int32[T].
        q_start: int32[R + 1], first token of each row.
        kv_len: int32[R], tokens of each sequence, this step's included.
        geometry: sizes.
        decode_only: every row has one token.
        positions: int32[T] within a step, -1 at padding.
    """

    pages: list[Pages]
    tables: tuple[Array, ...]
    row_of_token: Array
    q_start: Array
    kv_len: Array
    geometry: CacheGeometry = field(metadata={"static": True})
    decode_only: bool = field(metadata={"static": True})
    positions: Array | None = None

    def begin(self, step: Step) -> PagedCache:
        """Returns the cache with the step's positions."""
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
    ) -> tuple[Array, PagedCache]:
        """Returns (attention of q[T, N, H] over its sequences' pages, the cache with k and v)."""
        assert self.positions is not None
        place = layer.index
        index = self.geometry.group_of(place)
        group, table = self.geometry.groups[index], self.tables[index]
        if layer.turn is not None:
            table = table + layer.turn * group.num_pages
        page_size = self.geometry.page_size
        step = Striped.of(self.positions, page_size, stripe)
        out, pages = step.attend(
            kernels,
            (q, k, v),
            self.pages[place],
            (table, self.row_of_token, self.q_start),
            self.kv_len if stripe is None else stripe.seen(self.kv_len - 1, page_size) + 1,
            spec,
            group.pinned_pages,
            q_sink=sink_q,
            slopes=slopes,
            max_query=1 if self.decode_only else None,
        )
        after = [*self.pages[:place], pages, *self.pages[place + 1 :]]
        return out, replace(self, pages=after)

    def end(self) -> PagedCache:
        """Returns the cache without positions."""
        return replace(self, positions=None)


def copy_pages(
    pages: Sequence[Pages],
    geometry: CacheGeometry,
    group: int,
    source: Array,
    destination: Array,
    kernels: KernelSet,
) -> list[Pages]:
    """Returns the pool with pages int32[C] of one group copied, in all of its layers."""
    after, limits = list(pages), geometry.groups[group]
    for layer in limits.layers:
        if layer < len(pages):
            turns = len(jax.tree.leaves(after[layer])[0]) // limits.num_pages
            shift = jnp.arange(turns, dtype=jnp.int32)[:, None] * limits.num_pages
            pairs = ((x[None, :] + shift).reshape(-1) for x in (source, destination))
            after[layer] = kernels.copy_pages(after[layer], *pairs)
    return after


def padded_copies(pairs: Sequence[tuple[int, int]], size: int) -> tuple[Any, Any]:
    """Returns (source, destination) int32[size]; padding repeats the first pair.

    Without pairs a page is copied onto itself.
    """
    first = pairs[0] if pairs else (0, 0)
    source, destination = zip(*pairs, *[first] * (size - len(pairs)), strict=True)
    return np.array(source, np.int32), np.array(destination, np.int32)
