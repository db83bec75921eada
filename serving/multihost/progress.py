"""Which rank holds up a step that does not end. Pure.

    who_holds(17, {0: At(18, 16), 1: At(16, 16), 2: At(17, 16)})      # "rank 1 has not begun it"

A step ends on no rank before it has begun on all of them. Where it has, every rank waits in the
same collective, and counting plans tells no more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from jaxserve.serving.multihost.group import named

SILENT_S = 2.0
"""A rank that has said nothing for so long is the first to be suspected."""


class At(NamedTuple):
    """How far a rank is.

    Attributes:
        begun: newest plan that its device was given.
        done: newest plan whose tokens it knows.
        silent_s: since it gave a sign of life.
    """

    begun: int
    done: int
    silent_s: float = 0.0


def who_holds(plan: int, ranks: Mapping[int, At]) -> str:
    """Returns, for people, which ranks keep a plan from its end.

    Args:
        plan: what rank 0 waits for.
        ranks: all of them, rank 0 too.
    """
    silent = [rank for rank, at in ranks.items() if at.silent_s >= SILENT_S]
    if silent:
        longest_s = max(ranks[rank].silent_s for rank in silent)
        return f"{_have(silent)} given no sign of life for {longest_s:.0f} s"
    late = [rank for rank, at in ranks.items() if at.begun < plan]
    if late:
        return f"{_have(late)} not begun it"
    within = [rank for rank, at in ranks.items() if at.done < plan]
    if len(within) < len(ranks):
        return f"{_have(within)} not ended it, the others have"
    return "all ranks wait in it"


def _have(ranks: list[int]) -> str:
    return f"{named(ranks)} {'has' if len(ranks) == 1 else 'have'}"
