"""What is added to a model so that it divides over a mesh.

    padding = Padding((PhaseLayout(Ffn.WS2D, Heads.HEADS),), (("x", 2), ("y", 2), ("z", 2)))
    padding.ffn(50)                   # 56
    padding.heads(12, 4)              # (16, 4): each group of 3 query heads becomes one of 4

Heads, MLP and vocabulary are padded with zeros where their weights are loaded. Query heads stay in
the group of their key and value head, and the zeros behind them change nothing: the last
projection has zeros for them too. The width is never padded, since norms average over it. No JAX.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from jaxserve.config import AttentionSpec, ModelConfig
from jaxserve.errors import UsageError
from jaxserve.partitioning.layout import PhaseLayout, Stage
from jaxserve.partitioning.placement import AXES

_OF_HEADS = (Stage.PROJECTED, Stage.QUERY, Stage.CONTRACTED)
_OF_FFN = (Stage.PROJECTED, Stage.HIDDEN, Stage.CONTRACTED)
_OF_VOCAB = (Stage.SCORED, Stage.SAMPLED, Stage.WHOLE)
_OF_EMBED = (Stage.RESIDUAL, Stage.INPUT, Stage.PRODUCED, Stage.EMBEDDED, Stage.ENDS)

_SHOWN = 1024
"""Larger counts of devices are not named in a message."""


@dataclass(frozen=True)
class Padding:
    """Sizes that divide over a mesh.

    Attributes:
        phases: layouts that serve from the same weights.
        sizes: devices along each axis of the mesh, as (axis, size).
    """

    phases: tuple[PhaseLayout, ...]
    sizes: tuple[tuple[str, int], ...]

    def ffn(self, size: int) -> int:
        """Returns the features of the MLP, padded."""
        return _up(size, self._pieces("ffn", _OF_FFN))

    def vocab(self, size: int) -> int:
        """Returns the vocabulary, padded."""
        return _up(size, self._pieces("vocab", _OF_VOCAB))

    def heads(self, num_heads: int, num_kv_heads: int) -> tuple[int, int]:
        """Returns the heads of queries and of keys and values, padded.

        A device attends with heads of one group, or with whole groups. Where neither the devices
        divide over the key and value heads nor these over the devices, these are padded too, as
        are those of multi-head attention.
        """
        pieces = self._pieces("heads", _OF_HEADS)
        devices = math.lcm(*(self._count(p.placement(Stage.QUERY).features) for p in self.phases))
        group = num_heads // num_kv_heads
        if group == 1:
            heads = _up(num_heads, pieces)
            return heads, heads
        return min(
            (_up_group(count, group, pieces) * count, count)
            for count in range(num_kv_heads, _up(num_kv_heads, devices) + 1)
            if devices % count == 0 or count % devices == 0
        )

    def shares(self, axis: str) -> int:
        """Returns into how many pieces the phases cut the "ffn" or the "heads", at the most.

        Pieces are cut in the order z, y, x, so that those of a phase which cuts less are runs.
        """
        return self._pieces(axis, _OF_FFN if axis == "ffn" else _OF_HEADS)

    def attention(self, spec: AttentionSpec) -> AttentionSpec:
        """Returns the attention with padded heads."""
        heads, kv_heads = self.heads(spec.num_heads, spec.num_kv_heads)
        return replace(spec, num_heads=heads, num_kv_heads=kv_heads)

    def check(self, config: ModelConfig) -> None:
        """Checks that the model's width divides.

        Raises:
            UsageError: it does not; the message names the sizes that would.
        """
        width = math.gcd(config.embed_dim, config.table_dim or config.embed_dim)
        for axes in self._widths():
            count = self._count(axes)
            if width % count:
                lies = "*".join(axes)
                legal = (n for n in range(1, _SHOWN + 1) if width % n == 0)
                raise UsageError(
                    f"embed_dim={config.embed_dim}{_of_table(config)} does not divide over "
                    f"{lies}={count}, and the width is not padded; use a mesh with {lies} in "
                    f"{{{', '.join(map(str, legal))}}}"
                )

    def _widths(self) -> Iterator[tuple[str, ...]]:
        """Yields the axes that cut the width somewhere, in the order of the mesh."""
        for phase in self.phases:
            yield phase.stored("embed", 0, dict(self.sizes))
            for stage in _OF_EMBED:
                lies = phase.placement(stage)
                yield tuple(axis for axis in AXES if axis in lies.features)

    def _pieces(self, axis: str, stages: tuple[Stage, ...]) -> int:
        """Returns the least number that all pieces of a dimension divide."""
        sizes = dict(self.sizes)
        counts = [
            self._count(axes)
            for phase in self.phases
            for axes in (
                phase.stored(axis, 0, sizes),
                *(phase.placement(stage).features for stage in stages),
            )
        ]
        return math.lcm(*counts)

    def _count(self, axes: tuple[str, ...]) -> int:
        sizes = dict(self.sizes)
        return math.prod(sizes[axis] for axis in axes)


def _of_table(config: ModelConfig) -> str:
    return "" if config.table_dim is None else f" with table_dim={config.table_dim}"


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _up_group(num_kv_heads: int, group: int, pieces: int) -> int:
    """Returns the least group from `group` on with which all query heads divide into pieces."""
    return _up(group, pieces // math.gcd(pieces, num_kv_heads))
