"""One engine process as the server sees it: its messages, its signs of life, its end.

child = await EngineChild.launch(command, start, on_message)
await child.ended                      # how it died, or that it hangs
child.kill()
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Self, cast

import msgspec

from jaxserve.serving.wire import (
    FROM_ENGINE,
    Beat,
    FrameReader,
    FromEngine,
    FromServer,
    Ready,
    Start,
    Stop,
    WireError,
    frame,
)

TICK_S = 0.25
SILENCE_S = 5.0
"""A process that says nothing for so long hangs: it is stopped, or swapped out."""
STARTING_SILENCE_S = 60.0
"""While it starts, reading weights may keep it from speaking."""

_log = logging.getLogger(__name__)


class EngineChild(asyncio.Protocol):
    """A running engine process.

    Attributes:
        ended: resolves to what happened when it has died or hangs.
    """

    def __init__(self, on_message: Callable[[FromEngine], None]) -> None:
        self._on_message = on_message
        self._reader = FrameReader(FROM_ENGINE)
        self._loop = asyncio.get_running_loop()
        self._silent_s = 0.0
        self._patience_s = STARTING_SILENCE_S
        self._beat = Beat(0.0, SILENCE_S)
        self._process: asyncio.subprocess.Process | None = None
        self._transport: asyncio.WriteTransport | None = None
        self._watch: asyncio.Task[None] | None = None
        self.ended: asyncio.Future[str] = self._loop.create_future()

    @classmethod
    async def launch(
        cls, command: Sequence[str], start: Start, on_message: Callable[[FromEngine], None]
    ) -> Self:
        """Returns a process that has been told what to start.

        Args:
            command: its words; the number of its socket is added.
            on_message: called in the loop with each of its messages.
        """
        start = msgspec.structs.replace(start, launched_s=time.monotonic())
        ours, theirs = socket.socketpair()
        child = cls(on_message)
        try:
            with theirs, _no_interrupt():
                child._process = await asyncio.create_subprocess_exec(
                    *command,
                    str(theirs.fileno()),
                    pass_fds=(theirs.fileno(),),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.DEVNULL,
                )
        except BaseException:
            ours.close()
            raise
        await child._loop.create_connection(lambda: child, sock=ours)
        child.send(start)
        child._watch = child._loop.create_task(child._look())
        return child

    @property
    def pid(self) -> int:
        """Returns the number of the process."""
        assert self._process is not None
        return self._process.pid

    def send(self, message: FromServer) -> None:
        """Sends a message; to a process that has ended it is lost."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frame(message))

    def kill(self) -> None:
        """Ends the process at once, stopped or not."""
        assert self._process is not None
        if self._process.returncode is None:
            self._process.kill()

    async def stop(self, patience_s: float = 5.0) -> None:
        """Ends the process in good order, or else at once."""
        assert self._process is not None
        self.send(Stop())
        try:
            await asyncio.wait_for(self._process.wait(), patience_s)
        except TimeoutError:
            self.kill()
        await self.close()

    async def close(self) -> None:
        """Waits for the end of a process that was told to end, and lets go of it."""
        assert self._process is not None
        if self._watch is not None:
            self._watch.cancel()
        await self._process.wait()
        if self._transport is not None:
            self._transport.abort()
        self._end("it was stopped")

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are of no class of asyncio.
        self._transport = cast(asyncio.WriteTransport, transport)

    def data_received(self, data: bytes) -> None:
        self._silent_s = 0.0
        try:
            messages = self._reader.feed(data)
        except WireError as error:
            _log.error("the engine process is not understood: %s", error)
            self._end("it sent what is no message")
            return
        for message in messages:
            if isinstance(message, Beat):
                self._beat = message
            elif isinstance(message, Ready):
                self._patience_s = SILENCE_S
            self._on_message(message)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.done():
            self._loop.create_task(self._say_how())

    async def _say_how(self) -> None:
        """Tells how the process ended, whose socket has closed."""
        assert self._process is not None
        try:
            status = await asyncio.wait_for(self._process.wait(), 0.5)
        except TimeoutError:
            self._end("it closed its connection")
            return
        if status >= 0:
            self._end(f"it ended with status {status}")
        else:
            self._end(f"it was ended by {_signal_name(-status)}")

    async def _look(self) -> None:
        """Notices that the process hangs.

        Time counts by ticks of this loop: what was late because this process slept is not held
        against the other.
        """
        while not self.ended.done():
            await asyncio.sleep(TICK_S)
            self._silent_s += TICK_S
            if self._silent_s > self._patience_s:
                self._end(f"it gave no sign of life for {self._patience_s:.0f} s")
            elif self._beat.turn_s > self._beat.limit_s:
                self._end(f"a step has taken more than {self._beat.limit_s:.0f} s")

    def _end(self, how: str) -> None:
        if not self.ended.done():
            self.ended.set_result(how)


@contextmanager
def _no_interrupt() -> Iterator[None]:
    """Keeps Ctrl-C from processes started in the block, until they say what it means to them.

    It reaches the whole terminal, and a process that is still importing would end with a traceback.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
