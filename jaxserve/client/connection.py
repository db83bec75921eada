"""How a client reaches its server: address, certificates, key, and when it tries again."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from jaxserve import errors
from jaxserve.errors import JaxserveError, UsageError

MAX_MESSAGE_BYTES = 64 << 20
PING_S = 60  # a server closes the connection of those who ask more than once in 10 s

_LOCAL = ("localhost", "127.", "[::1]", "unix:")


@dataclass(frozen=True)
class Tls:
    """Files (PEM) of an encrypted connection.

    Attributes:
        ca: certificates that the server's must be signed by; None takes the usual ones.
        cert, key: the client's own, where the server asks for them; both or neither.
    """

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Returns what gRPC makes of the files."""
        if (self.cert is None) != (self.key is None):
            raise UsageError("cert and key belong together; give both or neither")

        def read(path: Path | None) -> bytes | None:
            return None if path is None else Path(path).read_bytes()

        return grpc.ssl_channel_credentials(read(self.ca), read(self.key), read(self.cert))


@dataclass(frozen=True)
class Retries:
    """When a call is tried again: only while nothing of its answer has come.

    gRPC itself does it, for calls that end as UNAVAILABLE or RESOURCE_EXHAUSTED, within their
    deadline; a server that says when to come again is obeyed.

    Attributes:
        attempts: in all, 1 to 5; 1 never tries again.
        first_s: mean wait before the second attempt.
        factor: by which each wait is longer than the one before.
        longest_s: longest mean wait.
    """

    attempts: int = 4
    first_s: float = 0.2
    factor: float = 2.0
    longest_s: float = 5.0

    def __post_init__(self) -> None:
        if not 1 <= self.attempts <= 5:
            raise UsageError(f"attempts={self.attempts} is out of range; it must be from 1 to 5")
        if self.first_s <= 0 or self.factor < 1 or self.longest_s <= 0:
            raise UsageError("first_s and longest_s must be above 0, and factor at least 1")

    def options(self) -> list[tuple[str, Any]]:
        """Returns what a channel is told."""
        if self.attempts == 1:
            return [("grpc.enable_retries", 0)]
        policy = {
            "maxAttempts": self.attempts,
            "initialBackoff": f"{self.first_s:.3f}s",
            "maxBackoff": f"{self.longest_s:.3f}s",
            "backoffMultiplier": self.factor,
            "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
        }
        config = {"methodConfig": [{"name": [{}], "retryPolicy": policy}]}
        return [
            ("grpc.enable_retries", 1),
            ("grpc.service_config", json.dumps(config)),
            ("grpc.per_rpc_retry_buffer_size", MAX_MESSAGE_BYTES),  # long prompts, too
        ]


@dataclass(frozen=True)
class Connection:
    """Where a server is and how it is spoken to.

    Attributes:
        target: "host:port".
        api_key: sent with each call.
        tls: True or files for an encrypted connection.
        timeout_s: deadline of calls that name none; None waits for ever.
        retries: when calls are tried again.
    """

    target: str
    api_key: str | None = field(default=None, repr=False)
    tls: Tls | bool = False
    timeout_s: float | None = None
    retries: Retries = field(default_factory=Retries)

    def __post_init__(self) -> None:
        if self.api_key is not None and not self.tls and not self.target.startswith(_LOCAL):
            raise UsageError(f"the API key would travel to {self.target} unencrypted; use tls=True")

    def open(self, secure: Callable[..., Any], insecure: Callable[..., Any]) -> Any:
        """Returns a channel that one of the functions makes."""
        options = [
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            ("grpc.keepalive_time_ms", PING_S * 1000),
            ("grpc.initial_reconnect_backoff_ms", 200),
            ("grpc.max_reconnect_backoff_ms", 5000),
            *self.retries.options(),
        ]
        if not self.tls:
            return insecure(self.target, options=options)
        tls = Tls() if self.tls is True else self.tls
        return secure(self.target, tls.credentials(), options=options)

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Returns what goes with each call."""
        return () if self.api_key is None else (("authorization", f"Bearer {self.api_key}"),)


_ERRORS: dict[grpc.StatusCode, type[JaxserveError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.UsageError,
    grpc.StatusCode.OUT_OF_RANGE: errors.ContextLengthError,
    grpc.StatusCode.UNAUTHENTICATED: errors.UnauthenticatedError,
    grpc.StatusCode.NOT_FOUND: errors.NotFoundError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.QueueFullError,
    grpc.StatusCode.UNAVAILABLE: errors.UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineError,
    grpc.StatusCode.UNIMPLEMENTED: errors.UnsupportedError,
}
_BY_TYPE: dict[str, type[JaxserveError]] = {
    "capacity_exceeded": errors.CapacityError,
    "too_large": errors.TooLargeError,
    "model_not_found": errors.ModelNotFoundError,
}


def error_of(failed: Any) -> JaxserveError:
    """Returns the error that a failed call stands for, with a note of its request's id."""
    metadata = dict(failed.trailing_metadata() or ())
    named = _BY_TYPE.get(metadata.get("x-error-type", ""))
    error = (named or _ERRORS.get(failed.code(), errors.GenerationError))(
        failed.details() or failed.code().name
    )
    if request_id := metadata.get("x-request-id"):
        error.add_note(f"request {request_id}")
    return error
