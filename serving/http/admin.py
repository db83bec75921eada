"""The routes of the admin port: take a trace, drain, look at the load."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from jaxserve.serving.http.bodies import read
from jaxserve.serving.http.call import call_of
from jaxserve.serving.http.errors import HttpError
from jaxserve.serving.http.info import told
from jaxserve.serving.service import Load, Service

MAX_REQUESTS = 32
MAX_BYTES = 64 << 20


class ProfileRequest(msgspec.Struct, forbid_unknown_fields=True):
    """How long a trace is."""

    seconds: Annotated[float, Meta(gt=0, le=60)] = 1.0


class ProfileBody(msgspec.Struct):
    """Where a trace lies, on the server."""

    folder: str


class StateBody(msgspec.Struct):
    """Whether requests are taken."""

    state: str
    reason: str


class LoadBody(msgspec.Struct):
    """How busy the server is, and what it is."""

    state: str
    reason: str
    load: Load
    server: dict[str, Any]


BODIES = (ProfileRequest, ProfileBody, StateBody, LoadBody)


class Admin:
    """Answers the requests of operators.

    Args:
        service: what they operate.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._tracing = asyncio.Lock()

    async def profile(self, http: HttpRequest) -> Response:
        """Returns where a trace of the next seconds lies."""
        asked = read(call_of(http).body or b"{}", ProfileRequest)
        if self._tracing.locked():
            raise HttpError(409, "a trace is being taken; try again when it is over", "busy")
        async with self._tracing:
            return told(ProfileBody(await self._service.profile(asked.seconds)))

    def drain(self) -> Response:
        """Takes no more requests; those under way go on."""
        self._service.drain()
        return told(StateBody(str(self._service.state), self._service.reason))

    async def load(self) -> Response:
        """Returns how busy the server is."""
        service = self._service
        load, server = await service.load(), await service.server_info()
        return told(LoadBody(str(service.state), service.reason, load, server))
