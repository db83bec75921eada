"""A small HTTP/1.1 client for measuring: little work for each piece of a streamed answer.

    http = HttpClient("http://127.0.0.1:8000", {"authorization": "Bearer ..."}, timeout_s=60)
    answer = await http.request("GET", "/v1/models")
    async with http.stream("POST", "/v1/completions", body) as pieces:
        async for data in pieces: ...                  # what follows `data:` in each event
    await http.close()

The client shares the machine with the server that it measures, so it reads no more of the protocol
than such servers speak. Connections are kept and used again, as a real client's are.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

from jaxserve.errors import UsageError

MAX_LINE_BYTES = 1 << 20
"""Longest line; an event of a stream is one."""

SCHEMES = {"http": 80, "https": 443}


class HttpError(Exception):
    """The exchange broke off, or what came back was no HTTP."""


class StatusError(Exception):
    """The server answered with an error status."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(f"HTTP {status}: {body[:300].decode('utf-8', 'replace').strip()}")
        self.status = status
        self.body = body


@dataclass(frozen=True)
class Head:
    """Status and headers of an answer, header names in lower case."""

    status: int
    headers: dict[str, str]

    @property
    def keeps_connection(self) -> bool:
        """Returns whether the connection may be used again: its end is known, and it stays."""
        framed = "content-length" in self.headers or "transfer-encoding" in self.headers
        return framed and self.headers.get("connection", "").lower() != "close"


@dataclass(frozen=True)
class Connection:
    """An open connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def head(self) -> Head:
        """Returns the head of the next answer that is not a notice (1xx)."""
        while True:
            line = await self.reader.readuntil(b"\r\n")
            version, _, rest = line.partition(b" ")
            if not version.startswith(b"HTTP/1.") or not rest[:3].isdigit():
                raise HttpError(f"no HTTP/1.1 answer: {line[:60]!r}")
            headers: dict[str, str] = {}
            while (line := await self.reader.readuntil(b"\r\n")) != b"\r\n":
                name, _, value = line.decode("latin-1").partition(":")
                headers[name.lower()] = value.strip()
            if (status := int(rest[:3])) >= 200:
                return Head(status, headers)

    async def close(self) -> None:
        """Closes the connection, whatever state it is in."""
        self.writer.close()
        with suppress(OSError):
            await self.writer.wait_closed()


@dataclass
class Answer:
    """An answer being read; `done` once its body is read to the end."""

    connection: Connection
    head: Head
    done: bool = False

    async def pieces(self) -> AsyncGenerator[bytes]:
        """Yields the body as it comes."""
        reader, headers = self.connection.reader, self.head.headers
        if headers.get("transfer-encoding", "").lower() == "chunked":
            while size := int((await reader.readuntil(b"\r\n")).partition(b";")[0], 16):
                yield (await reader.readexactly(size + 2))[:-2]
            while await reader.readuntil(b"\r\n") != b"\r\n":
                pass
        elif "content-length" in headers:
            left = int(headers["content-length"])
            while left:
                if not (piece := await reader.read(min(left, 1 << 16))):
                    raise HttpError(f"the answer ended {left} bytes early")
                left -= len(piece)
                yield piece
        else:
            while piece := await reader.read(1 << 16):
                yield piece
        self.done = True

    async def body(self) -> bytes:
        """Returns the body."""
        return b"".join([piece async for piece in self.pieces()])

    async def events(self) -> AsyncGenerator[bytes]:
        """Yields the data of each server-sent event; comments and other fields are left out."""
        rest = b""
        async for piece in self.pieces():
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                if line.startswith(b"data:"):
                    yield line[5:].strip()


class HttpClient:
    """Requests to one server."""

    def __init__(self, url: str, headers: dict[str, str], timeout_s: float) -> None:
        """Takes the server's address, a prefix of the paths included.

        Raises:
            UsageError: the address is not one of HTTP.
        """
        parts = urlsplit(url if "://" in url else f"http://{url}")
        try:
            port = parts.port
        except ValueError:  # no number, or too large a one
            port = 0
        if parts.scheme not in SCHEMES or not parts.hostname or port == 0:
            raise UsageError(f"--url {url} is no HTTP address; give one as http://127.0.0.1:8000")
        self._host, self._port = parts.hostname, port or SCHEMES[parts.scheme]
        self._prefix = parts.path.rstrip("/")
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        name = f"[{self._host}]" if ":" in self._host else self._host
        fixed = {"host": f"{name}:{self._port}", "accept": "*/*", **headers}
        self._fixed = "".join(f"{key}: {value}\r\n" for key, value in fixed.items())
        self._idle: list[Connection] = []
        self._timeout_s = timeout_s

    async def request(self, method: str, path: str, body: bytes = b"") -> bytes:
        """Returns the body of the answer.

        Raises:
            StatusError: the status is not 2xx.
            HttpError, OSError: the exchange failed.
        """
        async with self._exchange(method, path, body) as answer:
            return await answer.body()

    @asynccontextmanager
    async def stream(
        self, method: str, path: str, body: bytes
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        """Opens the events of an answer; raises as `request` does."""
        async with (
            self._exchange(method, path, body) as answer,
            aclosing(answer.events()) as events,
        ):
            yield events

    async def close(self) -> None:
        """Closes the connections that wait to be used again."""
        while self._idle:
            await self._idle.pop().close()

    @asynccontextmanager
    async def _exchange(self, method: str, path: str, body: bytes) -> AsyncIterator[Answer]:
        """Sends a request and opens the answer; a connection read to its end is kept."""
        lines = f"{method} {self._prefix}{path} HTTP/1.1\r\n{self._fixed}"
        if body:
            lines += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
        message = lines.encode("latin-1") + b"\r\n" + body
        try:
            async with asyncio.timeout(self._timeout_s):
                answer = await self._send(message)
                try:
                    if not 200 <= answer.head.status < 300:
                        raise StatusError(answer.head.status, await answer.body())
                    yield answer
                finally:
                    if answer.done and answer.head.keeps_connection:
                        self._idle.append(answer.connection)
                    else:
                        await answer.connection.close()
        except TimeoutError as error:
            raise HttpError(f"no end after {self._timeout_s:g} s") from error
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError) as error:
            raise HttpError(f"the answer broke off or is no HTTP: {error}") from error

    async def _send(self, message: bytes) -> Answer:
        """Returns the answer to a message, its head read.

        The server may have closed a kept connection meanwhile; then another is taken.
        """
        while self._idle:
            connection = self._idle.pop()
            try:
                return await self._ask(connection, message)
            except ConnectionError:
                continue
            except asyncio.IncompleteReadError as error:
                if error.partial:
                    raise
        streams = await asyncio.open_connection(
            self._host, self._port, ssl=self._tls, limit=MAX_LINE_BYTES
        )
        return await self._ask(Connection(*streams), message)

    async def _ask(self, connection: Connection, message: bytes) -> Answer:
        try:
            connection.writer.write(message)
            return Answer(connection, await connection.head())
        except BaseException:
            await connection.close()
            raise
