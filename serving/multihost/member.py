"""A rank above 0 on its host: keeps its process running, and tells whether it is well.

    status = asyncio.run(Member(start, health_port=8000).run())

It serves nothing but health. SIGTERM: it goes on until rank 0, which drains, ends the group, or the
grace is over; a second one ends at once. A process that is lost is started again, as on rank 0.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence

from jaxserve.errors import JaxserveError
from jaxserve.serving.engine_child import EngineChild
from jaxserve.serving.multihost.group import Group
from jaxserve.serving.supervisor import COMMAND, Backoff
from jaxserve.serving.wire import Failed, FromEngine, Left, Lost, Phase, Ready, Start

MARGIN_S = 10.0
"""So much longer than the drain of rank 0 its end may take."""

_log = logging.getLogger(__name__)


class Member:
    """Runs a rank above 0.

    Args:
        launch: what to start; it has a group.
        health_host, health_port: where health is told; a port of None tells nobody, 0 takes a free
            one.
        drain_s: seconds after SIGTERM that rank 0 has to end the group.
        command: words that start the process.
        announce: called with the line that says the group is ready.

    Attributes:
        address: where health is told, once it is.
    """

    def __init__(
        self,
        launch: Start,
        health_port: int | None = None,
        health_host: str = "127.0.0.1",
        drain_s: float = 30.0,
        command: Sequence[str] = COMMAND,
        backoff: Backoff | None = None,
        announce: Callable[[str], None] | None = None,
    ) -> None:
        assert launch.group is not None and not launch.group.leads
        self.address = ""
        self._launch = launch
        self._group: Group = launch.group
        self._health = health_host, health_port
        self._drain_s = drain_s
        self._command = command
        self._backoff = backoff or Backoff()
        self._announce = announce or _print
        self._ready = self._left = False
        self._served = self._failed = False
        self._reason = "the rank starts"
        self._signals = 0
        self._asked = asyncio.Event()
        self._insisted = asyncio.Event()
        self._launched_s = 0.0
        self._last_words = ""

    async def run(self) -> int:
        """Returns the exit status: 0 where the group ended in good order, or never began."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        try:
            async with self._telling():
                return await self._keep()
        except JaxserveError as error:
            _log.error("the rank cannot start: %s", error)
            return error.exit_code
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def _on_signal(self) -> None:
        self._signals += 1
        self._asked.set()
        if self._signals > 1:
            self._insisted.set()

    async def _keep(self) -> int:
        """Keeps a process running until the group ends, or this one has to."""
        failures = 0
        asked = asyncio.create_task(self._patience())
        try:
            while True:
                began = time.monotonic()
                how = await self._run_once(asked)
                self._ready = False
                if self._left:
                    return 0
                if asked.done() or self._signals:
                    return int(self._failed)
                _log.error("the rank is lost: %s", how)
                self._reason = f"the rank is lost ({how}) and is started again"
                if not self._served:
                    return 1
                healthy = time.monotonic() - began > self._backoff.healthy_s
                failures = 1 if healthy else failures + 1
                wait_s = self._backoff.wait_s(failures)
                _log.info("the rank starts again in %.2f s", wait_s)
                await asyncio.wait([asked], timeout=wait_s)
                if asked.done():
                    return 1
        finally:
            asked.cancel()

    async def _run_once(self, asked: asyncio.Task[None]) -> str:
        """Returns how a process ended; one that outlasts the patience is ended."""
        self._launched_s = time.monotonic()
        self._last_words = ""
        child = await EngineChild.launch(self._command, self._launch, self._receive)
        await asyncio.wait([asked, child.ended], return_when=asyncio.FIRST_COMPLETED)
        if child.ended.done():
            self._failed = True
            child.kill()
            await child.close()
        else:
            await child.stop(1.0)
        return self._last_words or await child.ended

    async def _patience(self) -> None:
        """Returns when the process has to end even if rank 0 does not end the group."""
        await self._asked.wait()
        if self._ready:
            _log.info("waits for rank 0 to end the group", extra={"grace_s": self._drain_s})
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._insisted.wait(), self._drain_s + MARGIN_S)
            self._failed = True  # the others lose this rank

    def _receive(self, message: FromEngine) -> None:
        match message:
            case Phase(name):
                self._reason = f"the rank starts (phase: {name})"
                _log.info("the rank starts: %s", name)
            case Ready(info):
                self._ready = self._served = True
                self._failed = False
                self._reason = ""
                _log.info("ready", extra=info)
                self._announce(self._ready_line())
            case Failed(_, text) | Lost(text):
                self._last_words = text
            case Left():
                self._left = True
            case _:
                pass

    def _ready_line(self) -> str:
        group, seconds = self._group, time.monotonic() - self._launched_s
        parts = [
            f"jaxserve rank {group.process_id} of {group.num_processes} follows "
            f"{group.coordinator}, ready in {seconds:.1f} s"
        ]
        if self.address:
            parts.append(f"health {self.address}")
        return " | ".join(parts)

    @contextlib.asynccontextmanager
    async def _telling(self) -> AsyncIterator[None]:
        """Tells health while the block runs, on request."""
        host, port = self._health
        if port is None:
            yield
            return
        server = await asyncio.start_server(self._tell, host, port)
        self.address = f"http://{host}:{server.sockets[0].getsockname()[1]}"
        try:
            yield
        finally:
            server.close()

    async def _tell(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answers one request: /health is well while the process runs, /health/ready when it is."""
        try:
            line = await asyncio.wait_for(reader.readline(), 5.0)
            words = line.decode("latin-1").split()
            path = words[1] if len(words) > 2 and words[0] in ("GET", "HEAD") else ""
            if path not in ("/health", "/health/ready"):
                status, body = "404 Not Found", {"status": "not found", "reason": ""}
            elif self._ready or (path == "/health" and not self._served):
                status = "200 OK"
                body = {"status": "ok" if self._ready else "starting", "reason": self._reason}
            else:
                status = "503 Service Unavailable"
                body = {"status": "unavailable", "reason": self._reason}
            data = json.dumps(body).encode()
            head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\n"
            head += f"content-length: {len(data)}\r\nconnection: close\r\n\r\n"
            writer.write(head.encode() + (b"" if words[:1] == ["HEAD"] else data))
            await writer.drain()
        except (OSError, TimeoutError, ValueError):
            pass  # whoever asked is gone, or spoke something else
        finally:
            writer.close()


def _print(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
