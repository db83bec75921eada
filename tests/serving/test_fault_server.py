"""The whole server in processes of its own: signals, drains, thousands of connections, a soak."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

WAIT_S = 60.0

CODE = """
import asyncio, json, sys
from jaxserve.serving import logs
from jaxserve.serving.fake_service import remote_fake
from jaxserve.serving.server import Server
from jaxserve.serving.server_options import ServerOptions

fields, options = json.loads(sys.argv[1]), json.loads(sys.argv[2])
logs.set_up(as_json=True)
service = remote_fake(**fields)

async def main():
    server = Server(service, ServerOptions(model_name="fake", http_port=0, **options), announce)
    return await server.run()

def announce(line):
    print(service.engine_pid, line, flush=True)

sys.exit(asyncio.run(main()))
"""


class Running:
    """A server in a process of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        assert process.stdout is not None
        pid, _, self.line = process.stdout.readline().strip().partition(" ")
        assert pid, "the server did not become ready"
        self.engine_pid = int(pid)
        self.port = int(self.line.split("http://127.0.0.1:")[1].split()[0])

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self) -> int:
        """Returns the exit status; the engine's process has ended too."""
        status = self.process.wait(WAIT_S)
        until = time.monotonic() + WAIT_S
        while alive(self.engine_pid):
            assert time.monotonic() < until, "the engine outlives the server"
            time.sleep(0.01)
        return status


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@contextmanager
def serving(options: dict[str, Any] | None = None, **fields: Any) -> Iterator[Running]:
    """Yields a server over a fake engine."""
    options = {"grpc_port": None, **(options or {})}
    with tempfile.TemporaryFile("w+") as log:  # nobody reads a pipe meanwhile
        process = subprocess.Popen(
            [sys.executable, "-c", CODE, json.dumps(fields), json.dumps(options)],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        try:
            yield Running(process)
        finally:
            process.kill()
            process.communicate()
            log.seek(0)
            sys.stderr.write(log.read()[-4000:])


async def call(
    port: int, method: str, path: str, body: dict[str, Any] | None = None
) -> tuple[int, str]:
    """Returns status and body of one request on a connection of its own."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        data = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
        if body is not None:
            head += f"content-type: application/json\r\ncontent-length: {len(data)}\r\n"
        writer.write(head.encode() + b"\r\n" + data)
        answer = (await asyncio.wait_for(reader.read(), WAIT_S)).decode()
        return int(answer.split(" ", 2)[1]), answer.partition("\r\n\r\n")[2]
    finally:
        writer.close()


def completion(max_tokens: int, stream: bool = True, **fields: Any) -> dict[str, Any]:
    asked = {"model": "fake", "prompt": "abc", "max_tokens": max_tokens, "ignore_eos": True}
    return asked | {"temperature": 0, "stream": stream} | fields


async def complete(port: int, max_tokens: int, **fields: Any) -> tuple[int, str]:
    return await call(port, "POST", "/v1/completions", completion(max_tokens, **fields))


async def running_is(port: int, number: int) -> None:
    """Waits until so many sequences run."""
    until = time.monotonic() + WAIT_S
    while True:
        _, page = await call(port, "GET", "/metrics")
        (line,) = [x for x in page.splitlines() if x.startswith("jaxserve_num_requests_running{")]
        if float(line.split()[-1]) == number:
            return
        assert time.monotonic() < until
        await asyncio.sleep(0.05)


def test_sigterm_under_load_refuses_what_is_new_and_ends_what_runs() -> None:
    async def work(server: Running) -> None:
        tasks = [asyncio.create_task(complete(server.port, 200)) for _ in range(4)]
        await running_is(server.port, 4)
        server.signal(signal.SIGTERM)
        status = 200
        while status == 200:
            status, _ = await call(server.port, "GET", "/health/ready")
        assert status == 503
        status, body = await complete(server.port, 8)
        assert status == 503
        assert json.loads(body)["error"]["type"] == "service_unavailable_error"
        for status, text in await asyncio.gather(*tasks):
            assert status == 200
            assert "data: [DONE]" in text
            assert "error" not in text

    with serving(step_s=0.02) as server:
        asyncio.run(work(server))
        assert server.end() == 0


def test_what_outlasts_the_grace_gets_an_error_in_its_stream() -> None:
    async def work(server: Running) -> None:
        tasks = [asyncio.create_task(complete(server.port, 400)) for _ in range(2)]
        tasks.append(asyncio.create_task(complete(server.port, 400, stream=False)))
        await running_is(server.port, 3)
        server.signal(signal.SIGTERM)
        *streams, (status, body) = await asyncio.gather(*tasks)
        for _, text in streams:
            assert "service_unavailable_error" in text
            assert "stopped before" in text
            assert "[DONE]" in text
        assert status == 503
        assert json.loads(body)["error"]["code"] == "unavailable"

    with serving({"drain_grace_s": 0.2}, step_s=0.05) as server:
        asyncio.run(work(server))
        assert server.end() == 0


def test_a_second_signal_does_not_wait() -> None:
    async def work(server: Running) -> None:
        task = asyncio.create_task(complete(server.port, 500))
        await running_is(server.port, 1)
        server.signal(signal.SIGINT)
        status = 200
        while status == 200:
            status, _ = await call(server.port, "GET", "/health/ready")
        began = time.monotonic()
        server.signal(signal.SIGINT)
        await asyncio.to_thread(server.end)
        assert time.monotonic() - began < 20.0
        task.cancel()

    with serving({"drain_grace_s": 500.0}, step_s=0.5) as server:
        asyncio.run(work(server))
        assert server.end() == 0


def test_a_killed_engine_shows_in_streams_health_and_comes_back() -> None:
    async def work(server: Running) -> None:
        tasks = [asyncio.create_task(complete(server.port, 400)) for _ in range(2)]
        await running_is(server.port, 2)
        os.kill(server.engine_pid, signal.SIGKILL)
        for _, text in await asyncio.gather(*tasks):
            assert "service_unavailable_error" in text
            assert "SIGKILL" in text
        status, until = 503, time.monotonic() + WAIT_S
        while status != 200:
            assert time.monotonic() < until
            status, _ = await call(server.port, "GET", "/health/ready")
            await asyncio.sleep(0.02)
        status, text = await complete(server.port, 8)
        assert status == 200
        assert "[DONE]" in text
        _, page = await call(server.port, "GET", "/metrics")
        assert 'jaxserve_engine_restarts_total{engine="0",model_name="fake"} 1.0' in page

    with serving(step_s=0.02) as server:
        asyncio.run(work(server))


def test_two_thousand_connections_are_all_answered_or_refused() -> None:
    async def work(server: Running) -> None:
        results = await asyncio.gather(*(complete(server.port, 4) for _ in range(2000)))
        statuses = [status for status, _ in results]
        assert set(statuses) <= {200, 429}, [text for status, text in results if status == 503][:1]
        assert statuses.count(200) >= 500
        for status, text in results:
            if status == 200:
                assert "data: [DONE]" in text
            else:
                code = "queue_full" if status == 429 else "unavailable"
                assert json.loads(text)["error"]["code"] == code
        await running_is(server.port, 0)
        status, _ = await complete(server.port, 4)
        assert status == 200

    with serving({"max_requests": 500}, num_slots=32) as server:
        asyncio.run(work(server))


def test_a_taken_port_is_an_error_and_leaves_no_process() -> None:
    with serving() as server:
        options = {"grpc_port": None, "http_port": server.port}
        code = CODE.replace("http_port=0, ", "")
        done = subprocess.run(
            [sys.executable, "-c", code, "{}", json.dumps(options)],
            capture_output=True,
            text=True,
            timeout=WAIT_S,
        )
        assert done.returncode == 1
        assert f"cannot listen on 127.0.0.1:{server.port}" in done.stderr


@pytest.mark.parametrize(
    "seconds", [5.0, pytest.param(600.0, marks=pytest.mark.slow)], ids=["short", "ten_minutes"]
)
def test_a_soak_answers_all_keeps_pages_and_memory(seconds: float) -> None:
    with serving({"max_requests": 64}, step_s=0.001, num_slots=16, policy="fair") as server:
        counts, sizes, pages = asyncio.run(soak(server, seconds))
        server.signal(signal.SIGTERM)
        assert server.end() == 0
    assert counts["answered"] > 20 * seconds
    assert counts["other"] == 0
    assert pages == 0
    # After the first fifth everything that grows to a bound has grown.
    settled = sizes[len(sizes) // 5 :]
    assert max(settled) < 1.1 * settled[0] + (32 << 20)


async def soak(server: Running, seconds: float) -> tuple[dict[str, int], list[int], float]:
    """Returns (answers by kind, bytes of both processes over time, pages held at the end)."""
    counts = {"answered": 0, "refused": 0, "left": 0, "other": 0}
    until = time.monotonic() + seconds
    sizes: list[int] = []

    async def client(number: int) -> None:
        turn = 0
        while time.monotonic() < until:
            turn += 1
            work = complete(
                server.port,
                8 + (number * 7 + turn) % 40,
                stream=turn % 3 != 0,
                prompt=f"client {number} " + "x" * (turn % 50),
            )
            if turn % 7 == 0:  # a client that goes away
                try:
                    await asyncio.wait_for(work, 0.01)
                except TimeoutError:
                    counts["left"] += 1
                continue
            status, text = await work
            kind = {200: "answered", 429: "refused"}.get(status, "other")
            if status == 200 and "error" in text:
                kind = "other"
            counts[kind] += 1
            if status == 429:
                await asyncio.sleep(0.05)

    async def watch() -> None:
        while time.monotonic() < until:
            sizes.append(resident(server.process.pid) + resident(server.engine_pid))
            await asyncio.sleep(seconds / 50)

    await asyncio.gather(watch(), *(client(number) for number in range(100)))
    await running_is(server.port, 0)
    _, page = await call(server.port, "GET", "/metrics")
    values = {
        name: float(line.split()[-1])
        for line in page.splitlines()
        for name in ("jaxserve_kv_pages_held", "jaxserve_compiles_after_ready_total")
        if line.startswith(f"{name}{{")
    }
    assert values["jaxserve_compiles_after_ready_total"] == 0
    return counts, sizes, values["jaxserve_kv_pages_held"]


def resident(pid: int) -> int:
    """Returns the bytes of memory that a process has."""
    with open(f"/proc/{pid}/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
