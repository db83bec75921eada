"""What a server answers to an error: one table for HTTP and gRPC.

status = status_of(error)
status.http, status.openai_type, status.code     # 429, "rate_limit_error", "queue_full"
status.grpc                                      # "RESOURCE_EXHAUSTED", a name of StatusCode
public_message(error)
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from jaxserve import errors

INTERNAL_MESSAGE = "the server failed on this request; its log tells more under the request's id"


@dataclass(frozen=True)
class Status:
    """An error as protocols name it.

    Attributes:
        http: status code.
        openai_type: `error.type` of an OpenAI-compatible body.
        grpc: name of the gRPC status code.
        code: `error.code` of the body, for programs.
    """

    http: int
    openai_type: str
    grpc: str
    code: str


_INVALID = "invalid_request_error"
_TABLE: dict[type[BaseException], Status] = {
    errors.NotFoundError: Status(404, _INVALID, "NOT_FOUND", "not_found"),
    errors.ModelNotFoundError: Status(404, _INVALID, "NOT_FOUND", "model_not_found"),
    errors.ContextLengthError: Status(400, _INVALID, "OUT_OF_RANGE", "context_length_exceeded"),
    errors.CapacityError: Status(400, _INVALID, "OUT_OF_RANGE", "capacity_exceeded"),
    errors.UsageError: Status(400, _INVALID, "INVALID_ARGUMENT", "invalid_value"),
    errors.TokenizerError: Status(400, _INVALID, "INVALID_ARGUMENT", "invalid_value"),
    errors.UnauthenticatedError: Status(
        401, "authentication_error", "UNAUTHENTICATED", "invalid_api_key"
    ),
    errors.TooLargeError: Status(413, _INVALID, "RESOURCE_EXHAUSTED", "too_large"),
    errors.QueueFullError: Status(429, "rate_limit_error", "RESOURCE_EXHAUSTED", "queue_full"),
    asyncio.CancelledError: Status(499, "cancelled_error", "CANCELLED", "cancelled"),
    errors.UnsupportedError: Status(501, "not_implemented_error", "UNIMPLEMENTED", "unsupported"),
    errors.UnavailableError: Status(503, "service_unavailable_error", "UNAVAILABLE", "unavailable"),
    errors.DeadlineError: Status(504, "timeout_error", "DEADLINE_EXCEEDED", "deadline_exceeded"),
    errors.GenerationError: Status(500, "server_error", "INTERNAL", "generation_failed"),
}
INTERNAL = Status(500, "server_error", "INTERNAL", "internal_error")


def status_of(error: BaseException) -> Status:
    """Returns the status of an error: that of the nearest of its types in the table."""
    for kind in type(error).__mro__:
        if (status := _TABLE.get(kind)) is not None:
            return status
    return INTERNAL


def public_message(error: BaseException) -> str:
    """Returns what a user may read of an error.

    One that was not raised on purpose says nothing, nor does a step's failure: its cause may hold
    paths and addresses. Both are in the log.
    """
    return INTERNAL_MESSAGE if status_of(error).http == INTERNAL.http else str(error)


def retry_after_s(error: BaseException) -> float | None:
    """Returns the seconds after which the request is worth sending again; None if never."""
    return getattr(error, "retry_after_s", None)
