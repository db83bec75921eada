"""Rotary position embedding, with the published ways of stretching it.

Source: Su et al. 2021 (RoPE); Chen et al. 2023 (linear); bloc97 2023 (dynamic NTK);
Peng et al. 2023 (YaRN); the Llama 3.1 release (llama3); Ding et al. 2024 (LongRoPE).
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxserve.config import RopePairs, RopeScaling, RopeSpec


def rotation(spec: RopeSpec, positions: Array, lengths: Array) -> tuple[Array, Array]:
    """Returns (cos, sin), each float32[T, 1, rotary_dim / 2].

    Args:
        positions: int32[T], position of each token in its sequence.
        lengths: int32[T], length that decides a `dynamic` or `longrope` stretch: that of the
            prompt for prompt tokens, of the sequence so far for later ones.
    """
    if spec.scaling is RopeScaling.DYNAMIC:
        inverse = _dynamic_frequencies(spec, lengths)
    elif spec.scaling is RopeScaling.LONGROPE:
        inverse = _longrope_frequencies(spec, lengths)
    else:
        inverse = jnp.asarray(inverse_frequencies(spec))[None, :]
    angles = positions.astype(jnp.float32)[:, None] * inverse
    factor = spec.attention_factor
    return (jnp.cos(angles) * factor)[:, None, :], (jnp.sin(angles) * factor)[:, None, :]


def rotate(x: Array, spec: RopeSpec, cos: Array, sin: Array) -> Array:
    """Returns x[T, heads, head] with its first `rotary_dim` features turned."""
    turned = x[..., : spec.rotary_dim].astype(jnp.float32)
    if spec.pairs is RopePairs.HALVES:
        first, second = jnp.split(turned, 2, axis=-1)
    else:
        first, second = turned[..., 0::2], turned[..., 1::2]
    a, b = first * cos - second * sin, second * cos + first * sin
    if spec.pairs is RopePairs.HALVES:
        out = jnp.concatenate([a, b], axis=-1)
    else:
        out = jnp.stack([a, b], axis=-1).reshape(turned.shape)
    out = out.astype(x.dtype)
    rest = x[..., spec.rotary_dim :]
    return out if not rest.shape[-1] else jnp.concatenate([out, rest], axis=-1)


def inverse_frequencies(spec: RopeSpec) -> np.ndarray:
    """Returns float32[rotary_dim / 2], radians per position, for scalings fixed in advance."""
    exponents = np.arange(0, spec.rotary_dim, 2, dtype=np.float64) / spec.rotary_dim
    plain = spec.theta**-exponents
    match spec.scaling:
        case RopeScaling.NONE | RopeScaling.DYNAMIC | RopeScaling.LONGROPE:
            inverse = plain
        case RopeScaling.LINEAR:
            inverse = plain / spec.factor
        case RopeScaling.LLAMA3:
            inverse = _llama3_frequencies(spec, plain)
        case RopeScaling.YARN:
            inverse = _yarn_frequencies(spec, plain)
    return inverse.astype(np.float32)


def _llama3_frequencies(spec: RopeSpec, plain: np.ndarray) -> np.ndarray:
    """Long wavelengths are divided by `factor`, short ones kept, a band between blended."""
    turns = spec.original_context_tokens * plain / (2 * math.pi)
    band = spec.high_freq_factor - spec.low_freq_factor
    keep = np.clip((turns - spec.low_freq_factor) / band, 0.0, 1.0)
    return keep * plain + (1 - keep) * plain / spec.factor


def _yarn_frequencies(spec: RopeSpec, plain: np.ndarray) -> np.ndarray:
    """Features that turn often are kept, slow ones divided by `factor`, a ramp between."""

    def feature_of(turns: float) -> float:
        wave = spec.original_context_tokens / (turns * 2 * math.pi)
        return spec.rotary_dim * math.log(wave) / (2 * math.log(spec.theta))

    low, high = feature_of(spec.beta_fast), feature_of(spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.rotary_dim - 1)
    ramp = (np.arange(spec.rotary_dim // 2) - low) / max(high - low, 1e-3)
    keep = 1 - np.clip(ramp, 0.0, 1.0)
    return keep * plain + (1 - keep) * plain / spec.factor


def _dynamic_frequencies(spec: RopeSpec, lengths: Array) -> Array:
    """Returns float32[T, rotary_dim / 2]: the base grows once a sequence is too long."""
    original = spec.original_context_tokens
    length = jnp.maximum(lengths, original).astype(jnp.float32)[:, None]
    stretch = spec.factor * length / original - (spec.factor - 1)
    base = spec.theta * stretch ** (spec.rotary_dim / (spec.rotary_dim - 2))
    exponents = jnp.arange(0, spec.rotary_dim, 2, dtype=jnp.float32) / spec.rotary_dim
    return base ** -exponents[None, :]


def _longrope_frequencies(spec: RopeSpec, lengths: Array) -> Array:
    """Returns float32[T, rotary_dim / 2]: each frequency divided by a number of its own."""
    plain = inverse_frequencies(spec)
    short, long = (
        jnp.asarray((plain / np.asarray(factors)).astype(np.float32))[None, :]
        for factors in (spec.short_factors, spec.long_factors)
    )
    return jnp.where(lengths[:, None] > spec.original_context_tokens, long, short)
