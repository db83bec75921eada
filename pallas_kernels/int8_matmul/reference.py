"""Definition of the int8 matmul: float32 throughout, int8 operands written out as such."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from jaxserve.config import Activation
from jaxserve.pallas_kernels.int8_matmul import Mode, activated
from jaxserve.pallas_kernels.matmul.reference import matmul

LIMIT = 127
"""Greatest magnitude of a rounded activation; symmetric, so -128 does not occur."""


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
    """Returns activation(x w scales + bias) as [T, *outputs] in `dtype`.

    Args:
        x: [T, *inputs].
        w: int8, [*outputs, *inputs] where orientation is "out_in", else [*inputs, *outputs].
        scales: float32[*outputs], factor of each output channel.
        num_inputs: number of contracted dimensions.
        mode: what becomes of x.
        bias: [*outputs].
        activation: of the sum.
    """
    x = x.astype(jnp.float32)
    if mode is Mode.W8A8:
        rows, factor = scaled_rows(x, num_inputs)
        rounded = jnp.round(rows)
        y = matmul(rounded, w, num_inputs, orientation, jnp.float32)
        y = y * factor.reshape(-1, *[1] * (y.ndim - 1))
    else:
        y = matmul(x, w, num_inputs, orientation, jnp.float32)
    y = y * scales.astype(jnp.float32)[None]
    if bias is not None:
        y = y + bias.astype(jnp.float32)[None]
    return activated(y, activation).astype(dtype)


def scaled_rows(x: Array, num_inputs: int) -> tuple[Array, Array]:
    """Returns (float32 numbers up to LIMIT, float32[T] factors) whose product is x[T, *inputs].

    Rounded to the nearest, ties to the even number, they are int8; a row of zeros has the factor
    zero.
    """
    axes = tuple(range(x.ndim - num_inputs, x.ndim))
    largest = jnp.max(jnp.abs(x), axis=axes, keepdims=True)
    inverse = jnp.where(largest > 0, LIMIT / jnp.where(largest > 0, largest, 1.0), 0.0)
    return x * inverse, largest.reshape(x.shape[0]) * (1.0 / LIMIT)
