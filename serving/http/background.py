"""A server in a thread of its own, for tests, notebooks and measurements.

with serve_in_background(fake_service, ServerOptions(model_name="fake")) as server:
    requests.get(server.url + "/health")
"""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import uvicorn
from starlette.types import ASGIApp

from jaxserve.serving.http.app import create_app
from jaxserve.serving.http.limits import ConnectionLimits
from jaxserve.serving.http.protocol import DEFAULT_LIMITS, make_server
from jaxserve.serving.server_options import ServerOptions
from jaxserve.serving.service import Service

Result = TypeVar("Result")

_PATIENCE_S = 30.0


@dataclass
class BackgroundServer:
    """A running server; its thread writes it, before it is handed out.

    Attributes:
        url: where it answers, without a slash at the end.
        port: of the loopback address.
        service: what it serves.
        app: what answers.
        http: what listens.
        loop: in which service and server live.
    """

    url: str = ""
    port: int = 0
    service: Any = None
    app: Any = None
    http: uvicorn.Server | None = None
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Returns what a coroutine gives in the server's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(_PATIENCE_S)


@contextmanager
def serve_in_background(
    make_service: Callable[[], AbstractAsyncContextManager[Service]],
    options: ServerOptions,
    make_app: Callable[[Service, ServerOptions], ASGIApp] = create_app,
    limits: ConnectionLimits = DEFAULT_LIMITS,
    tls: ssl.SSLContext | None = None,
) -> Iterator[BackgroundServer]:
    """Yields a server that answers on a free port of the loopback address.

    Args:
        make_service: started and ended in the server's loop.
        make_app: what answers, over a service.
        limits: of connections.
        tls: what they are encrypted with.
    """
    server, started = BackgroundServer(), threading.Event()
    failures: list[BaseException] = []

    async def serve() -> None:
        async with make_service() as service:
            server.service, server.app = service, make_app(service, options)
            http = make_server(server.app, "127.0.0.1", 0, tls=tls, limits=limits, shutdown_s=1)
            server.http = http
            serving = asyncio.ensure_future(http.serve())
            while not http.started and not serving.done():
                await asyncio.sleep(0.001)
            if not serving.done():
                server.port = http.servers[0].sockets[0].getsockname()[1]
                scheme = "http" if tls is None else "https"
                server.url = f"{scheme}://127.0.0.1:{server.port}"
                started.set()
            await serving

    def live() -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: server.loop) as runner:
                runner.run(serve())
        except BaseException as error:
            failures.append(error)
        finally:
            started.set()

    thread = threading.Thread(target=live, name="jaxserve-http", daemon=True)
    thread.start()
    try:
        if not started.wait(_PATIENCE_S) or failures:
            raise RuntimeError("the server did not start") from (failures or [None])[0]
        yield server
    finally:
        if server.http is not None:
            server.http.should_exit = True
        thread.join(_PATIENCE_S)
    if failures:
        raise RuntimeError("the server failed") from failures[0]
