"""Errors as HTTP tells them: a status, and a body of the form that OpenAI's clients read.

{"error": {"message": "…", "type": "invalid_request_error", "param": "n", "code": null}}
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping

import msgspec
from starlette.exceptions import HTTPException
from starlette.responses import Response

from jaxserve.errors import JaxserveError, UsageError
from jaxserve.serving.request import SamplingParams
from jaxserve.serving.status import INTERNAL, public_message, retry_after_s, status_of

_log = logging.getLogger(__name__)

_FIELDS = frozenset(SamplingParams.__struct_fields__)

UNSUPPORTED = "unsupported_parameter"

JSON = "application/json"

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    408: "timeout_error",
    429: "rate_limit_error",
}
"""The type of statuses that are neither `invalid_request_error` nor `server_error`."""


class FieldError(UsageError):
    """A field of a request is wrong.

    Attributes:
        param: the field, as a path in the body.
        code: what is wrong, for programs.
    """

    def __init__(self, message: str, param: str | None, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.code = param, code


class HttpError(JaxserveError):
    """A request that HTTP itself refuses.

    Attributes:
        status: of the answer.
        code: what is wrong, for programs.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, dict(headers or {})


class _Detail(msgspec.Struct):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct):
    """The body of every answer that is an error."""

    error: _Detail


def error_body(
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    kind: str | None = None,
) -> bytes:
    """Returns the body of an answer with this status.

    Args:
        kind: the `type`; None takes the usual one of the status.
    """
    usual = "server_error" if status >= 500 else "invalid_request_error"
    known = kind or _TYPES.get(status, usual)
    # Clients' own words may come back in a message, surrogates without a partner too.
    clean = message.encode("utf-8", "replace").decode()
    return msgspec.json.encode(ErrorBody(_Detail(clean, known, param, code)))


class Description(msgspec.Struct, frozen=True):
    """An error as an answer."""

    status: int
    body: bytes
    headers: dict[str, str]


def describe(error: BaseException) -> Description:
    """Returns the answer to an error; one that was not raised on purpose is logged."""
    if isinstance(error, HttpError):
        body = error_body(error.status, str(error), code=error.code)
        return Description(error.status, body, error.headers)
    if isinstance(error, HTTPException):
        message = _framework_message(error)
        return Description(
            error.status_code,
            error_body(error.status_code, message, code=_code(error.status_code)),
            dict(error.headers or {}),
        )
    status = status_of(error)
    if status.http == INTERNAL.http:
        _log.error("a request failed", exc_info=error)
    param = error.param if isinstance(error, FieldError) else _param(str(error))
    code = error.code if isinstance(error, FieldError) and error.code else status.code
    wait_s = retry_after_s(error)
    headers = {} if wait_s is None else {"retry-after": str(max(1, math.ceil(wait_s)))}
    body = error_body(status.http, public_message(error), param, code, status.openai_type)
    return Description(status.http, body, headers)


def answer(error: BaseException) -> Response:
    """Returns an error as a response."""
    told = describe(error)
    return Response(told.body, told.status, told.headers, JSON)


def _framework_message(error: HTTPException) -> str:
    if error.status_code == 404:
        return "there is no such route; /docs lists them"
    if error.status_code == 405:
        return "this route has other methods; /docs lists them"
    return str(error.detail)


def _code(status: int) -> str | None:
    return {404: "route_not_found", 405: "method_not_allowed"}.get(status)


def _param(message: str) -> str | None:
    """Returns the field that a message of the form `field=value …` is about."""
    named = re.match(r"([a-z_]+)=", message)
    return named[1] if named is not None and named[1] in _FIELDS else None
