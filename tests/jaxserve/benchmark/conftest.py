"""A finished run whose every figure is known, and a small server of the OpenAI interface."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Self

import pytest

from jaxserve.benchmark.metrics import KvSample, Record, Slo
from jaxserve.benchmark.report import Compiles, EngineFacts, Result, StepTimes
from jaxserve.benchmark.trace import TraceSpec

TIMES = StepTimes(
    steps=20,
    host_s=0.5,
    device_s=4.0,
    wait_s=3.5,
    host_p50_s=0.02,
    host_p99_s=0.03,
    device_p50_s=0.2,
    device_p99_s=0.25,
    host_gap_p50_s=0.0,
    host_gap_p99_s=0.0001,
)
SETTINGS: dict[str, Any] = {"model": "tiny", "dtype": "bfloat16", "device": "cpu"}


@pytest.fixture
def result() -> Result:
    """Returns two requests: 3 and 5 tokens over 4 s, within limits of 2 s and 0.8 s."""
    first = Record(due_s=0.0, prompt_tokens=10)
    for time_s in (1.0, 1.5, 2.0):
        first.add(time_s, 1)
    second = Record(due_s=0.0, prompt_tokens=30)
    for time_s in (2.5, 3.0, 3.25, 3.5, 4.0):
        second.add(time_s, 1)
    samples = [KvSample(1.0, 1, 32, 24, 100), KvSample(4.0, 1, 64, 60, 100)]
    return Result(
        spec=TraceSpec(requests=2, seed=3, vocab_size=50, context=100),
        slo=Slo(ttft_s=2.0, tpot_s=0.8),
        records=[first, second],
        samples=samples,
        engine=EngineFacts(
            SETTINGS, TIMES, Compiles(0, 2, 0.5), 1, prefix_queries=40, prefix_hits=4
        ),
    )


@dataclass
class FakeServer:
    """Streams words at known times, in a thread of its own; notes what it was asked.

    Attributes:
        first_s, gap_s: before the first word of an answer, and before each further one.
        rejects: fields that make a request malformed; "prompt" stands for one of token ids.
        tokens_per_piece: of the words that are sent together.
        status: of every answer but the first; the first is the client's probe.
        tokens_per_word: of prompts that are text.
        ends: streams end with [DONE].
        broken: the stream ends with an error instead of its second piece.
        bodies: of the requests for completions and chats.
        headers: of these requests, in lower case.
        connections: how many were opened.
        most_open: most requests that were open at once.
    """

    first_s: float = 0.0
    gap_s: float = 0.0
    rejects: tuple[str, ...] = ()
    tokens_per_piece: int = 1
    status: int = 200
    tokens_per_word: int = 1
    ends: bool = True
    broken: bool = False
    card: dict[str, Any] = field(default_factory=lambda: {"id": "fake", "max_model_len": 64})
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[str] = field(default_factory=list)
    connections: int = 0
    most_open: int = 0
    url: str = ""
    _open: int = 0

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._server = self._loop.run_until_complete(
            asyncio.start_server(self._connection, "127.0.0.1", 0)
        )
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _stop(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        try:
            while head := (await reader.readuntil(b"\r\n\r\n")).decode():
                length = head.lower().partition("content-length: ")[2].partition("\r")[0]
                body = await reader.readexactly(int(length or 0))
                await self._answer(head, body, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _answer(self, head: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        if head.startswith("GET /v1/models "):
            self._plain(writer, 200, {"object": "list", "data": [self.card]})
            return
        asked = json.loads(body)
        wrong = [name for name in self.rejects if name != "prompt" and name in asked]
        if "prompt" in self.rejects and isinstance(asked.get("prompt"), list):
            wrong.append("prompt")
        if wrong:
            self._plain(writer, 400, {"error": {"message": f"{wrong[0]} is not known"}})
            return
        self.bodies.append(asked)
        self.headers.append(head.lower())
        if self.status != 200 and len(self.bodies) > 1:
            self._plain(writer, self.status, {"error": {"message": "come again later"}})
            return
        self._open += 1
        self.most_open = max(self.most_open, self._open)
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        chat = "messages" in asked
        if chat:
            self._event(writer, {"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        await self._words(writer, asked["max_tokens"], chat)
        prompt = asked.get("prompt") or asked["messages"][0]["content"]
        words = self.tokens_per_word * len(prompt.split()) if isinstance(prompt, str) else 0
        read = words or len(prompt)
        usage = {"prompt_tokens": read, "completion_tokens": asked["max_tokens"]}
        if asked.get("stream_options"):
            self._event(writer, {"choices": [], "usage": usage})
        if self.ends:
            self._chunk(writer, b"data: [DONE]\n\n")
        self._open -= 1
        writer.write(b"0\r\n\r\n")

    async def _words(self, writer: asyncio.StreamWriter, count: int, chat: bool) -> None:
        pieces = -(-count // self.tokens_per_piece)
        for k in range(pieces):
            await asyncio.sleep(self.gap_s if k else self.first_s)
            if self.broken and k == 1:
                self._event(writer, {"error": {"message": "the engine ended"}})
                break
            text = {"delta": {"content": "word "}} if chat else {"text": "word "}
            self._event(writer, {"choices": [{**text, "index": 0, "finish_reason": None}]})
        last = {"delta": {}} if chat else {"text": ""}
        self._event(writer, {"choices": [{**last, "index": 0, "finish_reason": "length"}]})

    def _event(self, writer: asyncio.StreamWriter, fields: dict[str, Any]) -> None:
        self._chunk(writer, f"data: {json.dumps(fields)}\n\n".encode())

    @staticmethod
    def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
        writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    @staticmethod
    def _plain(writer: asyncio.StreamWriter, status: int, fields: dict[str, Any]) -> None:
        data = json.dumps(fields).encode()
        head = f"HTTP/1.1 {status} .\r\ncontent-length: {len(data)}\r\n\r\n"
        writer.write(head.encode() + data)


@pytest.fixture
def fake_server() -> Iterator[Callable[..., FakeServer]]:
    """Returns a function that starts a server; what it takes are the server's attributes."""
    with ExitStack() as stack:
        yield lambda **settings: stack.enter_context(FakeServer(**settings))
