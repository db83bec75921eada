"""Normalisation over the features."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from jaxserve.config import NormKind, NormSpec
from jaxserve.layers.param import Axis, Declare, Init
from jaxserve.layers.sums import row_sum
from jaxserve.partitioning.collectives import Comm
from jaxserve.partitioning.layout import Stage


class Norm(nnx.Module):
    """RMSNorm or LayerNorm; statistics in float32, summed over the shards of the features."""

    def __init__(self, spec: NormSpec, axis: Axis, declare: Declare) -> None:
        self.spec = spec
        self.size = axis.size
        self.scale = declare.vector(axis, Init.ZEROS if spec.unit_offset else Init.ONES)
        self.bias = declare.vector(axis, Init.ZEROS) if spec.bias else None

    @jax.named_scope("norm")
    def __call__(self, x: Array, comm: Comm, stage: Stage) -> Array:
        """Returns x[T, features] of a stage normalised, in x's dtype."""
        h = x.astype(jnp.float32)
        if self.spec.kind is NormKind.LAYER:
            h = h - comm.total(row_sum(h)[..., None], stage) / self.size
        mean_square = comm.total(row_sum(h * h)[..., None], stage) / self.size
        h = h * lax.rsqrt(mean_square + self.spec.eps)
        scale = comm.vector(self.scale[...], stage).astype(jnp.float32)
        scale = 1.0 + scale if self.spec.unit_offset else scale
        h = h * jnp.broadcast_to(scale, h.shape)
        if self.bias is not None:
            bias = comm.vector(self.bias[...], stage).astype(jnp.float32)
            h = h + jnp.broadcast_to(bias, h.shape)
        return h.astype(x.dtype)
