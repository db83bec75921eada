"""Keys and values of a planned step, without pages.

How keys and values lie in memory is the choice of a kernel. For programs that are compiled to be
read, not run, this cache is the least there is: one array for keys and one for values, written in
place, read once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxserve.config import AttentionSpec, ModelConfig
from jaxserve.errors import UnsupportedError
from jaxserve.layers.cache import At
from jaxserve.layers.param import Declare
from jaxserve.layers.step import Step
from jaxserve.pallas_kernels import KernelSet
from jaxserve.pallas_kernels.attention.scores import capped, visible
from jaxserve.partitioning.collectives import Comm
from jaxserve.partitioning.stripe import Stripe


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SlabCache:
    """Keys and values of layers that repeat, by position.

    Attributes:
        keys, values: per layer of the pattern, [turns, B, K, S, H].
        positions: int32[B, L] of the step under way.
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    positions: Array | None = None

    @classmethod
    def create(
        cls, config: ModelConfig, batch: int, slots: int, declare: Declare, comm: Comm
    ) -> SlabCache:
        """Returns an empty cache for `batch` sequences of `slots` tokens; on a mesh, a device's.

        Sequences that are cut lie in one run on each device.
        """
        turns = config.num_layers // len(config.pattern)
        found = []
        for layer in config.pattern:
            spec = comm.local(declare.attention(layer.attention))
            own = -(-slots // comm.num_stripes)
            shape = turns, comm.rows(batch), spec.num_kv_heads, own, spec.head_dim
            found.append(jnp.zeros(shape, declare.dtype))
        return cls(tuple(found), tuple(found))

    def begin(self, step: Step) -> SlabCache:
        """Returns the cache with the step's positions, a row's tokens in order."""
        return replace(self, positions=step.positions.reshape(self.keys[0].shape[1], -1))

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
    ) -> tuple[Array, SlabCache]:
        """Returns (attention of q[T, N, H] as [T, N, H], the cache holding k and v[T, K, H]).

        A step of several tokens a row is the first of its sequences.

        Raises:
            UnsupportedError: sink tokens are kept besides a window.
        """
        assert self.positions is not None and layer.turn is not None
        if spec.sink_tokens:
            raise UnsupportedError("a plan has no streaming cache; use a model without sink_tokens")
        batch, length = self.positions.shape
        size = self.keys[layer.index].shape[3]
        first = jnp.zeros((), jnp.int32) if stripe is None else stripe.index * size
        new = [jnp.swapaxes(x.reshape(batch, length, *x.shape[1:]), 1, 2) for x in (k, v)]
        old = self.keys[layer.index], self.values[layer.index]
        if length == 1:
            places = self.positions[:, 0] - first
            arrays = [_written(x, layer.turn, places, y) for x, y in zip(old, new, strict=True)]
            # Read when the queries are there: before, it would lie in the way of the projections.
            q, turn = lax.optimization_barrier((q, layer.turn))
            read = [lax.dynamic_index_in_dim(x, turn, 0, False) for x in arrays]
        else:
            read = new if stripe is None else [_share(x, stripe.count, first, size) for x in new]
            zero = jnp.zeros((), jnp.int32)
            start = layer.turn, zero, zero, zero, zero
            arrays = [
                lax.dynamic_update_slice(x, y[None], start) for x, y in zip(old, read, strict=True)
            ]
        grouped = q.reshape(batch, length, *q.shape[1:])
        slots = first + jnp.arange(read[0].shape[2], dtype=jnp.int32)[None, :]
        slots = jnp.broadcast_to(slots, (batch, slots.shape[1]))
        if stripe is None:
            out = kernels.attention(
                grouped, *read, self.positions, slots, spec, own=length > 1, slopes=slopes
            )
        else:
            part, lse = _partial_attention(grouped, read[0], read[1], self.positions, slots, spec)
            out = stripe.merged(part.reshape(q.shape), lse.reshape(q.shape[:2]))
        keys = tuple(arrays[0] if i == layer.index else x for i, x in enumerate(self.keys))
        values = tuple(arrays[1] if i == layer.index else x for i, x in enumerate(self.values))
        return out.reshape(q.shape), replace(self, keys=keys, values=values)

    def end(self) -> SlabCache:
        """Returns the cache without positions."""
        return replace(self, positions=None)


def _written(slab: Array, turn: Array, positions: Array, new: Array) -> Array:
    """Returns [turns, B, K, S, H] with new[B, K, 1, H] at each row's position, if it is here."""
    rows = jnp.arange(positions.shape[0], dtype=jnp.int32)
    place = jnp.where(positions >= 0, positions, slab.shape[3])
    return slab.at[turn, rows, :, place].set(new[:, :, 0], mode="drop")


def _share(new: Array, count: int, first: Array, size: int) -> Array:
    """Returns [B, K, size, H] of the first tokens [B, K, L, H] of sequences, from `first` on."""
    pad = [(0, 0), (0, 0), (0, count * size - new.shape[2]), (0, 0)]
    return lax.dynamic_slice_in_dim(jnp.pad(new, pad), first, size, 2)


def _partial_attention(
    q: Array, k: Array, v: Array, q_positions: Array, k_positions: Array, spec: AttentionSpec
) -> tuple[Array, Array]:
    """Returns attention over these keys, and float32[B, L, N], log of the sum of its weights."""
    batch, length, heads, _ = q.shape
    grouped = q.reshape(batch, length, k.shape[1], -1, q.shape[3])
    wide = jnp.dtype("float32")
    scores = jnp.einsum("BLKGH,BKSH->BKGLS", grouped, k, preferred_element_type=wide)
    scores = capped(scores * spec.score_scale, spec)
    mask = visible(q_positions, k_positions, spec.window)[:, None, None]
    scores = jnp.where(mask, scores, -jnp.inf)
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0.0))
    total = jnp.sum(weights, axis=-1)
    sums = jnp.einsum("BKGLS,BKSH->BLKGH", weights.astype(v.dtype), v, preferred_element_type=wide)
    lse = jnp.moveaxis(top[..., 0] + jnp.log(total), 3, 1).reshape(batch, length, heads)
    total = jnp.moveaxis(jnp.maximum(total, 1e-30), 3, 1)[..., None]
    return (sums / total).reshape(q.shape).astype(q.dtype), lse
