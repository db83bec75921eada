"""Definition of ragged_matmul: float32 throughout, every row with every weight."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from jaxserve.pallas_kernels.int8_matmul import Mode
from jaxserve.pallas_kernels.int8_matmul.reference import scaled_rows


def ragged_matmul(
    x: Array,
    w: Array,
    sizes: Array,
    dtype: DTypeLike,
    *,
    scales: Array | None = None,
    mode: Mode = Mode.W8A16,
) -> Array:
    """Returns [M, N] in `dtype`: row m of x[M, K] contracted with the weight of its group.

    Args:
        w: [E, N, K].
        sizes: int32[E], rows of each group, one group after the other; rows that are left over
            at the end belong to none and give zeros.
        scales: float32[E, N], factor of each output channel of a weight of int8.
        mode: what becomes of x where there are scales.
    """
    x = x.astype(jnp.float32)
    factor = jnp.ones(x.shape[0], jnp.float32)
    if scales is not None and mode is Mode.W8A8:
        x, factor = scaled_rows(x, 1)
        x = jnp.round(x)
    ends = jnp.cumsum(sizes)
    row = jnp.arange(x.shape[0], dtype=jnp.int32)[:, None]
    mine = (row >= (ends - sizes)[None, :]) & (row < ends[None, :])
    every = jnp.einsum("MK,ENK->MEN", x, w.astype(jnp.float32), precision=lax.Precision.HIGHEST)
    if scales is not None:
        every = every * factor[:, None, None] * scales[None]
    return jnp.sum(jnp.where(mine[:, :, None], every, 0.0), axis=1).astype(dtype)
