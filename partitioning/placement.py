"""Where an activation lies on the mesh, and the collectives that move it elsewhere.

    after_projection = Placement(features=("z", "y"), partial=("x",))
    by_sequence = Placement(tokens=("x", "y", "z"))
    moves(after_projection, by_sequence)
    # reduce_scatter over x into tokens, all_to_all over z, y from features to tokens

An activation is [tokens, features, ...]; axes of the mesh cut either dimension, hold terms of a
sum, or hold copies. The same moves are carried out by `MeshComm` and counted by `cost`. No JAX.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby
from typing import Any

AXES = ("x", "y", "z")


class Kind(StrEnum):
    """A collective, or a cut of what every device holds already."""

    ALL_GATHER = "all-gather"
    REDUCE_SCATTER = "reduce-scatter"
    ALL_REDUCE = "all-reduce"
    ALL_TO_ALL = "all-to-all"
    PERMUTE = "collective-permute"
    CUT = "cut"


class Dim(StrEnum):
    """A dimension of an activation that the mesh may cut."""

    TOKENS = "tokens"
    FEATURES = "features"


@dataclass(frozen=True)
class Placement:
    """How [tokens, features, ...] lies on the mesh.

    Attributes:
        tokens, features: mesh axes that cut the dimension, the slowest first.
        partial: mesh axes along which devices hold terms of a sum.

    Over all other axes devices hold copies.
    """

    tokens: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    partial: tuple[str, ...] = ()

    def over(self, sizes: dict[str, int]) -> Placement:
        """Returns the placement without axes of one device."""
        kept = [
            tuple(axis for axis in axes if sizes[axis] > 1)
            for axes in (self.tokens, self.features, self.partial)
        ]
        return Placement(*kept)

    def __str__(self) -> str:
        tokens, features = (
            name + (f".{''.join(axes)}" if axes else "")
            for name, axes in (("T", self.tokens), ("F", self.features))
        )
        rest = f" {{{''.join(self.partial)} partial}}" if self.partial else ""
        return f"[{tokens}, {features}]{rest}"


@dataclass(frozen=True)
class Move:
    """One collective over `axes`, which are in the order of the pieces.

    Attributes:
        dim: the dimension that is gathered, scattered or cut; None for an all-reduce. Of an
            all-to-all, the one that is joined.
        to: of an all-to-all, the dimension that is cut.
        token_axes: of an all-to-all, the same axes in the order in which they cut the tokens.
    """

    kind: Kind
    axes: tuple[str, ...]
    dim: Dim | None = None
    to: Dim | None = None
    token_axes: tuple[str, ...] = ()


def moves(source: Placement, target: Placement, mesh_axes: Collection[str] = AXES) -> list[Move]:
    """Returns the moves from one placement to another, in order.

    Axes leave a dimension innermost first and come to it outermost first, so pieces stay whole
    and in order. Neighbouring axes that do the same go together, except over the whole mesh:
    there one gather or scatter becomes an all-reduce on TPU, and two do not.

    Args:
        mesh_axes: axes of more than one device.

    Raises:
        ValueError: an axis would have to leave from the middle of a dimension.
    """
    found: list[Move] = []
    tokens, features = list(source.tokens), list(source.features)

    def is_whole(axes: Sequence[str]) -> bool:
        return len(axes) > 1 and set(axes) == set(mesh_axes)

    # Out of the tokens, innermost first.
    leaving = [axis for axis in reversed(source.tokens) if axis not in target.tokens]
    for to_features, run in _runs(leaving, lambda axis: axis in target.features):
        _drop(tokens, run)
        if to_features:
            order = tuple(axis for axis in target.features if axis in run)
            features.extend(order)
            joined = tuple(reversed(run))
            found.append(Move(Kind.ALL_TO_ALL, order, Dim.TOKENS, Dim.FEATURES, joined))
        else:
            for axes in _nested(tuple(reversed(run)), is_whole(run), inner_first=True):
                found.append(Move(Kind.ALL_GATHER, axes, Dim.TOKENS))
    # Out of the features to nowhere; sums first, while there is less to sum, unless scattering
    # leaves still less of it.
    stay = {*target.features, *target.tokens}
    summed = tuple(axis for axis in source.partial if axis not in stay)
    sums = [Move(Kind.ALL_REDUCE, summed)] if summed else []
    scatters = len(summed) < len(source.partial)
    found.extend([] if scatters else sums)
    leaving = [axis for axis in reversed(features) if axis not in stay]
    if leaving:
        _drop(features, leaving)
        for axes in _nested(tuple(reversed(leaving)), is_whole(leaving), inner_first=True):
            found.append(Move(Kind.ALL_GATHER, axes, Dim.FEATURES))
    # Into the tokens, then into the features, outermost first.
    arriving = [axis for axis in target.tokens if axis not in tokens]
    for state, run in _runs(arriving, lambda axis: _state(axis, features, source.partial)):
        tokens.extend(run)
        if state == "features":
            order = tuple(axis for axis in features if axis in run)
            _drop(features, list(reversed(order)))
            found.append(Move(Kind.ALL_TO_ALL, order, Dim.FEATURES, Dim.TOKENS, tuple(run)))
        else:
            found.extend(_arrivals(state, run, Dim.TOKENS, is_whole(run)))
    arriving = [axis for axis in target.features if axis not in features]
    for state, run in _runs(arriving, lambda axis: _state(axis, features, source.partial)):
        features.extend(run)
        found.extend(_arrivals(state, run, Dim.FEATURES, is_whole(run)))
    found.extend(sums if scatters else [])
    if (tuple(tokens), tuple(features)) != (target.tokens, target.features):
        raise ValueError(f"no sequence of moves takes {source} to {target}")
    return found


def _state(axis: str, features: Sequence[str], partial: Sequence[str]) -> str:
    return "features" if axis in features else "partial" if axis in partial else "copies"


def _arrivals(state: str, run: list[str], dim: Dim, whole: bool) -> Iterator[Move]:
    if state == "copies":
        yield Move(Kind.CUT, tuple(run), dim)
        return
    for axes in _nested(tuple(run), whole and dim is Dim.FEATURES, inner_first=False):
        yield Move(Kind.REDUCE_SCATTER, axes, dim)


def _nested(axes: tuple[str, ...], whole: bool, inner_first: bool) -> tuple[tuple[str, ...], ...]:
    """Returns axes as one group, or as x and the others where they are the whole mesh."""
    if not whole:
        return (axes,)
    parts = (axes[:1], axes[1:]) if axes[0] == "x" else (axes[:-1], axes[-1:])
    return parts[::-1] if inner_first else parts


def _runs(axes: Sequence[str], key) -> Iterator[tuple[Any, list[str]]]:
    for state, run in groupby(axes, key):
        yield state, list(run)


def _drop(axes: list[str], leaving: Sequence[str]) -> None:
    """Takes the innermost axes away."""
    if axes[len(axes) - len(leaving) :] != list(reversed(leaving)):
        raise ValueError(f"axes {leaving} are not the innermost of {axes}")
    del axes[len(axes) - len(leaving) :]
