"""Definition of ragged_matmul: float32 throughout, every row with every weight."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike


def ragged_matmul(x: Array, w: Array, sizes: Array, dtype: DTypeLike) -> Array:
    """Returns [M, N] in `dtype`: row m of x[M, K] contracted with the weight of its group.

    Args:
        w: [E, N, K].
        sizes: int32[E], rows of each group, one group after the other; rows that are left over
            at the end belong to none and give zeros.
    """
    ends = jnp.cumsum(sizes)
    row = jnp.arange(x.shape[0], dtype=jnp.int32)[:, None]
    mine = (row >= (ends - sizes)[None, :]) & (row < ends[None, :])
    every = jnp.einsum(
        "MK,ENK->MEN",
        x.astype(jnp.float32),
        w.astype(jnp.float32),
        precision=lax.Precision.HIGHEST,
    )
    return jnp.sum(jnp.where(mine[:, :, None], every, 0.0), axis=1).astype(dtype)
