"""Server-sent events: one write for all that a step gave."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jaxserve.serving.http.call import ClientGoneError, unless_gone
from jaxserve.serving.http.errors import describe

_log = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"


def frame(data: bytes) -> bytes:
    """Returns one event."""
    return b"data: " + data + b"\n\n"


class EventStream(Response):
    """A stream of events that ends when its client goes.

    Args:
        chunks: the events, as many as there are at once in each piece. It is closed in the end.
        close: frees what stands behind the chunks; called once, whatever happens.
        end: follows the last event, and an error.
        write_timeout_s: longest wait for the client to take a piece; then it is gone.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        chunks: AsyncGenerator[bytes],
        close: Callable[[], Awaitable[object]],
        end: bytes,
        write_timeout_s: float,
    ) -> None:
        # No buffering on the way, or the text comes in one piece.
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        super().__init__(None, headers=headers, media_type=self.media_type)
        del self.headers["content-length"]
        self._chunks, self._close, self._end = chunks, close, end
        self._write_timeout_s = write_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(receive, self._send(send))
        except ClientGoneError:
            _log.debug("the client of a stream has gone")
        finally:
            await self._close()

    async def _send(self, send: Send) -> None:
        start = {
            "type": "http.response.start",
            "status": self.status_code,
            "headers": self.raw_headers,
        }
        await self._write(send, start)
        try:
            async with aclosing(self._chunks) as chunks:
                async for chunk in chunks:
                    await self._write(send, _body(chunk))
            last = self._end
        except (ClientGoneError, asyncio.CancelledError):
            raise
        except Exception as error:
            last = frame(describe(error).body) + self._end
        await self._write(send, _body(last, more=False))

    async def _write(self, send: Send, message: dict[str, object]) -> None:
        try:
            async with asyncio.timeout(self._write_timeout_s):
                await send(message)
        except TimeoutError:
            raise ClientGoneError from None


def _body(data: bytes, more: bool = True) -> dict[str, object]:
    return {"type": "http.response.body", "body": data, "more_body": more}
