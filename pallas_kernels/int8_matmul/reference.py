"""Definition of int8_matmul: weights of int8 with a scale per output channel.

Weights alone (w8a16), or activations too (w8a8): these are then rounded to int8 with one scale per
row, found in the step, and products are summed in int32.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from jaxserve.pallas_kernels.matmul.reference import matmul

LARGEST = 127
"""Largest magnitude of a quantised value: -128 is left out, so that a sign costs nothing."""


def int8_matmul(
    x: Array,
    w: Array,
    scales: Array,
    num_inputs: int,
    orientation: str,
    dtype: DTypeLike,
    quantize_rows: bool,
) -> Array:
    """Returns x[T, *inputs] times (w * scales) as [T, *outputs] in `dtype`.

    Args:
        w: int8, [*outputs, *inputs] where orientation is "out_in", [*inputs, *outputs] for
            "in_out".
        scales: float32[*outputs].
        num_inputs: number of contracted dimensions.
        quantize_rows: round each row of x to int8 (w8a8).
    """
    if not quantize_rows:
        return (matmul(x, w, num_inputs, orientation, jnp.float32) * scales[None]).astype(dtype)
    rows, of_rows = quantized_rows(x, num_inputs)
    if orientation == "out_in":
        w = jnp.moveaxis(w, range(-num_inputs, 0), range(num_inputs))
    sums = jnp.tensordot(rows, w, axes=num_inputs, preferred_element_type=jnp.int32)
    of_rows = of_rows.reshape(-1, *[1] * scales.ndim)
    return (sums.astype(jnp.float32) * of_rows * scales[None]).astype(dtype)


def quantized_rows(x: Array, num_inputs: int) -> tuple[Array, Array]:
    """Returns (int8[T, *inputs], float32[T]): each row rounded to nearest, and its scale."""
    wide = x.astype(jnp.float32)
    dims = tuple(range(wide.ndim - num_inputs, wide.ndim))
    scales = row_scales(jnp.max(jnp.abs(wide), axis=dims))
    return lax.round(wide / jnp.expand_dims(scales, dims), _TO_EVEN).astype(jnp.int8), scales


def row_scales(largest: Array) -> Array:
    """Returns the scale that makes `largest` the largest int8; one where there is nothing."""
    return jnp.where(largest > 0, largest / LARGEST, 1.0)


_TO_EVEN = lax.RoundingMethod.TO_NEAREST_EVEN
