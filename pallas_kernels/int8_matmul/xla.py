"""Int8 matmul through XLA's own dot."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from jaxserve.config import Activation
from jaxserve.pallas_kernels.int8_matmul import Mode, activated
from jaxserve.pallas_kernels.int8_matmul.reference import LIMIT, scaled_rows


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
    if mode is Mode.W8A8:
        y = _digits(flat_x, flat_w, out_first, 1)
    else:
        digits = partial(_digits, out_first=out_first, count=digits_for(x))
        cast = partial(_cast, out_first=out_first)
        y = lax.platform_dependent(flat_x, flat_w, cpu=digits, default=cast)
    y = y * scales.astype(jnp.float32).reshape(1, -1)
    if bias is not None:
        y = y + bias.astype(jnp.float32).reshape(1, -1)
    return activated(y, activation).astype(dtype).reshape(x.shape[0], *scales.shape)


def _cast(x: Array, w: Array, out_first: bool) -> Array:
    """Returns the product with the weight cast on its way in, which TPU and GPU fuse."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return lax.dot_general(
        x,
        w.astype(x.dtype),
        _contracted(out_first),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def _digits(x: Array, w: Array, out_first: bool, count: int) -> Array:
    """Returns the product of rows that are rounded to `count` digits of int8.

    One digit is w8a8. XLA on CPU would write a cast weight out in every step, so there w8a16 takes
    two digits for bfloat16, 15 bits below a row's largest value, and three for float32, 23 bits;
    each digit is one more row of the product.
    """
    digits, factor = digits_of(x, count)
    rows = jnp.concatenate(digits)
    sums = lax.dot_general(rows, w, _contracted(out_first), preferred_element_type=jnp.int32)
    return together(sums.reshape(count, x.shape[0], -1)) * factor[:, None]


def digits_for(x: Array) -> int:
    """Returns how many digits say as much as x does."""
    return 3 if x.dtype == jnp.float32 else 2


def digits_of(x: Array, count: int) -> tuple[list[Array], Array]:
    """Returns (`count` times int8[T, K], float32[T] factors) for x[T, K]; see `together`."""
    rest, factor = scaled_rows(x.astype(jnp.float32), 1)
    digits = [jnp.round(rest)]
    for _ in range(count - 1):
        # What rounding leaves is at most half a unit: so many of the next fill it.
        rest = (rest - digits[-1]) * (2 * LIMIT)
        digits.append(jnp.round(rest))
    return [digit.astype(jnp.int8) for digit in digits], factor


def together(sums: Array) -> Array:
    """Returns float32[T, N] of int32[count, T, N], a product's sums for each digit of the rows."""
    parts = sums.astype(jnp.float32)
    y = parts[-1]
    for part in parts[-2::-1]:
        y = part + y * (0.5 / LIMIT)
    return y


def _contracted(out_first: bool) -> Any:
    return ((1,), (1 if out_first else 0,)), ((), ())
