"""Keeps a server busy for minutes with clients of every kind, and looks at what is left of it.

    python benchmarks/soak.py --duration 600 --out benchmarks/results/soak.json

`jaxserve serve` runs the embedded model with few slots and a low limit of requests, so that it is
full all the time. Clients of HTTP and gRPC ask for short and long, streamed and whole, sampled,
constrained, stopped and scored completions; some go away in the middle, some read slowly, some set
deadlines, some send what is refused. One asks for the same completion again and again, which must
never differ. Exit status 1: a request was neither answered nor refused as it should be, pages were
lost, a program was compiled, or memory grew.

Time is counted in turns of the clock's task: while the machine sleeps nothing is late. Requests
that were under way meanwhile count as `paused` if they fail: connections may have been given up.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import machine  # noqa: E402  (the repository's root comes first)
from benchmarks.peers.servers import ServerProcess, start_ours  # noqa: E402
from jaxserve.client import AsyncClient, Retries  # noqa: E402
from jaxserve.errors import DeadlineError, QueueFullError  # noqa: E402

MAX_REQUESTS = 48
HTTP_CLIENTS, GRPC_CLIENTS = 64, 16
REST_S = 0.4
"""Longest rest of a client that was refused."""
TICK_S = 0.25
PAUSE_S = 10.0
"""A turn that takes longer is a pause."""
HUNG_S = 120.0
LEAVES_S = 60.0
MAY_GROW = 0.02
"""Share of the memory at the first fifth that may be added after it, besides `MAY_GROW_BYTES`."""
MAY_GROW_BYTES = 16 << 20
TEXT = "def area(width, height):\n    return width * height\n\n"
METRICS = (
    "jaxserve_kv_pages_held",
    "jaxserve_num_requests_running",
    "jaxserve_num_requests_waiting",
    "jaxserve_compiles_after_ready_total",
    "jaxserve_step_failures_total",
    "jaxserve_engine_restarts_total",
    "jaxserve_generation_tokens_total",
    "jaxserve_prompt_tokens_total",
    "jaxserve_num_preemptions_total",
    "jaxserve_prefix_cache_hits_total",
    "jaxserve_steps_total",
)


@dataclass
class Soak:
    """What came of it so far; the clients of one loop write it.

    Attributes:
        outcomes: how often a kind of request ended in a way.
        wrong: the first of the outcomes that should not be.
        pauses: how often the machine, or this process, slept.
        open: when requests that are under way began, in ticks.
        hung: requests that took longer than any may.
        memory: bytes of the server's processes, over time.
        same: the completion that must never differ.
    """

    server: ServerProcess
    seconds: float
    ticks: int = 0
    pauses: int = 0
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    open: dict[int, int] = field(default_factory=dict)
    hung: int = 0
    memory: list[dict[str, int]] = field(default_factory=list)
    same: str | None = None

    @property
    def over(self) -> bool:
        """Returns whether the time is up."""
        return self.ticks * TICK_S >= self.seconds

    async def clock(self) -> None:
        """Counts time, looks at memory, and finds requests that hang."""
        every = max(1, round(self.seconds / TICK_S / 60))
        while not self.over:
            before = time.monotonic()
            await asyncio.sleep(TICK_S)
            self.pauses += time.monotonic() - before > PAUSE_S
            self.ticks += 1
            if self.ticks % every == 0:
                self.memory.append(resident(self.server.process.pid))
            late = [n for n, began in self.open.items() if self.ticks - began > HUNG_S / TICK_S]
            for number in late:
                del self.open[number]
            self.hung += len(late)

    def note(self, kind: str, outcome: str, wrong: str | None = None) -> None:
        """Counts the end of a request."""
        self.outcomes[kind, outcome if wrong is None else "wrong"] += 1
        if wrong is not None and len(self.wrong) < 10:
            self.wrong.append(f"{kind}: {wrong[:300]}")

    async def client(self, number: int, ways: dict[str, Ask]) -> None:
        """Sends one request after another, of kinds drawn by chance."""
        rng = random.Random(number)
        names = list(ways)
        while not self.over:
            kind = rng.choice(names)
            self.open[number], pauses = self.ticks, self.pauses
            try:
                outcome = await ways[kind](rng)
            except Exception as error:
                outcome = ("failed", f"{type(error).__name__}: {error}")
                await asyncio.sleep(2 * TICK_S)  # the clock notices a pause
                if self.pauses != pauses:
                    outcome = ("paused",)
            self.note(kind, *outcome)
            self.open.pop(number, None)
            if outcome[0] == "refused":
                await asyncio.sleep(rng.random() * REST_S)


Outcome = tuple[str] | tuple[str, str]
Ask = Callable[[random.Random], Awaitable[Outcome]]


# HTTP.


class Http:
    """Sends requests on connections of their own.

    Args:
        port: of the server.
    """

    def __init__(self, soak: Soak) -> None:
        self._soak = soak
        self._port = int(soak.server.url.rpartition(":")[2])

    def ways(self) -> dict[str, Ask]:
        """Returns the kinds of requests by name."""
        return {
            "http stream": self.stream,
            "http stream ": self.stream,  # twice as often as others
            "http whole": self.whole,
            "http chat": self.chat,
            "http scored": self.scored,
            "http same": self.same,
            "http slow reader": self.slow,
            "http leaver": self.leave,
            "http early leaver": self.leave_early,
            "http invalid": self.invalid,
        }

    async def stream(self, rng: random.Random) -> Outcome:
        """Streams a completion."""
        body = asked(rng) | {"stream": True}
        return self._streamed(body, *await self._call("/v1/completions", body))

    async def whole(self, rng: random.Random) -> Outcome:
        """Asks for completions in one piece."""
        body = asked(rng)
        status, text = await self._call("/v1/completions", body)
        if status != 200:
            return refused(status, text)
        answer = json.loads(text)
        short = len(answer["choices"]) != body.get("n", 1)
        return ("answered", text) if short else ("answered",)

    async def chat(self, rng: random.Random) -> Outcome:
        """Streams the next turn of a conversation of random length."""
        turn = {"role": "user", "content": TEXT * rng.randint(1, 6) + str(rng.random())}
        body: dict[str, Any] = {"messages": [turn], "max_tokens": rng.randint(1, 48)}
        body |= {"stream": True, "ignore_eos": True, "stream_options": {"include_usage": True}}
        return self._streamed(body, *await self._call("/v1/chat/completions", body))

    async def scored(self, rng: random.Random) -> Outcome:
        """Scores a prompt, as evaluation harnesses do."""
        body = {"prompt": ids(rng, rng.randint(2, 300)), "echo": True, "logprobs": 1}
        status, text = await self._call("/v1/completions", body | {"max_tokens": rng.randint(0, 1)})
        if status != 200:
            return refused(status, text)
        scores = json.loads(text)["choices"][0]["logprobs"]["token_logprobs"]
        bad = scores[0] is not None or None in scores[1:] or len(scores) < len(body["prompt"])
        return ("answered", text) if bad else ("answered",)

    async def same(self, rng: random.Random) -> Outcome:
        """Asks for a completion that was asked for before."""
        body = {"prompt": TEXT, "max_tokens": 24, "temperature": 0.9, "seed": 11}
        status, text = await self._call("/v1/completions", body)
        if status != 200:
            return refused(status, text)
        found = json.loads(text)["choices"][0]["text"]
        self._soak.same = self._soak.same or found
        if found != self._soak.same:
            return "answered", f"{found!r} and before {self._soak.same!r}"
        return ("answered",)

    async def slow(self, rng: random.Random) -> Outcome:
        """Reads a stream with rests."""
        body = asked(rng) | {"stream": True}
        return self._streamed(body, *await self._call("/v1/completions", body, rest_s=0.2))

    async def leave(self, rng: random.Random) -> Outcome:
        """Closes the connection in the middle of a stream."""
        body = asked(rng) | {"stream": True, "max_tokens": 200, "n": 1}
        reader, writer = await self._open("/v1/completions", body)
        try:
            await reader.read(rng.randint(1, 2000))
        finally:
            writer.transport.abort() if rng.random() < 0.5 else writer.close()
        return ("left",)

    async def leave_early(self, rng: random.Random) -> Outcome:
        """Closes the connection before there is an answer, or before the request is whole."""
        body = asked(rng) | {"max_tokens": 200, "n": 1}
        reader, writer = await self._open("/v1/completions", body, part=rng.choice((1.0, 0.5)))
        with suppress(TimeoutError):
            await asyncio.wait_for(reader.read(1), rng.random() * 0.2)
        writer.close()
        return ("left",)

    async def invalid(self, rng: random.Random) -> Outcome:
        """Sends what must be refused."""
        bodies: list[Any] = [
            {"prompt": "x", "temperature": 3},
            {"prompt": "x", "no_such_field": 1},
            {"prompt": ids(rng, 4000)},
            {"prompt": "x", "tools": [{"type": "function"}]},
            {"prompt": []},
            [[[]]],
        ]
        status, text = await self._call("/v1/completions", rng.choice(bodies))
        if status == 429:
            return ("refused",)
        return ("invalid",) if status == 400 else ("invalid", f"{status} {text}")

    def _streamed(self, body: dict[str, Any], status: int, text: str) -> Outcome:
        """Returns what became of a stream, which must be whole."""
        if status != 200:
            return refused(status, text)
        frames = text.split("\n\n")
        ends = sum('"finish_reason":"' in frame for frame in frames)
        whole = frames[-2:] == ["data: [DONE]", ""] and ends == body.get("n", 1)
        return ("answered",) if whole and 'data: {"error"' not in text else ("answered", text)

    async def _call(self, path: str, body: Any, rest_s: float = 0.0) -> tuple[int, str]:
        reader, writer = await self._open(path, body)
        try:
            pieces: list[bytes] = []
            while piece := await reader.read(1 << 16):
                pieces.append(piece)
                await asyncio.sleep(rest_s)
            head, _, rest = b"".join(pieces).decode().partition("\r\n\r\n")
            return int(head.split(" ", 2)[1]), unchunked(rest) if "chunked" in head else rest
        finally:
            writer.close()

    async def _open(
        self, path: str, body: Any, part: float = 1.0
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Returns a connection on which a request, or a part of one, was sent."""
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
        head += f"content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(head.encode() + data[: int(len(data) * part)])
        return reader, writer


def asked(rng: random.Random) -> dict[str, Any]:
    """Returns a request with parameters drawn by chance."""
    body: dict[str, Any] = {"max_tokens": rng.randint(1, 64), "ignore_eos": rng.random() < 0.8}
    shared = TEXT * rng.randint(1, 8)
    body["prompt"] = rng.choice(
        (shared, shared + str(rng.random()), ids(rng, rng.randint(1, 700)), f"# {rng.random()}")
    )
    extras: list[dict[str, Any]] = [
        {},
        {"temperature": 0},
        {"seed": rng.randrange(2**62)},
        {"top_p": 0.9, "top_k": 20, "min_p": 0.01},
        {"n": rng.randint(2, 4), "temperature": 0.8},
        {"stop": ["\n\n", "return"]},
        {"logprobs": rng.randint(0, 5)},
        {"presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1},
        {"logit_bias": {"5": 3.0}, "bad_words": ["lambda"]},
        {"allowed_token_ids": [40, 41, 42, 43]},
        {"prompt_logprobs": 1},
    ]
    return body | rng.choice(extras)


def ids(rng: random.Random, count: int) -> list[int]:
    """Returns a prompt of tokens."""
    return [rng.randrange(3, 1000) for _ in range(count)]


def refused(status: int, text: str) -> Outcome:
    """Returns that the server was full; anything else is wrong."""
    return ("refused",) if status == 429 else ("refused", f"{status} {text}")


def unchunked(text: str) -> str:
    """Returns a body that was sent in chunks; their lengths are those of ASCII."""
    pieces: list[str] = []
    raw = text.encode()
    while raw:
        size, _, raw = raw.partition(b"\r\n")
        pieces.append(raw[: int(size, 16)].decode("utf-8", "replace"))
        raw = raw[int(size, 16) + 2 :]
    return "".join(pieces)


# gRPC.


class Grpc:
    """Sends calls on one connection.

    Args:
        client: of the server.
    """

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    def ways(self) -> dict[str, Ask]:
        """Returns the kinds of calls by name."""
        return {
            "grpc stream": self.stream,
            "grpc unary": self.unary,
            "grpc score": self.score,
            "grpc leaver": self.leave,
            "grpc deadline": self.deadline,
        }

    async def stream(self, rng: random.Random) -> Outcome:
        """Streams a completion."""
        length, count = rng.randint(1, 64), 0
        try:
            async for chunk in self._client.stream(
                ids(rng, rng.randint(1, 400)), max_tokens=length, ignore_eos=True
            ):
                count += len(chunk.token_ids)
        except QueueFullError:
            return ("refused",)
        return ("answered",) if count == length else ("answered", f"{count} of {length} tokens")

    async def unary(self, rng: random.Random) -> Outcome:
        """Asks for a completion in one piece."""
        try:
            await self._client.generate(TEXT, max_tokens=rng.randint(1, 64), n=2, temperature=0.7)
        except QueueFullError:
            return ("refused",)
        return ("answered",)

    async def score(self, rng: random.Random) -> Outcome:
        """Scores a text."""
        try:
            answer = await self._client.score(ids(rng, length := rng.randint(1, 200)), num_top=2)
        except QueueFullError:
            return ("refused",)
        found = len(answer.logprobs)
        return ("answered",) if found == length else ("answered", f"{found} of {length} scores")

    async def leave(self, rng: random.Random) -> Outcome:
        """Cancels a call after its first chunk."""
        try:
            async for _ in self._client.stream(TEXT, max_tokens=200, ignore_eos=True):
                break
        except QueueFullError:
            return ("refused",)
        return ("left",)

    async def deadline(self, rng: random.Random) -> Outcome:
        """Asks for more than can come in its time."""
        try:
            await self._client.generate(
                TEXT, max_tokens=900, ignore_eos=True, timeout_s=0.02 + rng.random() * 0.2
            )
        except QueueFullError:
            return ("refused",)
        except DeadlineError:
            return ("late",)
        return ("answered", "900 tokens in a moment")


# What is looked at.


def resident(group: int) -> dict[str, int]:
    """Returns the bytes that the processes of a group hold, by what they are."""
    found: dict[str, int] = {}
    for folder in Path("/proc").iterdir():
        with suppress(OSError, ProcessLookupError):
            if folder.name.isdigit() and os.getpgid(int(folder.name)) == group:
                command = (folder / "cmdline").read_bytes()
                name = "engine" if b"engine_process" in command else "server"
                pages = int((folder / "statm").read_text().split()[1])
                found[name] = found.get(name, 0) + pages * os.sysconf("SC_PAGE_SIZE")
    return found


def metrics(url: str) -> dict[str, float]:
    """Returns the metrics that count here."""
    with urllib.request.urlopen(url + "/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    return {
        name: float(line.rpartition(" ")[2])
        for line in lines
        for name in METRICS
        if line.startswith(name + "{")
    }


async def idle(url: str) -> dict[str, float]:
    """Returns the metrics once nothing runs any more, or the last ones."""
    found: dict[str, float] = {}
    for _ in range(int(LEAVES_S / TICK_S)):
        found = await asyncio.to_thread(metrics, url)
        if not any(found[name] for name in METRICS[:3]):
            break
        await asyncio.sleep(TICK_S)
    return found


async def run(server: ServerProcess, seconds: float) -> dict[str, Any]:
    """Returns what came of it, as plain values."""
    soak = Soak(server, seconds)
    assert server.grpc is not None
    began = time.perf_counter()
    async with AsyncClient(server.grpc, retries=Retries(1)) as client:
        http, grpc = Http(soak).ways(), Grpc(client).ways()
        work = [asyncio.create_task(soak.client(n, http)) for n in range(HTTP_CLIENTS)]
        work += [asyncio.create_task(soak.client(-1 - n, grpc)) for n in range(GRPC_CLIENTS)]
        await soak.clock()
        _, hanging = await asyncio.wait(work, timeout=HUNG_S)
        soak.hung += len(hanging)
        for task in hanging:
            task.cancel()
        await asyncio.gather(*work, return_exceptions=True)
    took_s = time.perf_counter() - began
    return figures(soak, took_s, await idle(server.url))


def figures(soak: Soak, took_s: float, left: dict[str, float]) -> dict[str, Any]:
    """Returns what came of it, and what of it is not as it should be."""
    outcomes: Counter[str] = Counter()
    for (_, outcome), count in soak.outcomes.items():
        outcomes[outcome] += count
    kinds: dict[str, dict[str, int]] = {}
    for (kind, outcome), count in sorted(soak.outcomes.items()):
        found = kinds.setdefault(kind.strip(), {})
        found[outcome] = found.get(outcome, 0) + count
    sizes = {name: [one.get(name, 0) for one in soak.memory] for name in ("server", "engine")}
    settled = {name: size[len(size) // 5 :] for name, size in sizes.items()}
    mib = {
        name: {
            "after_a_fifth": round(size[0] / 2**20, 1),
            "end": round(size[-1] / 2**20, 1),
            "most": round(max(size) / 2**20, 1),
        }
        for name, size in settled.items()
    }
    failed = [
        f"{name} grew"
        for name, size in settled.items()
        if max(size) > (1 + MAY_GROW) * size[0] + MAY_GROW_BYTES
    ]
    failed += [name for name in METRICS[:6] if left.get(name) != 0]
    failed += ["requests hung"] if soak.hung else []
    failed += ["wrong answers"] if outcomes["wrong"] else []
    return {
        "seconds": round(took_s, 1),
        "counted_seconds": soak.ticks * TICK_S,
        "pauses": soak.pauses,
        "clients": HTTP_CLIENTS + GRPC_CLIENTS,
        "max_requests": MAX_REQUESTS,
        "requests": sum(outcomes.values()),
        "outcomes": dict(sorted(outcomes.items())),
        "hung": soak.hung,
        "by_kind": kinds,
        "memory_mib": mib,
        "at_the_end": left,
        "failed": failed,
        "wrong": soak.wrong,
    }


def main() -> None:
    """Runs the soak and prints what came of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--duration", type=float, default=600.0, help="seconds")
    parser.add_argument("--out", type=Path, help="also write the JSON object here")
    options = parser.parse_args()
    log = ROOT / "build" / "soak.log"
    log.parent.mkdir(exist_ok=True)
    limits = ("--max-requests", str(MAX_REQUESTS), "--policy", "fair")
    with start_ours("tiny", log, 16, limits) as server:
        server.wait_ready()
        found = asyncio.run(run(server, options.duration))
        server.close()
    result = {"benchmark": "soak", **machine.facts(), **found}
    text = json.dumps(result, indent=1)
    if options.out is not None:
        options.out.write_text(text + "\n")
    print(text)
    sys.exit(bool(found["failed"]))


if __name__ == "__main__":
    main()
