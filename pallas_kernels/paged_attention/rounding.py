"""Keys and values of one byte: each token and head has a scale of its own.

    values, scales = rounded(k, "int8")        # int8[T, K, H], float32[T, K]

What a token leaves behind follows from that token alone: not from its page, nor from the tokens
that were written with it, so that a prompt cut into chunks leaves the same pages as a whole one.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

LIMITS = {"int8": 127.0, "float8_e4m3fn": 448.0}
"""Largest magnitude of each dtype that pages keep with scales."""


def rounded(x: Array, dtype: DTypeLike) -> tuple[Array, Array]:
    """Returns (x[T, K, H] over its scales in `dtype`, scales float32[T, K]), to the nearest."""
    limit = LIMITS[jnp.dtype(dtype).name]
    x = x.astype(jnp.float32)
    # A product, not a quotient: XLA writes division by a constant either way.
    scales = jnp.max(jnp.abs(x), axis=2) * np.float32(1 / limit)
    # Zeros, and what is too small for a scale that divides, become zeros.
    scales = jnp.where(scales < jnp.finfo(jnp.float32).tiny, 1.0, scales)
    found = jnp.clip(x / scales[..., None], -limit, limit)
    found = jnp.rint(found) if jnp.issubdtype(dtype, jnp.integer) else found
    return found.astype(dtype), scales


def finite(v: Array) -> Array:
    """Returns values with zeros for what is not finite.

    Keys that a query does not see weigh zero, and zero times infinity is no number: one
    sequence's overflow would reach all that share its pages' blocks, or get its pages later.
    """
    return jnp.where(jnp.isfinite(v), v, jnp.zeros_like(v))
