"""Layouts as data: what lies where in each part of a block.

    layout = PhaseLayout(Ffn.WS2D, Heads.BATCH)
    layout.placement(Stage.RESIDUAL)        # [T, F.xzy]: width over all devices
    layout.placement(Stage.QUERY)           # [T.xyz, F]: sequences over all devices

Source: Pope et al. 2022, sections 3.2 and 3.3. Features of the residual stream are cut in the order
x, z, y; those of heads and MLP in the order z, y, x; tokens in the order x, y, z. These orders make
every change of placement one that starts or ends at the innermost axes. No JAX.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache

from jaxserve.config import dtype_bytes
from jaxserve.errors import UsageError
from jaxserve.partitioning.placement import Dim, Kind, Move, Placement

WIRES = ("bfloat16", "float16", "float32")
"""Element types in which activations may go between devices."""

TOKEN_ORDER = ("x", "y", "z")
HIDDEN_ORDER = ("z", "y", "x")
EMBED_ORDER = ("x", "z", "y")


class Ffn(StrEnum):
    """What moves in the projections: activations, or weights gathered over some axes."""

    WS1D = "ws1d"
    WS2D = "ws2d"
    WG_X = "wg-x"
    WG_XY = "wg-xy"
    WG_XYZ = "wg-xyz"


class Heads(StrEnum):
    """What attention, and with it the cache, is cut by: heads, sequences or both.

    SEQUENCE cuts every page of a sequence over x, and merges what the pieces give: for contexts
    that are long, where sequences are few.
    """

    HEADS = "heads"
    HEADS_BATCH = "heads-batch"
    HEADS_BATCH_XY = "heads-batch-xy"
    BATCH = "batch"
    SEQUENCE = "sequence"


class Ring(StrEnum):
    """How pieces go around."""

    PLAIN = "plain"  # not at all: one collective
    ONE_WAY = "one-way"  # n - 1 hops of a piece
    BIDIRECTIONAL = "bidirectional"  # n - 1 hops of half a piece each way
    LOW_LATENCY = "low-latency"  # n / 2 hops of a piece each way


class Stage(StrEnum):
    """A point of a block; its activations are [tokens, features] as named."""

    RESIDUAL = "residual"  # width
    INPUT = "input"  # width, as the first projections contract it
    PROJECTED = "projected"  # heads or MLP, as the first projections leave it
    HIDDEN = "hidden"  # MLP, where its non-linearity is
    QUERY = "query"  # heads, where attention is
    CONTRACTED = "contracted"  # heads or MLP, as the last projections contract it
    PRODUCED = "produced"  # width, as the last projections leave it
    EMBEDDED = "embedded"  # width, as the table's shards leave it
    ENDS = "ends"  # width, as the logits contract it
    SCORED = "scored"  # vocabulary, as the table's shards leave it
    SAMPLED = "sampled"  # vocabulary, rows over all devices
    WHOLE = "whole"  # everything everywhere


_TOKENS = {Ffn.WG_X: 1, Ffn.WG_XY: 2, Ffn.WG_XYZ: 3}
"""Axes of the tokens while weights are gathered."""

_HEADS = {
    Heads.HEADS: Placement(features=HIDDEN_ORDER),
    Heads.HEADS_BATCH: Placement(tokens=("x",), features=("z", "y")),
    Heads.HEADS_BATCH_XY: Placement(tokens=("x", "y"), features=("z",)),
    Heads.BATCH: Placement(tokens=TOKEN_ORDER),
    Heads.SEQUENCE: Placement(features=("z", "y")),
}


@dataclass(frozen=True)
class PhaseLayout:
    """The layout of prefill or of decode.

    Attributes:
        ffn: how projections are computed.
        heads: how attention is cut.
        overlap: how what the last projections read is gathered beside their products, where it is
            gathered over one axis; see `collective_matmul`.
        wire: element type of activations between devices; None is their own. Sums are made in it;
            what is only copied goes in the narrower of the two.
    """

    ffn: Ffn
    heads: Heads
    overlap: Ring = Ring.PLAIN
    wire: str | None = None

    def __post_init__(self) -> None:
        if self.wire not in (None, *WIRES):
            raise UsageError(f"wire={self.wire!r} is unknown; use {', '.join(WIRES)} or None")

    def sent_as(self, kind: Kind, dtype: str) -> str:
        """Returns the element type in which activations of `dtype` go between devices."""
        if self.wire is None or kind is Kind.CUT:
            return dtype
        sums = kind in (Kind.ALL_REDUCE, Kind.REDUCE_SCATTER)
        narrower = dtype_bytes(self.wire) < dtype_bytes(dtype)
        return self.wire if sums or narrower else dtype

    @property
    def stripes(self) -> tuple[str, ...]:
        """Returns the mesh axes that cut every page."""
        return ("x",) if self.heads is Heads.SEQUENCE else ()

    @property
    def gathers(self) -> bool:
        """Returns whether weights are gathered."""
        return self.ffn in _TOKENS

    def placement(self, stage: Stage) -> Placement:
        """Returns where the activations of a stage lie."""
        return _placement(self, stage)

    def _find(self, stage: Stage) -> Placement:
        match stage:
            case Stage.QUERY:
                return _HEADS[self.heads]
            case Stage.SAMPLED:
                return Placement(tokens=TOKEN_ORDER)
            case Stage.WHOLE:
                return Placement()
            case Stage.EMBEDDED:
                if self.ffn is Ffn.WS1D:
                    return Placement(partial=EMBED_ORDER)
                return Placement(features=("x",), partial=("z", "y"))
            case Stage.ENDS:
                return Placement(features=() if self.ffn is Ffn.WS1D else ("x",))
            case Stage.SCORED:
                if self.ffn is Ffn.WS1D:
                    return Placement(features=HIDDEN_ORDER)
                return Placement(features=("z", "y"), partial=("x",))
        if self.gathers:
            return self._gathered(stage)
        if self.ffn is Ffn.WS1D:
            return {
                Stage.RESIDUAL: Placement(features=EMBED_ORDER),
                Stage.INPUT: Placement(),
                Stage.PROJECTED: Placement(features=HIDDEN_ORDER),
                Stage.HIDDEN: Placement(features=HIDDEN_ORDER),
                Stage.CONTRACTED: Placement(features=HIDDEN_ORDER),
                Stage.PRODUCED: Placement(partial=EMBED_ORDER),
            }[stage]
        # The non-linearity goes where the queries go, so that one scatter serves both.
        by_heads = self.heads in (Heads.HEADS, Heads.SEQUENCE)
        hidden = Placement(features=HIDDEN_ORDER) if by_heads else Placement(("x",), ("z", "y"))
        return {
            Stage.RESIDUAL: Placement(features=EMBED_ORDER),
            Stage.INPUT: Placement(features=("x",)),
            Stage.PROJECTED: Placement(features=("z", "y"), partial=("x",)),
            Stage.HIDDEN: hidden,
            Stage.CONTRACTED: Placement(features=("z", "y")),
            Stage.PRODUCED: Placement(features=("x",), partial=("z", "y")),
        }[stage]

    def _gathered(self, stage: Stage) -> Placement:
        count = _TOKENS[self.ffn]
        tokens = TOKEN_ORDER[:count]
        features = tuple(axis for axis in ("z", "y") if axis not in tokens)
        return {
            Stage.RESIDUAL: Placement(tokens, features),
            Stage.INPUT: Placement(tokens),
            Stage.PROJECTED: Placement(tokens, features),
            Stage.HIDDEN: Placement(tokens, features),
            Stage.CONTRACTED: Placement(tokens, features),
            Stage.PRODUCED: Placement(tokens, partial=features),
        }[stage]

    def goes_around(self, plan: Sequence[Move]) -> bool:
        """Returns whether the last of the moves to `Stage.CONTRACTED` goes around a ring."""
        if self.overlap is Ring.PLAIN or not plan:
            return False
        last = plan[-1]
        return (last.kind, last.dim, len(last.axes)) == (Kind.ALL_GATHER, Dim.FEATURES, 1)

    def kv(self, stage: Stage, num_kv_heads: int, sizes: dict[str, int]) -> Placement:
        """Returns where keys and values lie: as the queries, but heads are never split.

        They are cut over the slowest axes that divide them, and copied over the others.
        """
        like = self.placement(stage)
        return Placement(like.tokens, _dividing(like.features, num_kv_heads, sizes), like.partial)

    def stored(self, axis: str, size: int, sizes: dict[str, int]) -> tuple[str, ...]:
        """Returns the mesh axes that cut a weight's logical axis where it is stored.

        All layouts but WS1D store weights alike: a phase may gather them and another need not.
        """
        one = self.ffn is Ffn.WS1D
        match axis:
            case "embed":
                return () if one else ("x",)
            case "ffn" | "heads" | "vocab" | "fused":
                return HIDDEN_ORDER if one else ("z", "y")
            case "kv_heads":
                return _dividing(HIDDEN_ORDER if one else ("z", "y"), size, sizes)
        return ()

    def cuts(
        self, axes: Sequence[str], shape: Sequence[int], sizes: dict[str, int]
    ) -> tuple[tuple[str, ...], ...]:
        """Returns the mesh axes that cut each dimension of a stored parameter.

        Vectors, biases among them, are whole on every device: weights alone read the width.
        """
        inner = [axis for axis in axes if axis != "layers"]
        if "embed" not in inner or len(inner) == 1:
            return ((),) * len(axes)
        pairs = zip(axes, shape, strict=True)
        return tuple(
            tuple(a for a in self.stored(axis, size, sizes) if sizes[a] > 1) for axis, size in pairs
        )

    def used(self, axis: str, size: int, sizes: dict[str, int]) -> tuple[str, ...]:
        """Returns the mesh axes that cut a weight's logical axis in a product."""
        gathered = TOKEN_ORDER[: _TOKENS.get(self.ffn, 0)]
        return tuple(a for a in self.stored(axis, size, sizes) if a not in gathered)

    def __str__(self) -> str:
        ring = "" if self.overlap is Ring.PLAIN else f"/{self.overlap}"
        wire = "" if self.wire is None else f"/{self.wire} wire"
        return f"{self.ffn}/{self.heads}{ring}{wire}"


@cache
def _placement(phase: PhaseLayout, stage: Stage) -> Placement:
    """Returns where a stage lies; there are few layouts and stages, and searches ask often."""
    return phase._find(stage)


def _dividing(axes: tuple[str, ...], count: int, sizes: dict[str, int]) -> tuple[str, ...]:
    kept: list[str] = []
    for axis in axes:
        if count % math.prod(sizes[name] for name in [*kept, axis]):
            break
        kept.append(axis)
    return tuple(kept)
