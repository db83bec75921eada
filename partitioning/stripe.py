"""A cache whose pages are cut: each device keeps its piece of every page, and attends to that.

    stripe = comm.stripe(spec)                               # None where pages are whole
    stripe.kept(positions, page_size)                        # where a token lies here, or -1
    stripe.seen(positions, page_size)                        # last key here that a query sees
    out = stripe.merged(out, lse)

A device's keys of a sequence, in order, look like a sequence of their own: a query sees a
beginning of it. So kernels need to know nothing of stripes.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array, lax


@dataclass(frozen=True)
class Stripe:
    """One device's share of every page; inside `shard_map`.

    Attributes:
        count: pieces of a page.
        index: int32[], which one is here.
        axes: mesh axes that cut the pages.
    """

    count: int
    index: Array
    axes: tuple[str, ...]

    def kept(self, positions: Array, page_size: int) -> Array:
        """Returns int32[T], the place of each token among the keys here; -1 if it is elsewhere."""
        page, offset, piece = self._parts(positions, page_size)
        place = page * piece + offset
        here = (positions >= 0) & (offset >= 0) & (offset < piece)
        return jnp.where(here, place, -1)

    def seen(self, positions: Array, page_size: int) -> Array:
        """Returns int32[T], the last of the keys here up to each position; -1 if there is none."""
        page, offset, piece = self._parts(positions, page_size)
        last = page * piece + jnp.clip(offset + 1, 0, piece) - 1
        return jnp.where(positions >= 0, last, -1)

    def merged(self, out: Array, lse: Array) -> Array:
        """Returns attention over all keys, [T, N, H], from that over the keys of each device.

        Args:
            out: [T, N, H], whose weights sum to one.
            lse: float32[T, N], log of the sum before; -inf where no key was seen.
        """
        top = lax.pmax(lse, self.axes)
        weight = jnp.exp(lse - jnp.where(jnp.isfinite(top), top, 0.0))[..., None]
        terms = jnp.concatenate([out.astype(jnp.float32) * weight, weight], axis=-1)
        total = lax.psum(terms, self.axes)
        return (total[..., :-1] / jnp.maximum(total[..., -1:], 1e-30)).astype(out.dtype)

    def _parts(self, positions: Array, page_size: int) -> tuple[Array, Array, int]:
        """Returns (page, offset from this device's piece of it, size of a piece)."""
        piece = page_size // self.count
        page = lax.div(positions, page_size)
        return page, lax.rem(positions, page_size) - self.index * piece, piece
