"""The tokens of one forward."""

from __future__ import annotations

from dataclasses import dataclass

import jax
from jax import Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Step:
    """Packed tokens of one forward.

    Attributes:
        tokens: int32[T].
        positions: int32[T], position in the token's own sequence; -1 marks padding.
        lengths: int32[T], see `rope.rotation`.
    """

    tokens: Array
    positions: Array
    lengths: Array

    @property
    def valid(self) -> Array:
        """Returns bool[T]: which tokens are not padding."""
        return self.positions >= 0
