"""Definition of attention: float32, every key repeated for its query heads."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxserve.config import AttentionSpec
from jaxserve.pallas_kernels.attention.scores import alibi_bias, capped, visible


def attention(
    q: Array,
    k: Array,
    v: Array,
    q_positions: Array,
    k_positions: Array,
    spec: AttentionSpec,
    own: bool = False,
    slopes: Array | None = None,
) -> Array:
    """Returns softmax(scale q k + bias) v as [B, L, N, H] in q's dtype.

    A query whose position is negative is padding: its output is finite and means nothing.

    Args:
        q: [B, L, N, H].
        k, v: [B, K, S, H].
        q_positions: int32[B, L].
        k_positions: int32[B, S], -1 where nothing is stored.
        own: keys and values are those of the query tokens themselves, in the same order, so that
            no query sees a later index (a hint; it changes no result).
        slopes: float32[N], see `alibi_bias`.
    """
    weights = probabilities(q, k, q_positions, k_positions, spec, slopes)
    return weighted(weights, v).astype(q.dtype)


def probabilities(
    q: Array,
    k: Array,
    q_positions: Array,
    k_positions: Array,
    spec: AttentionSpec,
    slopes: Array | None = None,
) -> Array:
    """Returns float32[B, N, L, S], softmax(scale q k + bias); arguments as of `attention`."""
    wide_k = _repeated(k, q.shape[2])
    scores = jnp.einsum(
        "BLNH,BNSH->BNLS", q.astype(jnp.float32), wide_k, precision=lax.Precision.HIGHEST
    )
    scores = capped(scores * spec.score_scale, spec)
    if spec.alibi is not None:
        scores = scores + alibi_bias(spec.alibi, q.shape[2], k_positions, slopes)[:, :, None, :]
    mask = visible(q_positions, k_positions, spec.window)[:, None]
    return jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(jnp.float32).min), axis=-1)


def weighted(weights: Array, v: Array) -> Array:
    """Returns float32[B, L, N, H], the sum of v[B, K, S, H] by weights float32[B, N, L, S]."""
    wide_v = _repeated(v, weights.shape[1])
    return jnp.einsum("BNLS,BNSH->BLNH", weights, wide_v, precision=lax.Precision.HIGHEST)


def _repeated(x: Array, num_heads: int) -> Array:
    """Returns keys or values float32[B, N, S, H], each repeated for its query heads."""
    return jnp.repeat(x.astype(jnp.float32), num_heads // x.shape[1], axis=1)
