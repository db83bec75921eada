"""Matmul through XLA's own dot."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike


def matmul(x: Array, w: Array, num_inputs: int, orientation: str, dtype: DTypeLike) -> Array:
    """Returns x[T, *inputs] times w as [T, *outputs] in `dtype`; see `reference.matmul`."""
    left = tuple(range(x.ndim - num_inputs, x.ndim))
    first = w.ndim - num_inputs if orientation == "out_in" else 0
    right = tuple(range(first, first + num_inputs))
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return lax.dot_general(
        x, w, ((left, right), ((), ())), precision=precision, preferred_element_type=dtype
    )
