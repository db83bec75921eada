"""Definition of matmul: float32 throughout."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike


def matmul(x: Array, w: Array, num_inputs: int, orientation: str, dtype: DTypeLike) -> Array:
    """Returns x[T, *inputs] times w as [T, *outputs] in `dtype`.

    Args:
        w: [*outputs, *inputs] where orientation is "out_in", [*inputs, *outputs] for "in_out".
        num_inputs: number of contracted dimensions.
    """
    wide = w.astype(jnp.float32)
    if orientation == "out_in":
        wide = jnp.moveaxis(wide, range(-num_inputs, 0), range(num_inputs))
    y = jnp.tensordot(x.astype(jnp.float32), wide, axes=num_inputs, precision=lax.Precision.HIGHEST)
    return y.astype(dtype)
