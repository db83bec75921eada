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
from jaxserve.partitioning.collectives import Comm


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
        """Returns an empty cache for `batch` sequences of `slots` tokens; on a mesh, a device's."""
        turns = config.num_layers // len(config.pattern)
        found = []
        for layer in config.pattern:
            spec = comm.local(declare.attention(layer.attention))
            shape = turns, comm.rows(batch), spec.num_kv_heads, slots, spec.head_dim
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
        stripe: object | None = None,
    ) -> tuple[Array, SlabCache]:
        """Returns (attention of q[T, N, H] as [T, N, H], the cache holding k and v[T, K, H]).

        A step of several tokens a row is the first of its sequences.

        Raises:
            UnsupportedError: sink tokens are kept besides a window, or a device keeps a share of
                every sequence.
        """
        assert self.positions is not None and layer.turn is not None
        if stripe is not None:
            raise UnsupportedError(
                "a slab is not cut along its sequences; use store=Store.PAGES for this layout"
            )
        if spec.sink_tokens:
            raise UnsupportedError("a plan has no streaming cache; use a model without sink_tokens")
        batch, length = self.positions.shape
        new = [jnp.swapaxes(x.reshape(batch, length, *x.shape[1:]), 1, 2) for x in (k, v)]
        old = self.keys[layer.index], self.values[layer.index]
        if length == 1:
            arrays = [
                _written(x, layer.turn, self.positions[:, 0], y)
                for x, y in zip(old, new, strict=True)
            ]
            # Read when the queries are there: before, it would lie in the way of the projections.
            q, turn = lax.optimization_barrier((q, layer.turn))
            read = [lax.dynamic_index_in_dim(x, turn, 0, False) for x in arrays]
        else:
            zero = jnp.zeros((), jnp.int32)
            start = layer.turn, zero, zero, zero, zero
            arrays = [
                lax.dynamic_update_slice(x, y[None], start) for x, y in zip(old, new, strict=True)
            ]
            read = new
        slots = jnp.arange(read[0].shape[2], dtype=jnp.int32)[None, :]
        out = kernels.attention(
            q.reshape(batch, length, *q.shape[1:]),
            *read,
            self.positions,
            jnp.broadcast_to(slots, (batch, slots.shape[1])),
            spec,
            own=length > 1,
            slopes=slopes,
        )
        keys = tuple(arrays[0] if i == layer.index else x for i, x in enumerate(self.keys))
        values = tuple(arrays[1] if i == layer.index else x for i, x in enumerate(self.values))
        return out.reshape(q.shape), replace(self, keys=keys, values=values)

    def end(self) -> SlabCache:
        """Returns the cache without positions."""
        return replace(self, positions=None)


def _written(slab: Array, turn: Array, positions: Array, new: Array) -> Array:
    """Returns [turns, B, K, S, H] with new[B, K, 1, H] at each row's position."""
    rows = jnp.arange(positions.shape[0], dtype=jnp.int32)
    place = jnp.where(positions >= 0, positions, slab.shape[3])
    return slab.at[turn, rows, :, place].set(new[:, :, 0], mode="drop")
