"""Counts what is under way before anything of it is parsed, and turns away what is too much.

gate = Gate(max_requests=1024, max_bytes=256 << 20)
with gate.enter(content_length):        # QueueFullError: try again later
    body = await request.body()
    ...
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from jaxserve.errors import QueueFullError, TooLargeError
from jaxserve.serving.server_options import ServerOptions

MAX_BYTES = 256 << 20
"""Bytes of bodies that may be under way at once."""


class Gate:
    """The entrance of a server. One asyncio loop owns it.

    Args:
        max_requests: under way at once.
        max_bytes: of their bodies together.
        max_body_bytes: of one body.

    Attributes:
        requests, num_bytes: under way now.
        refused: turned away so far.
    """

    def __init__(self, max_requests: int, max_bytes: int, max_body_bytes: int) -> None:
        self._max_requests = max_requests
        self._max_bytes = max(max_bytes, max_body_bytes)
        self._max_body_bytes = max_body_bytes
        self.requests = self.num_bytes = self.refused = 0

    @classmethod
    def of(cls, options: ServerOptions) -> Gate:
        """Returns the gate of a server."""
        return cls(options.max_requests, MAX_BYTES, options.max_body_bytes)

    @contextmanager
    def enter(self, num_bytes: int = 0) -> Iterator[None]:
        """Counts a request while the block runs.

        Args:
            num_bytes: length of its body; of an unknown length the most that will be read.

        Raises:
            TooLargeError: the body is larger than any that is read.
            QueueFullError: too much is under way.
        """
        self._check(num_bytes)
        self.requests += 1
        self.num_bytes += num_bytes
        try:
            yield
        finally:
            self.requests -= 1
            self.num_bytes -= num_bytes

    def _check(self, num_bytes: int) -> None:
        if num_bytes > self._max_body_bytes:
            self.refused += 1
            raise TooLargeError(
                f"the body has {num_bytes:,} bytes and the limit is {self._max_body_bytes:,}"
            )
        if self.requests >= self._max_requests:
            self.refused += 1
            raise QueueFullError(
                f"{self.requests} requests are under way, which is the limit; try again later"
            )
        if self.num_bytes + num_bytes > self._max_bytes:
            self.refused += 1
            raise QueueFullError(
                f"{self.num_bytes:,} bytes of requests are under way and {num_bytes:,} more "
                f"exceed the limit of {self._max_bytes:,}; try again later"
            )
