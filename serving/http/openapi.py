"""The OpenAPI schema: request and answer bodies as they are read and written, by msgspec."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from jaxserve.serving.http.errors import JSON, ErrorBody

_REF = "#/components/schemas/{name}"

_ERRORS = {
    400: "a field is malformed, unknown, out of range or not supported",
    401: "the API key is missing or not known",
    403: "a page of another site calls",
    404: "there is no such model",
    408: "the body does not arrive",
    413: "the body is too large",
    415: "the body is no JSON",
    429: "too much is under way; Retry-After tells when to try again",
    431: "the headers are too large",
    499: "the request was aborted",
    500: "the server failed",
    503: "the server starts, drains or has lost its engine",
    504: "the answer takes longer than this server allows",
}
_READING = (401, 403, 404, 431, 500)


def operation(
    answer: type[msgspec.Struct] | str,
    request: type[msgspec.Struct] | None = None,
    *,
    streams: bool = False,
    also: Sequence[int] = (),
) -> dict[str, Any]:
    """Returns what a route's declaration says of its bodies.

    Args:
        answer: the body of a 200, or the media type of one that is no JSON.
        request: the body that is read.
        streams: the answer may be a stream of server-sent events.
        also: statuses besides 200 that come with the answer's body.
    """
    content = {answer: {}} if isinstance(answer, str) else {JSON: {"schema": _reference(answer)}}
    if streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    statuses = _READING if request is None else tuple(_ERRORS)
    responses: dict[int | str, Any] = {200: {"description": "done", "content": content}}
    for status in statuses:
        responses[status] = _failure(_ERRORS[status])
    responses |= {status: {"description": _ERRORS[status], "content": content} for status in also}
    responses["default"] = _failure("any other error")
    said: dict[str, Any] = {"responses": responses}
    if request is not None:
        body = {"required": True, "content": {JSON: {"schema": _reference(request)}}}
        said["openapi_extra"] = {"requestBody": body}
    return said


def set_schema(app: FastAPI, kinds: Sequence[type[msgspec.Struct]], with_keys: bool) -> None:
    """Makes an app's OpenAPI schema define the bodies that its routes name.

    Args:
        with_keys: requests need a key.
    """

    def schema() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = get_openapi(
                title=app.title,
                version=app.version,
                description=app.description,
                routes=app.routes,
            )
            _, found = msgspec.json.schema_components([*kinds, ErrorBody], ref_template=_REF)
            components = made.setdefault("components", {})
            components.setdefault("schemas", {}).update(found)
            if with_keys:
                components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
                made["security"] = [{"key": []}]
            app.openapi_schema = made
        return app.openapi_schema

    app.openapi = schema


def _reference(kind: type[msgspec.Struct]) -> dict[str, str]:
    return {"$ref": _REF.format(name=kind.__name__)}


def _failure(description: str) -> dict[str, Any]:
    return {"description": description, "content": {JSON: {"schema": _reference(ErrorBody)}}}
