"""Parts of attention that every implementation shares: position bias and mask."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxserve.config import AlibiSpec, AttentionSpec


def visible(q_positions: Array, k_positions: Array, window: int | None) -> Array:
    """Returns bool[B, L, S]: key s is stored, not after query l, and inside its window."""
    distance = q_positions[:, :, None] - k_positions[:, None, :]
    seen = (k_positions >= 0)[:, None, :] & (distance >= 0)
    return seen if window is None else seen & (distance < window)


def alibi_bias(
    spec: AlibiSpec, num_heads: int, k_positions: Array, slopes: Array | None = None
) -> Array:
    """Returns float32[B, N, S], slope of the head times position of the key.

    Args:
        slopes: float32[N], where the heads are some of a model's; None takes `alibi_slopes`.

    Source: Press et al. 2022; head counts that are no power of two as published with BLOOM.
    """
    slopes = jnp.asarray(alibi_slopes(num_heads)) if slopes is None else slopes
    positions = k_positions.astype(jnp.float32)
    if spec.bfloat16:
        slopes, positions = _as_bfloat16(slopes), _as_bfloat16(positions)
    bias = slopes[None, :, None] * positions[:, None, :]
    return (_as_bfloat16(bias) if spec.bfloat16 else bias) * spec.scale


def _as_bfloat16(x: Array) -> Array:
    """Returns x rounded to bfloat16, in its own dtype; XLA may drop a pair of casts."""
    return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def alibi_slopes(num_heads: int) -> np.ndarray:
    """Returns float32[N]: a geometric series for powers of two, interleaved for the rest."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = 2.0 ** (-8.0 / power * np.arange(1, power + 1))
    between = 2.0 ** (-4.0 / power * np.arange(1, 2 * (num_heads - power), 2))
    return np.concatenate([slopes, between]).astype(np.float32)


def capped(scores: Array, spec: AttentionSpec) -> Array:
    """Returns scores squeezed into (-soft_cap, soft_cap), or unchanged where there is no cap."""
    if spec.soft_cap is None:
        return scores
    return jnp.tanh(scores / spec.soft_cap) * spec.soft_cap
