"""uvicorn, with bounds on what a connection may cost before there is a request.

server = make_server(app, "127.0.0.1", 8000)
await server.serve()

uvicorn itself reads headers of any size, waits for them without end, and leaves a pipelined
request running when its connection closes.
"""

from __future__ import annotations

import asyncio
import ssl
from typing import Any

import httptools
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from jaxserve.serving.http.errors import error_body
from jaxserve.serving.http.limits import ConnectionLimits

DEFAULT_LIMITS = ConnectionLimits()


class BoundedProtocol(HttpToolsProtocol):
    """One HTTP connection; see `ConnectionLimits`."""

    limits = DEFAULT_LIMITS

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # pyright: ignore[reportArgumentType]
        self._head_bytes = 0
        self._discarded_bytes = 0
        self._too_large = False
        self._in_head = True
        self._running: RequestResponseCycle | None = None
        self._head_timer: asyncio.TimerHandle | None = None
        self._rest_timer: asyncio.TimerHandle | None = None
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_timer()
        if self._rest_timer is not None:
            self._rest_timer.cancel()
        # uvicorn tells the newest request only.
        for cycle in (self._running, *(waiting for waiting, _ in self.pipeline)):
            if cycle is not None and not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        self.pipeline.clear()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()

    def data_received(self, data: bytes) -> None:
        if self._in_head and self._head_timer is None:
            self._await_head()
        super().data_received(data)
        if self._in_head and not self.transport.is_closing():
            self._count_head(len(data))
            if self._too_large:
                self.send_400_response("")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        self._head_bytes = 0

    def on_url(self, url: bytes) -> None:
        self._count_head(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count_head(len(name) + len(value))
        if self._too_large or len(self.headers) >= self.limits.max_headers:
            self._too_large = True
            raise httptools.HttpParserError("too many or too large headers")
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._forget_timer()
        super().on_headers_complete()
        if len(self.pipeline) > self.limits.max_pipelined:
            self.transport.abort()
        elif self.pipeline:
            # uvicorn stops reading here, and would not see the client go.
            self.flow.resume_reading()

    def on_body(self, body: bytes) -> None:
        if self.cycle.response_complete:
            self._discarded_bytes += len(body)
            if self._discarded_bytes > self.limits.max_discarded_bytes:
                self.transport.abort()
            return
        super().on_body(body)
        if self.cycle is not self._running and len(self.cycle.body) > HIGH_WATER_LIMIT:
            self.transport.abort()

    def on_response_complete(self) -> None:
        self._in_head = True
        super().on_response_complete()
        if self.transport.is_closing():
            self._watch_rest()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._watch_rest()

    def send_400_response(self, msg: str) -> None:
        status, message = 400, "this is not a valid HTTP/1.1 request"
        if self._too_large:
            status, message = (
                431,
                (
                    f"the headers exceed {self.limits.max_head_bytes} bytes or "
                    f"{self.limits.max_headers} headers; send fewer or shorter ones"
                ),
            )
        self._answer(status, message)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        task = self.loop.create_task(cycle.run_asgi(app))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        task.add_done_callback(lambda _: self._end(cycle))

    def _end(self, cycle: RequestResponseCycle) -> None:
        """Drops the connection of an answer that was given up: its client takes nothing."""
        if cycle.response_started and not (cycle.response_complete or cycle.disconnected):
            self.transport.abort()

    def _watch_rest(self) -> None:
        """Drops a closed connection whose client takes nothing more of the last answer."""
        if left := self.transport.get_write_buffer_size():
            self._rest_timer = self.loop.call_later(
                self.limits.keep_alive_s, self._check_rest, left
            )

    def _check_rest(self, before: int) -> None:
        if self.transport.get_write_buffer_size() < before:
            self._watch_rest()
        else:
            self.transport.abort()

    def _answer(self, status: int, message: str) -> None:
        """Answers without the application, and closes."""
        running = self._running
        if running is not None and not running.response_complete:
            # Its own body is at fault, or what came behind it.
            free = running is self.cycle and not running.response_started
            running.disconnected = True
            running.message_event.set()
        else:
            free = True
        if free and not self.transport.is_closing():
            body = error_body(status, message)
            head = (
                STATUS_LINE[status] + b"content-type: application/json\r\nconnection: close\r\n"
                b"content-length: %d\r\n\r\n" % len(body)
            )
            self.transport.write(head + body)
        self.transport.close()

    def _count_head(self, num_bytes: int) -> None:
        self._head_bytes += num_bytes
        self._too_large = self._too_large or self._head_bytes > self.limits.max_head_bytes

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(self.limits.head_timeout_s, self._expire)

    def _forget_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _expire(self) -> None:
        self._answer(408, f"no whole request came within {self.limits.head_timeout_s:g} s")


def make_server(
    app: ASGIApp,
    host: str,
    port: int,
    *,
    tls: ssl.SSLContext | None = None,
    limits: ConnectionLimits = DEFAULT_LIMITS,
    shutdown_s: int | None = None,
) -> uvicorn.Server:
    """Returns a server that is not started; signals and logs are its caller's.

    Args:
        port: 0 takes a free one.
        tls: what connections are encrypted with; None leaves them plain.
        shutdown_s: how long requests under way may still take when it stops.
    """
    protocol = type("_Protocol", (BoundedProtocol,), {"limits": limits})
    config = uvicorn.Config(
        app,
        host,
        port,
        http=protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=limits.keep_alive_s,
        timeout_graceful_shutdown=shutdown_s,
        ssl_context_factory=None if tls is None else lambda _config, _default: tls,
    )
    return uvicorn.Server(config)
