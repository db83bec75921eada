"""What is known of a request before its body is parsed."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.types import Receive

Result = TypeVar("Result")

_PLACE = "jaxserve.call"


class ClientGoneError(Exception):
    """The client closed its connection; there is nobody to answer."""


@dataclass(frozen=True)
class Call:
    """One HTTP request.

    Attributes:
        request_id: of the client's header, or drawn.
        client: name of the API key, empty without one.
        salt: what keeps cached prompts of different keys apart.
        body: read to its end.
        notes: what the log should say of it besides; written by the route.
    """

    request_id: str
    client: str = ""
    salt: str = ""
    body: bytes = b""
    notes: dict[str, str] = field(default_factory=dict)


def set_call(scope: Any, call: Call) -> None:
    """Keeps what is known of a request where `call_of` finds it."""
    scope[_PLACE] = call


def call_of(request: Request) -> Call:
    """Returns what is known of a request."""
    return request.scope[_PLACE]


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """Returns what `work` gives, which is cancelled when the client closes its connection.

    Args:
        receive: of a request whose body was read.

    Raises:
        ClientGoneError: the client went before.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
