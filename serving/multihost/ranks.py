"""What rank 0 and the others have in common: a place among the ranks, and how to leave it."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from jaxserve.errors import JaxserveError

LOST_STATUS = 70
"""Exit status of a process whose group is lost."""

TICK_S = 0.25
GREETING_S = 10.0
"""Longest time of a handshake."""

_log = logging.getLogger(__name__)


class Ranks(Protocol):
    """A group as one of its processes sees it.

    Attributes:
        on_lost: called once with the reason when the group is lost; ends the process.
    """

    on_lost: Callable[[str], None]

    def agree(self, point: str, value: int = 0) -> int:
        """Returns the least of the numbers that all ranks bring to a point, where they meet."""
        ...

    def serve(self) -> None:
        """Expects signs of life as often as from ranks that do not load or compile."""
        ...

    def break_off(self, message: str) -> None:
        """Tells the others that this rank cannot go on."""
        ...

    def leave(self) -> None:
        """Ends the connections in good order."""
        ...


def end_process(reason: str) -> None:
    """Ends this process, whatever its threads wait for."""
    logging.shutdown()
    sys.stderr.flush()
    os._exit(LOST_STATUS)


@contextmanager
def breaking_off(ranks: Ranks | None) -> Iterator[None]:
    """Tells the other ranks of an error in the block."""
    try:
        yield
    except Exception as error:
        if ranks is not None:
            # Others read it over the network: only what was raised on purpose travels.
            known = isinstance(error, JaxserveError)
            ranks.break_off(str(error) if known else type(error).__name__)
        raise


class Age:
    """How long something has been the same, counted in ticks.

    While the whole machine sleeps no time passes.
    """

    def __init__(self) -> None:
        self._seen: object = None
        self.seconds = 0.0

    def tick(self, now: object) -> float:
        """Returns the seconds for which `now` has been the same; None is nothing."""
        self.seconds = self.seconds + TICK_S if now is not None and now == self._seen else 0.0
        self._seen = now
        return self.seconds
