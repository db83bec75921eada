"""HTTP, gRPC and admin servers over one service, from start to drain.

    status = asyncio.run(Server(service, options).run())

They answer health checks from the first moment and requests once the engine is ready; then one
line on standard output says where. SIGTERM or Ctrl-C: no new requests, those under way have a grace
to end. A second one ends at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import signal
import socket
import ssl
import sys
import time
from collections.abc import Callable
from typing import Any

import uvicorn

from jaxserve.errors import ConfigError, JaxserveError, UnavailableError
from jaxserve.serving import tracing
from jaxserve.serving.gate import Gate
from jaxserve.serving.http.app import create_admin_app, create_app
from jaxserve.serving.http.protocol import make_server
from jaxserve.serving.server_options import ServerOptions
from jaxserve.serving.service import Service

FLUSH_S = 5
"""Seconds that answers which are complete have to reach their readers."""

_FILES = 1 << 16

_log = logging.getLogger(__name__)


class Server:
    """Everything that one `jaxserve serve` runs.

    Args:
        service: not started yet.
        options: addresses and limits.
        announce: called with the ready line.
        began_s: `time.perf_counter()` from which the start counts; None is now.

    Attributes:
        addresses: by protocol, once they listen.
    """

    def __init__(
        self,
        service: Service,
        options: ServerOptions,
        announce: Callable[[str], None] | None = None,
        began_s: float | None = None,
    ) -> None:
        self.addresses: dict[str, str] = {}
        self._service = service
        self._options = options
        self._announce = announce or _print
        self._began_s = time.perf_counter() if began_s is None else began_s
        self._gate = Gate.of(options)
        self._http: list[tuple[uvicorn.Server, asyncio.Task[None]]] = []
        self._grpc: Any = None
        self._signals = 0
        self._asked = asyncio.Event()
        self._insisted = asyncio.Event()

    async def run(self) -> int:
        """Returns the exit status, once all has ended.

        It is 0 after a drain, and 1 after a failed start or where the engine was lost and was not
        back when the end was asked for.
        """
        _raise_file_limit()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        try:
            await self._listen()
            if await self._start():
                await self._ready(time.perf_counter() - self._began_s)
                await self._asked.wait()
            await self._drain()
        except JaxserveError as error:
            _log.error("the server cannot start: %s", error)
            return error.exit_code
        finally:
            await self._close()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)
        return int(self._service.failed)

    def _on_signal(self) -> None:
        self._signals += 1
        self._asked.set()
        if self._signals > 1:
            self._insisted.set()

    async def _start(self) -> bool:
        """Returns whether the engine is ready; not if a signal came first."""
        start = asyncio.create_task(self._service.start())
        asked = asyncio.create_task(self._asked.wait())
        await asyncio.wait((start, asked), return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()
        if not start.done():
            start.cancel()
            return False
        await start
        return True

    async def _drain(self) -> None:
        """Ends the service: at once if nothing is under way or a second signal comes."""
        grace_s = self._options.drain_grace_s
        load = self._gate.requests
        _log.info("draining", extra={"open_requests": load, "grace_s": grace_s})
        self._service.drain()
        stop = asyncio.create_task(self._service.stop(grace_s))
        insisted = asyncio.create_task(self._insisted.wait())
        await asyncio.wait((stop, insisted), return_when=asyncio.FIRST_COMPLETED)
        insisted.cancel()
        if not stop.done():
            stop.cancel()
            await asyncio.gather(stop, return_exceptions=True)
            await self._service.stop(0.0)
        else:
            await stop

    async def _listen(self) -> None:
        options = self._options
        tls = _tls_context(options)
        if options.http_port is not None:
            app = create_app(self._service, options, gate=self._gate)
            scheme = "http" if tls is None else "https"
            await self._serve_http(scheme, app, options.host, options.http_port, tls)
        if options.admin_port is not None:
            app = create_admin_app(self._service, options)
            await self._serve_http("admin", app, "127.0.0.1", options.admin_port, None)
        if options.grpc_port is not None:
            from jaxserve.serving.rpc.server import create_server, listen

            self._grpc = create_server(self._service, options, self._gate)
            port = listen(self._grpc, options)
            await self._grpc.start()
            self.addresses["grpc"] = _address(options.host, port)

    async def _serve_http(
        self, name: str, app: Any, host: str, port: int, tls: ssl.SSLContext | None
    ) -> None:
        """Starts an HTTP server on a socket of ours."""
        listener = _bound(host, port)
        server = make_server(app, host, port, tls=tls, shutdown_s=FLUSH_S)
        # Signals are ours: uvicorn would take them, and end without a drain.
        server.capture_signals = contextlib.nullcontext  # pyright: ignore[reportAttributeAccessIssue]
        task = asyncio.create_task(server.serve(sockets=[listener]))
        self._http.append((server, task))
        address = _address(host, listener.getsockname()[1])
        self.addresses[name] = f"{'http' if name == 'admin' else name}://{address}"
        while not server.started and not task.done():
            await asyncio.sleep(0.005)
        if task.done():
            await task
            raise UnavailableError(f"HTTP cannot listen on {address}")

    async def _ready(self, seconds: float) -> None:
        info = await self._service.server_info()
        fields = {"addresses": self.addresses, "seconds": round(seconds, 3)}
        _log.info("ready", extra=fields | info)
        self._announce(self._ready_line(info, seconds))

    def _ready_line(self, info: dict[str, Any], seconds: float) -> str:
        """Returns where the server answers, what it takes and how long it took."""
        card = self._service.card
        parts = [f"jaxserve serves {card.name} ({card.dtype}), ready in {seconds:.1f} s"]
        parts += [
            f"{name} {address}" if name in ("grpc", "admin") else address
            for name, address in self.addresses.items()
        ]
        if numbers := info.get("numbers"):
            parts.append(numbers)
        if memory := info.get("memory"):
            parts.append(_memory(memory, info.get("capacity", {})))
        if phases := info.get("startup_seconds"):
            parts.append(", ".join(f"{name} {taken:.1f} s" for name, taken in phases.items()))
        return " | ".join(parts)

    async def _close(self) -> None:
        """Ends the servers, after the service."""
        await self._service.stop(0.0)
        await asyncio.to_thread(tracing.shut_down)
        for server, _ in self._http:
            server.should_exit = True
            server.force_exit = self._signals > 1
        closing: list[Any] = [task for _, task in self._http]
        if self._grpc is not None:
            closing.append(self._grpc.stop(0.0 if self._signals > 1 else FLUSH_S))
        await asyncio.gather(*closing, return_exceptions=True)


def _print(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _memory(memory: dict[str, Any], capacity: dict[str, Any]) -> str:
    """Returns a memory plan in a few words."""

    def mib(name: str) -> str:
        return f"{memory[name] / 2**20:,.0f}"

    room = f", room for {capacity['kv_tokens']:,} tokens" if "kv_tokens" in capacity else ""
    return (
        f"memory {mib('total_bytes')} MiB (weights {mib('weights_bytes')}, keys and values "
        f"{mib('kv_bytes')}, steps {mib('temporary_bytes')}{room})"
    )


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _bound(host: str, port: int) -> socket.socket:
    """Returns a socket bound to an address.

    Raises:
        UnavailableError: it is taken, or no address of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise UnavailableError(
            f"HTTP cannot listen on {_address(host, port)}: {error.strerror}; choose another port "
            "or address"
        ) from error
    return sock


def _tls_context(options: ServerOptions) -> ssl.SSLContext | None:
    """Returns how HTTP is encrypted; None where it is not.

    Raises:
        ConfigError: a file cannot be read, or does not fit.
    """
    if options.tls_cert is None or options.tls_key is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(options.tls_cert, options.tls_key)
        if options.tls_client_ca is not None:
            context.load_verify_locations(options.tls_client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except OSError as error:  # SSLError is one
        raise ConfigError(f"the certificate cannot be used: {error}") from error
    return context


def _raise_file_limit() -> None:
    """Allows as many connections as the system lets this process have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _FILES if hard == resource.RLIM_INFINITY else min(hard, _FILES)
    if soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
