"""What some models do at their ends beside lookup and logits: positions, norms, other widths."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from jaxserve.config import ModelConfig
from jaxserve.layers.linear import linear, rows_of
from jaxserve.layers.norm import Norm
from jaxserve.layers.param import Axis, Declare
from jaxserve.layers.runtime import Runtime
from jaxserve.layers.sums import row_sum
from jaxserve.pallas_kernels import KernelSet
from jaxserve.partitioning.collectives import Comm
from jaxserve.partitioning.layout import Stage


class Positions(nnx.Module):
    """A learned vector for every position, cut over a mesh as the embedding is."""

    def __init__(self, num_positions: int, embed: Axis, declare: Declare) -> None:
        self.num_positions = num_positions
        self.table = declare.table(declare.vocab(num_positions), embed)

    @jax.named_scope("positions")
    def __call__(self, positions: Array, comm: Comm) -> Array:
        """Returns [T, embed] of the residual stream; padding gets what position 0 has."""
        rows = jnp.clip(positions, 0, self.num_positions - 1)
        return rows_of(self.table, rows, comm)


class Widening(nnx.Module):
    """Linear maps between an embedding table's own features and the width.

    They are small and follow no layout of the blocks: every device holds them whole.
    """

    def __init__(self, table_dim: int, embed_dim: int, declare: Declare) -> None:
        table, width = Axis("table", table_dim), Axis("width", embed_dim)
        self.inward = declare.weight((table,), (width,))
        self.outward = declare.weight((width,), (table,))

    def enter(self, x: Array, comm: Comm, kernels: KernelSet) -> Array:
        """Returns the residual stream [T, embed] for [T, table] placed like it."""
        x = comm.move(x, Stage.RESIDUAL, Stage.WHOLE)
        return comm.move(linear(x, self.inward, comm, kernels), Stage.WHOLE, Stage.RESIDUAL)

    def leave(self, x: Array, comm: Comm, kernels: KernelSet) -> Array:
        """Returns [R, table] at `Stage.ENDS` for [R, embed] there."""
        x = comm.move(x, Stage.ENDS, Stage.WHOLE)
        return comm.move(linear(x, self.outward, comm, kernels), Stage.WHOLE, Stage.ENDS)


class Entrance(nnx.Module):
    """What becomes of embeddings before the first block; nothing, of most models."""

    def __init__(self, config: ModelConfig, embed: Axis, declare: Declare) -> None:
        self.scale = config.embed_scale
        self.positions = (
            None
            if config.num_positions is None
            else Positions(config.num_positions, embed, declare)
        )
        self.norm = None if config.embed_norm is None else Norm(config.embed_norm, embed, declare)

    def __call__(self, x: Array, positions: Array, run: Runtime) -> Array:
        """Returns the residual stream [T, embed] for embeddings placed like it."""
        if self.scale is not None:
            x = x * jnp.asarray(self.scale, x.dtype)
        if self.positions is not None:
            x = x + self.positions(positions, run.comm)
        return x if self.norm is None else self.norm(x, run.comm, Stage.RESIDUAL)


def per_unit_row(logits: Array, table: Array, scales: Array | None, comm: Comm) -> Array:
    """Returns float32[R, V], terms at `Stage.SCORED`, as if rows of table[V, embed] had length 1.

    Source: Yang et al. 2023, Baichuan 2, section 2.3 (NormHead).

    Args:
        scales: float32[V] of a table of int8.
    """
    wide = table.astype(jnp.float32)
    if scales is not None:
        wide = wide * scales[:, None]
    squares = row_sum(jnp.square(wide))[:, None]
    # The least length is that of the published code; rows that pad are zeros.
    lengths = jnp.maximum(comm.total(squares, Stage.ENDS)[:, 0], 1e-24)
    return logits * jnp.broadcast_to(lax.rsqrt(lengths), logits.shape)
