"""What an engine's process makes for its server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from jaxserve.serving.engine import Engine
from jaxserve.serving.multihost.leader import Leader
from jaxserve.serving.multihost.ranks import Ranks
from jaxserve.serving.wire import Start


class Made(NamedTuple):
    """An engine that is ready, and what there is to tell of it.

    Attributes:
        info: versions, capacity, memory plan.
        late_compiles: how many programs were compiled since.
        trace: records for so many seconds and returns the folder.
        ranks: the group it leads.
    """

    engine: Engine
    info: dict[str, Any]
    late_compiles: Callable[[], int] = lambda: 0
    trace: Callable[[float], str] | None = None
    ranks: Leader | None = None


class Follows(NamedTuple):
    """A process that does what another rank plans.

    Attributes:
        ranks: its group.
        follow: runs plans until the group ends in good order.
        info: versions, capacity, memory plan.
    """

    ranks: Ranks
    follow: Callable[[], None]
    info: dict[str, Any]


class Build(Protocol):
    """Makes what a server asks for.

    `phase` is told what begins; `joined`, in which group, as soon as all of it are there.
    """

    def __call__(
        self, start: Start, phase: Callable[[str], None], joined: Callable[[Ranks], None]
    ) -> Made | Follows: ...
