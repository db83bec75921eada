"""What a load generator needs of a server, whatever the protocol."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from jaxserve.benchmark.metrics import Record
from jaxserve.benchmark.trace import TraceRequest

Note = Callable[[], float]
"""Returns the seconds since the run began."""


class CallError(Exception):
    """A request did not get what it asked for."""


class RefusedError(CallError):
    """The server took the request for one too many: it is full, draining or not ready."""


@dataclass(frozen=True)
class TargetFacts:
    """What was found out about a server before the run.

    Attributes:
        model: the name that requests give.
        context: most tokens of prompt and output together, where the server tells.
        vocab_size: ids that a prompt may hold, where the server tells.
        prompts: "token ids", or "words" where it takes only text.
        ignore_eos: whether it can be told to go on past the end of text; if not, outputs may be
            shorter than the trace asks for.
        counted: how tokens are counted: by the server's "usage", or by the "pieces" of its
            answers where it gives none.
    """

    model: str
    context: int | None
    vocab_size: int | None
    prompts: str
    ignore_eos: bool
    counted: str


class Askable(Protocol):
    """What takes requests."""

    async def call(self, request: TraceRequest, record: Record, clock: Note) -> None:
        """Sends a request and notes the arrival of its tokens; raises CallError."""
        ...


class Target(Askable, Protocol):
    """One server, asked through one protocol."""

    async def prepare(self) -> TargetFacts:
        """Returns what the server can do, after a request or two; raises CallError."""
        ...

    async def close(self) -> None:
        """Closes connections."""
        ...
