"""What attention sees of earlier tokens.

`DenseCache` is the plain form: one row per sequence, one slot per token, every row writing the
same slot. Slots carry positions, so rows of different length share a batch: a slot whose
position is -1 is never attended.

    cache = DenseCache.create(config, batch=2, slots=256, dtype="bfloat16")
    cache = cache.begin(step)                               # this step's tokens get their slots
    out, cache = cache.attend(layer, q, k, v, spec, kernels)      # in every layer
    cache = cache.end()
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol, Self, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxserve.config import AttentionSpec, ModelConfig, cache_spec
from jaxserve.layers.step import Step
from jaxserve.pallas_kernels import KernelSet


class Cache(Protocol):
    """Earlier keys and values, however they are kept."""

    def begin(self, step: Step) -> Self:
        """Returns the cache with places for the step's tokens."""
        ...

    def attend(
        self,
        layer: int,
        q: Array,
        k: Array,
        v: Array,
        spec: AttentionSpec,
        kernels: KernelSet,
        sink_q: Array | None = None,
    ) -> tuple[Array, Self]:
        """Returns (attention of q[T, N, H] as [T, N, H], the cache holding k and v[T, K, H]).

        Args:
            sink_q: [T, N, H], the queries as they meet the sink tokens of a streaming cache.
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
        layer: int,
        q: Array,
        k: Array,
        v: Array,
        spec: AttentionSpec,
        kernels: KernelSet,
        sink_q: Array | None = None,
    ) -> tuple[Array, NoCache]:
        """Returns (causal attention within each sequence, itself)."""
        assert self.positions is not None
        out = kernels.attention(
            _by_sequence(q, self.batch),
            _heads_first(k, self.batch),
            _heads_first(v, self.batch),
            self.positions,
            self.positions,
            spec,
            own=True,
        )
        return out.reshape(q.shape), self

    def end(self) -> NoCache:
        """Returns the cache without positions."""
        return replace(self, positions=None)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DenseCache:
    """Keys and values of a batch of sequences in arrays of fixed length.

    Attributes:
        keys, values: one [B, K, S, H] per layer.
        slot_positions: int32[B, S], position of the token in each slot, -1 where empty.
        slot: int32[], first free slot, the same for all rows.
        pending: tokens per row of the step under way.
        empty: nothing is stored yet, so a step sees only its own tokens.
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    slot_positions: Array
    slot: Array
    pending: int = field(default=0, metadata={"static": True})
    empty: bool = field(default=True, metadata={"static": True})

    @classmethod
    def create(cls, config: ModelConfig, batch: int, slots: int, dtype: str) -> DenseCache:
        """Returns an empty cache for `batch` sequences of at most `slots` tokens."""

        def zeros() -> tuple[Array, ...]:
            specs = (cache_spec(layer.attention, dtype) for layer in config.layers)
            shapes = (spec.token_shape for spec in specs)
            return tuple(jnp.zeros((batch, heads, slots, head), dtype) for _, heads, head in shapes)

        return cls(zeros(), zeros(), jnp.full((batch, slots), -1, jnp.int32), jnp.int32(0))

    def begin(self, step: Step) -> DenseCache:
        """Returns the cache with the step's positions in the next free slots."""
        positions = step.positions.reshape(self.slot_positions.shape[0], -1)
        marked = lax.dynamic_update_slice(self.slot_positions, positions, (0, self.slot))
        return replace(self, slot_positions=marked, pending=positions.shape[1])

    def attend(
        self,
        layer: int,
        q: Array,
        k: Array,
        v: Array,
        spec: AttentionSpec,
        kernels: KernelSet,
        sink_q: Array | None = None,
    ) -> tuple[Array, DenseCache]:
        """Returns (attention of q over all slots up to its position, the cache)."""
        batch = self.slot_positions.shape[0]
        new_k, new_v = _heads_first(k, batch), _heads_first(v, batch)
        at = (0, 0, self.slot, 0)
        keys = lax.dynamic_update_slice(self.keys[layer], new_k.astype(self.keys[layer].dtype), at)
        values = lax.dynamic_update_slice(
            self.values[layer], new_v.astype(self.values[layer].dtype), at
        )
        own = lax.dynamic_slice_in_dim(self.slot_positions, self.slot, self.pending, 1)
        stored = keys, values, own, self.slot_positions
        seen = (new_k, new_v, own, own) if self.empty else stored
        out = kernels.attention(_by_sequence(q, batch), *seen, spec, own=self.empty)
        after = replace(
            self,
            keys=_replaced(self.keys, layer, keys),
            values=_replaced(self.values, layer, values),
        )
        return out.reshape(q.shape), after

    def end(self) -> DenseCache:
        """Returns the cache with the step's slots taken."""
        return replace(self, slot=self.slot + self.pending, pending=0, empty=False)

    def grown(self, slots: int) -> DenseCache:
        """Returns the cache with room for `slots` tokens a row, the new slots empty."""
        extra = slots - self.slot_positions.shape[1]
        pad = ((0, 0), (0, 0), (0, extra), (0, 0))
        return replace(
            self,
            keys=tuple(jnp.pad(k, pad) for k in self.keys),
            values=tuple(jnp.pad(v, pad) for v in self.values),
            slot_positions=jnp.pad(self.slot_positions, ((0, 0), (0, extra)), constant_values=-1),
        )


def _by_sequence(x: Array, batch: int) -> Array:
    """Returns x[B * L, heads, H] as [B, L, heads, H]."""
    return x.reshape(batch, -1, *x.shape[1:])


def _heads_first(x: Array, batch: int) -> Array:
    """Returns x[B * L, heads, H] as [B, heads, L, H]."""
    return jnp.swapaxes(_by_sequence(x, batch), 1, 2)


def _replaced(items: tuple[Array, ...], index: int, item: Array) -> tuple[Array, ...]:
    return (*items[:index], item, *items[index + 1 :])
