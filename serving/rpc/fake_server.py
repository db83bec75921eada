"""A gRPC server of the model that is none, in a thread, for tests of clients and servers.

with fake_server(step_s=0.002) as server:
    client = Client(server.target)
    server.service.engine.metrics
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc

from jaxserve.serving.fake_service import fake_service, remote_fake
from jaxserve.serving.rpc.server import create_server, listen
from jaxserve.serving.server_options import ServerOptions
from jaxserve.serving.supervisor import RemoteService

T = TypeVar("T")


@dataclass(frozen=True)
class FakeServer:
    """A server that runs.

    Attributes:
        port: that it listens on, at 127.0.0.1.
        service: what it stands on, a `LocalService` or `RemoteService` that belongs to the server's
            thread.
    """

    port: int
    service: Any
    server: grpc.aio.Server
    loop: asyncio.AbstractEventLoop

    @property
    def target(self) -> str:
        """Returns its address."""
        return f"localhost:{self.port}"

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Returns what a coroutine gives that runs in the server's thread."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(60)

    @property
    def free_pages(self) -> int:
        """Returns how many pages nobody holds."""
        return self.run(self.service.load()).free_pages


@asynccontextmanager
async def _remote(**fields: Any) -> AsyncIterator[RemoteService]:
    service = remote_fake(**fields)
    await service.start()
    try:
        yield service
    finally:
        await service.stop()


@contextmanager
def fake_server(
    options: ServerOptions | None = None, *, remote: bool = False, **fields: Any
) -> Iterator[FakeServer]:
    """Yields a server.

    Args:
        remote: the engine has a process of its own.
        fields: as of `fake_service.fake_engine`.
    """
    options = options or ServerOptions(model_name="fake", grpc_port=0)
    loop = asyncio.new_event_loop()
    started: list[FakeServer] = []
    failed: list[BaseException] = []
    ready = threading.Event()
    over = asyncio.Event()

    async def serve() -> None:
        async with _remote(**fields) if remote else fake_service(**fields) as service:
            server = create_server(service, options)
            port = listen(server, options)
            await server.start()
            started.append(FakeServer(port, service, server, loop))
            ready.set()
            await over.wait()
            await server.stop(None)

    def work() -> None:
        try:
            loop.run_until_complete(serve())
        except BaseException as error:
            failed.append(error)
        finally:
            loop.close()
            ready.set()

    thread = threading.Thread(target=work, name="fake-grpc-server", daemon=True)
    thread.start()
    ready.wait()
    if failed:
        raise failed[0]
    try:
        yield started[0]
    finally:
        if not loop.is_closed():
            loop.call_soon_threadsafe(over.set)
        thread.join(60)
    if failed:
        raise failed[0]
