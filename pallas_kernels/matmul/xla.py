"""Matmul through XLA's own dot."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike


def matmul(x: Array, w: Array, num_inputs: int, orientation: str, dtype: DTypeLike) -> Array:
    """Returns x[T, *inputs] times w as [T, *outputs] in `dtype`; see `reference.matmul`."""
    # Several contracted dimensions as one: XLA on CPU would copy the weight in every step.
    outputs = w.shape[: w.ndim - num_inputs] if orientation == "out_in" else w.shape[num_inputs:]
    size = math.prod(x.shape[x.ndim - num_inputs :])
    flat_x = x.reshape(*x.shape[: x.ndim - num_inputs], size)
    flat_w = w.reshape(*outputs, size) if orientation == "out_in" else w.reshape(size, *outputs)
    right = flat_w.ndim - 1 if orientation == "out_in" else 0
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return lax.dot_general(
        flat_x,
        flat_w,
        (((flat_x.ndim - 1,), (right,)), ((), ())),
        precision=precision,
        preferred_element_type=dtype,
    )
