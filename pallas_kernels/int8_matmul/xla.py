"""Int8 matmul through XLA's own dot."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from jaxserve.config import Activation
from jaxserve.pallas_kernels.int8_matmul import Mode, activated
from jaxserve.pallas_kernels.int8_matmul.reference import rounded_rows


def int8_matmul(
    x: Array,
    w: Array,
    scales: Array,
    num_inputs: int,
    orientation: str,
    dtype: DTypeLike,
    *,
    mode: Mode = Mode.W8A16,
    bias: Array | None = None,
    activation: Activation | None = None,
) -> Array:
    """Returns activation(x w scales + bias) as [T, *outputs]; see `reference.int8_matmul`."""
    size = math.prod(x.shape[x.ndim - num_inputs :])
    flat_x = x.reshape(x.shape[0], size)
    out_first = orientation == "out_in"
    flat_w = w.reshape(-1, size) if out_first else w.reshape(size, -1)
    contracted = (((1,), (1 if out_first else 0,)), ((), ()))
    if mode is Mode.W8A8:
        rounded, factor = rounded_rows(flat_x.astype(jnp.float32), 1)
        y = lax.dot_general(
            rounded.astype(jnp.int8), flat_w, contracted, preferred_element_type=jnp.int32
        )
        y = y.astype(jnp.float32) * factor[:, None]
    else:
        y = lax.dot_general(
            flat_x,
            flat_w.astype(x.dtype),
            contracted,
            precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
            preferred_element_type=jnp.float32,
        )
    y = y * scales.astype(jnp.float32).reshape(1, -1)
    if bias is not None:
        y = y + bias.astype(jnp.float32).reshape(1, -1)
    return activated(y, activation).astype(dtype).reshape(x.shape[0], *scales.shape)
