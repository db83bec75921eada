"""Bounds that no operator needs to set."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ConnectionLimits:
    """What one connection may take before there is a request.

    Attributes:
        max_head_bytes: longest request line with all headers.
        max_headers: most headers.
        max_pipelined: requests that may wait for the answer to one before them; each with a body
            of up to 64 KiB.
        max_discarded_bytes: most of a body that is thrown away after an early answer.
        head_timeout_s: longest wait for a request's headers, from the first byte or, on a new
            connection, from its opening.
        keep_alive_s: how long a connection stays open without a request.
    """

    max_head_bytes: int = 32 << 10
    max_headers: int = 100
    max_pipelined: int = 16
    max_discarded_bytes: int = 64 << 20
    head_timeout_s: float = 10.0
    keep_alive_s: int = 30


@dataclass(frozen=True)
class RequestLimits:
    """What one request may take.

    Attributes:
        max_header_bytes: of all headers and the path.
        max_headers: most headers.
        body_timeout_s: longest time that a body may take to arrive.
        write_timeout_s: a client that takes nothing of a stream for so long is gone.
    """

    max_header_bytes: int = 32 << 10
    max_headers: int = 100
    body_timeout_s: float = 30.0
    write_timeout_s: float = 60.0
