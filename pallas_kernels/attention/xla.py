"""Attention through XLA: query heads of a group share one pass over their key head."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from jaxserve.config import AttentionSpec
from jaxserve.pallas_kernels.attention.scores import alibi_bias, capped, visible

MIN_BLOCK = 64
MAX_BLOCKS = 8
"""Whole sequences are cut into at most this many runs of queries, of at least MIN_BLOCK each:
about half of all scores are never computed, and the program stays small."""


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
    """Returns softmax(scale q k + bias) v as [B, L, N, H]; see `reference.attention`."""
    length = q.shape[1]
    size = max(MIN_BLOCK, -(-length // MAX_BLOCKS))
    if not own or length <= size:
        return _attend(q, k, v, q_positions, k_positions, spec, slopes)
    runs = []
    for start in range(0, length, size):
        end = min(start + size, length)
        runs.append(
            _attend(
                q[:, start:end],
                k[:, :, :end],
                v[:, :, :end],
                q_positions[:, start:end],
                k_positions[:, :end],
                spec,
                slopes,
            )
        )
    return jnp.concatenate(runs, axis=1)


def _attend(
    q: Array,
    k: Array,
    v: Array,
    q_positions: Array,
    k_positions: Array,
    spec: AttentionSpec,
    slopes: Array | None,
) -> Array:
    """Returns attention of one run of queries over the keys given."""
    batch, length, num_heads, head = q.shape
    kv_heads, slots = k.shape[1], k.shape[2]
    groups = num_heads // kv_heads
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    grouped = q.reshape(batch, length, kv_heads, groups, head).transpose(0, 2, 3, 1, 4)
    grouped = grouped.reshape(batch, kv_heads, groups * length, head)
    scores = lax.dot_general(
        grouped,
        k.astype(q.dtype),
        (((3,), (3,)), ((0, 1), (0, 1))),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    scores = capped(scores * spec.score_scale, spec)
    scores = scores.reshape(batch, kv_heads, groups, length, slots)
    if spec.alibi is not None:
        bias = alibi_bias(spec.alibi, num_heads, k_positions, slopes)
        scores = scores + bias.reshape(batch, kv_heads, groups, 1, slots)
    mask = visible(q_positions, k_positions, spec.window)[:, None, None]
    scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    # The shift cancels in the result, so no gradient has to go through it.
    top = lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = lax.dot_general(
        weights.astype(v.dtype).reshape(batch, kv_heads, groups * length, slots),
        v,
        (((3,), (2,)), ((0, 1), (0, 1))),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    out = out.reshape(batch, kv_heads, groups, length, head) / total
    return out.transpose(0, 3, 1, 2, 4).reshape(q.shape).astype(q.dtype)
