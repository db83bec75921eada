"""Communication of a sharded step, named by logical axes.

Layers say which logical axes they contract and produce; a `Comm` knows how these lie on the
mesh and which collective that takes. On one device nothing lies on a mesh: `LocalComm`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from jax import Array


class Comm(Protocol):
    """Collectives of one layout."""

    def all_gather(self, x: Array, axes: tuple[str, ...]) -> Array:
        """Returns x[T, axes.sharded] gathered as far as a contraction over `axes` needs."""
        ...

    def reduce_scatter(
        self, x: Array, contracted: tuple[str, ...], produced: tuple[str, ...]
    ) -> Array:
        """Returns x[T, produced] {partial over contracted} summed and scattered as laid out."""
        ...

    def psum(self, x: Array, axis: str) -> Array:
        """Returns x {partial over axis} summed over its shards, the same on each."""
        ...

    def all_to_all(self, x: Array, split: str, joined: str) -> Array:
        """Returns x resharded from axis `joined` to axis `split`."""
        ...


@dataclass(frozen=True)
class LocalComm:
    """The identity: one device holds everything."""

    def all_gather(self, x: Array, axes: tuple[str, ...]) -> Array:
        """Returns x."""
        return x

    def reduce_scatter(
        self, x: Array, contracted: tuple[str, ...], produced: tuple[str, ...]
    ) -> Array:
        """Returns x."""
        return x

    def psum(self, x: Array, axis: str) -> Array:
        """Returns x."""
        return x

    def all_to_all(self, x: Array, split: str, joined: str) -> Array:
        """Returns x."""
        return x
