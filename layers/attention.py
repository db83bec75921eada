"""Attention part of a block: projections, positions, and a cache that remembers."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxserve.config import AttentionSpec
from jaxserve.errors import UnsupportedError
from jaxserve.layers.cache import AnyCache, At, Cache, NoCache
from jaxserve.layers.linear import Product, linear_from, linear_group
from jaxserve.layers.norm import Norm
from jaxserve.layers.param import Axis, Declare
from jaxserve.layers.rope import rotate
from jaxserve.layers.runtime import Runtime
from jaxserve.pallas_kernels.attention.reference import probabilities, weighted
from jaxserve.pallas_kernels.attention.scores import alibi_slopes
from jaxserve.partitioning.collectives import LocalComm, Part
from jaxserve.partitioning.layout import Stage


class Attention(nnx.Module):
    """Multi-head, grouped or multi-query attention over a cache.

    Attributes:
        first: outputs of the first projections.
        qkv: these projections; None where the block has them.
    """

    def __init__(
        self, spec: AttentionSpec, embed: Axis, declare: Declare, joint: bool = False
    ) -> None:
        self.spec = declare.attention(spec)
        heads, kv_heads = declare.heads(spec)
        head = Axis("head", spec.head_dim)
        self.heads = heads
        self.first = {"q": (heads, head), "k": (kv_heads, head), "v": (kv_heads, head)}
        self.qkv = None if joint else declare.group((embed,), spec.qkv_bias, **self.first)
        self.out = declare.weight((heads, head), (embed,), spec.out_bias)
        self.q_norm = None if spec.qk_norm is None else Norm(spec.qk_norm, head, declare)
        self.k_norm = None if spec.qk_norm is None else Norm(spec.qk_norm, head, declare)

    def project(self, x: Array, run: Runtime) -> list[Part]:
        """Returns what x[T, embed] gives to attention: q[T, N, H], k and v[T, K, H]."""
        assert self.qkv is not None
        with jax.named_scope("qkv"):
            return self.parts(linear_group(x, self.qkv, run.comm, run.kernels))

    def parts(self, products: Sequence[Product]) -> list[Part]:
        """Returns queries, keys and values on their way."""
        heads = (None, self.spec.num_kv_heads, self.spec.num_kv_heads)
        return [
            Part(y, Stage.QUERY, kv_heads, bias, bundle)
            for (y, bias, bundle), kv_heads in zip(products, heads, strict=True)
        ]

    def finish(
        self, q: Array, k: Array, v: Array, layer: At, cache: AnyCache, run: Runtime
    ) -> tuple[Array, AnyCache]:
        """Returns (terms of the output [T, embed] without its bias, the cache with k and v)."""
        q, k, v = self._adjusted(q, k, v)
        sink_q = None
        if self.spec.rope is not None:
            with jax.named_scope("rope"):
                if self.spec.cached_tokens is not None:
                    inside = run.rotations[self.spec.rope, self.spec.cached_tokens]
                    sink_q = rotate(q, self.spec.rope, *inside)
                table = run.rotations[self.spec.rope, None]
                q, k = rotate(q, self.spec.rope, *table), rotate(k, self.spec.rope, *table)
        with jax.named_scope("attend"):
            slopes = None
            if self.spec.alibi is not None:
                slopes = run.comm.vector(_slopes(self.heads), Stage.QUERY)
            spec = run.comm.local(self.spec)
            heads, cache = cache.attend(
                layer, q, k, v, spec, run.kernels, sink_q, slopes, run.comm.stripe(spec)
            )
        name = f"layers.{layer.index}.attention_probs"
        if run.tap.wants(name):
            heads = self._looked_into(name, (q, k, v), slopes, heads, cache, run)
        with jax.named_scope("out"):
            return linear_from(heads, Stage.QUERY, self.out, run.comm, run.kernels), cache

    def _looked_into(
        self,
        name: str,
        qkv: tuple[Array, Array, Array],
        slopes: Array | None,
        heads: Array,
        cache: Cache,
        run: Runtime,
    ) -> Array:
        """Returns heads[T, N, H], or what edited probabilities float32[B, N, L, S] give."""
        if not isinstance(cache, NoCache):
            raise UnsupportedError(f"{name} is there for whole sequences alone; use run")
        assert cache.positions is not None
        at = cache.positions
        q, k, v = (x.reshape(*at.shape, *x.shape[1:]) for x in qkv)
        k, v = (jnp.swapaxes(x, 1, 2) for x in (k, v))
        found = probabilities(q, k, at, at, self.spec, slopes)
        # Heads that pad are nobody's business.
        real = [i for start, _, length in self.heads.spans() for i in range(start, start + length)]
        shown = run.tap.pairs(name, found[:, np.array(real)])
        if not run.tap.edits(name):
            return heads
        edited = weighted(found.at[:, np.array(real)].set(shown), v)
        return edited.reshape(heads.shape).astype(heads.dtype)

    def _adjusted(self, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
        """Returns queries, keys and values clipped and normed, where the model does that."""
        if (most := self.spec.qkv_clip) is not None:
            q, k, v = (jnp.clip(x, -most, most) for x in (q, k, v))
        if self.q_norm is not None and self.k_norm is not None:
            # A head's features lie on one device.
            q, k = (
                norm(x, LocalComm(), Stage.QUERY)
                for norm, x in ((self.q_norm, q), (self.k_norm, k))
            )
        return q, k, v


def _slopes(heads: Axis) -> np.ndarray:
    """Returns float32[N], ALiBi's slope of each head, 0 for those that pad."""
    found = np.zeros(heads.size, np.float32)
    real = alibi_slopes(heads.real)
    for start, source, length in heads.spans():
        found[start : start + length] = real[source : source + length]
    return found
