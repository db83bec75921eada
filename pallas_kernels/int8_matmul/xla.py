"""int8_matmul through XLA's own dot."""

from __future__ import annotations

import math
from functools import partial

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from jaxserve.pallas_kernels.int8_matmul.reference import LARGEST, quantized_rows, row_scales

_BASE = 2 * LARGEST
"""A digit's rounding error is at most half of its unit: so many units make the next digit."""


def int8_matmul(
    x: Array,
    w: Array,
    scales: Array,
    num_inputs: int,
    orientation: str,
    dtype: DTypeLike,
    quantize_rows: bool,
) -> Array:
    """Returns x[T, *inputs] times (w * scales) as [T, *outputs]; see `reference.int8_matmul`."""
    size = math.prod(x.shape[x.ndim - num_inputs :])
    flat_x = x.reshape(-1, size)
    out_first = orientation == "out_in"
    flat_w = w.reshape(-1, size) if out_first else w.reshape(size, -1)
    right = 1 if out_first else 0
    if quantize_rows:
        y = _int8_rows(flat_x, flat_w, right)
    else:
        y = lax.platform_dependent(
            flat_x,
            flat_w,
            cpu=partial(_digits, right=right),
            default=partial(_cast, right=right),
        )
    y = (y * scales.reshape(1, -1)).astype(dtype)
    return y.reshape(*x.shape[: x.ndim - num_inputs], *scales.shape)


def _int8_rows(x: Array, w: Array, right: int) -> Array:
    rows, scales = quantized_rows(x, 1)
    return _product(rows, w, right, jnp.int32).astype(jnp.float32) * scales[:, None]


def _cast(x: Array, w: Array, right: int) -> Array:
    """Returns the product with the weight cast on its way in, which TPU and GPU fuse."""
    return _product(x, w.astype(x.dtype), right, jnp.float32)


def _digits(x: Array, w: Array, right: int) -> Array:
    """Returns the product by int8 alone: XLA on CPU would write a cast weight out in every step.

    A row is written in digits of int8, two for bfloat16 (15 bits below the row's largest value)
    and three for float32 (23 bits); each digit is a row of the product.
    """
    count = 3 if x.dtype == jnp.float32 else 2
    wide = x.astype(jnp.float32)
    scales = row_scales(jnp.max(jnp.abs(wide), axis=1, keepdims=True))
    rest, digits = wide / scales, []
    for _ in range(count):
        digit = lax.round(rest, lax.RoundingMethod.TO_NEAREST_EVEN)
        digits.append(digit.astype(jnp.int8))
        rest = (rest - digit) * _BASE
    sums = _product(jnp.concatenate(digits), w, right, jnp.int32).astype(jnp.float32)
    parts = sums.reshape(count, x.shape[0], -1)
    y = parts[-1]
    for part in reversed(parts[:-1]):
        y = part + y / _BASE
    return y * scales


def _product(x: Array, w: Array, right: int, dtype: DTypeLike) -> Array:
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return lax.dot_general(
        x, w, (((1,), (right,)), ((), ())), precision=precision, preferred_element_type=dtype
    )
