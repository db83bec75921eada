"""A real model on the devices of several processes, behind HTTP and gRPC: tokens of one process."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="fastapi is not installed")
pytest.importorskip("grpc", reason="grpcio is not installed")

from jaxserve import load
from jaxserve.serving.request import SamplingParams

from .test_multihost_faults import call, free_port, ready_again, running_is, wait

WAIT_S = 300.0
MESHES = {2: ("cpu:4", "2,2,2"), 4: ("cpu:2", "2,2,2")}
SMALL = ("--max-sequences=8", "--max-step-tokens=32", "--kv-mib=16", "--dtype=float32")
PROMPTS = ("def area(w, h):\n    return", "import os\n", "class Stack:\n    def push(self")


class Command:
    """`jaxserve serve` of one rank, in a session of its own."""

    def __init__(self, port: int, size: int, rank: int, cache: Path | None) -> None:
        devices, mesh = MESHES[size]
        words = [sys.executable, "-m", "jaxserve", "serve", "--model=tiny", *SMALL]
        words += [f"--devices={devices}", f"--mesh={mesh}", "--layout=ws2d", "--attention=batch"]
        words += ["--http-port=0", "--grpc-port=0", "--health-port=0", "--log-format=json"]
        words += [f"--coordinator=127.0.0.1:{port}", f"--num-processes={size}"]
        words += [f"--process-id={rank}"]
        # The tests' own devices are not those of a rank.
        environment = {name: v for name, v in os.environ.items() if name != "XLA_FLAGS"}
        if cache is not None:
            environment["JAXSERVE_CACHE_DIR"] = str(cache)
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - nobody reads a pipe meanwhile
        self.out = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            words,
            stdout=self.out,
            stderr=self.log,
            text=True,
            env=environment,
            start_new_session=True,
        )

    def line(self) -> str:
        """Returns the line that says it is ready, or nothing."""
        assert self.process.poll() is None, self.text()[-4000:]
        self.out.seek(0)
        return self.out.readline()

    def text(self) -> str:
        self.log.seek(0)
        return self.log.read()

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        sys.stderr.write(self.text()[-3000:])
        self.log.close()
        self.out.close()


@contextlib.contextmanager
def serving(size: int, cache: Path | None = None) -> Iterator[list[Command]]:
    """Yields the commands of a group that is ready; they keep programs in `cache`."""
    port = free_port()
    commands = [Command(port, size, rank, cache) for rank in range(size)]
    try:
        wait(lambda: all([command.line() for command in commands]), WAIT_S)
        yield commands
    finally:
        for command in commands:
            command.end()


def ports(line: str) -> tuple[int, int]:
    """Returns the ports of HTTP and gRPC that a ready line tells."""
    http = line.split("http://127.0.0.1:")[1].split()[0]
    return int(http), int(line.split("grpc 127.0.0.1:")[1].split()[0])


async def ask(port: int, prompt: str, params: dict[str, Any], **fields: Any) -> tuple[int, str]:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 16} | params | fields
    status, _, answer = await call(port, "/v1/completions", body)
    return status, answer


def over_grpc(port: int, prompt: str, **params: Any) -> str:
    """Returns the text that our client gets."""
    from jaxserve.client import Client

    with Client(f"127.0.0.1:{port}") as client:
        return client.generate(prompt, **params).completions[0].text


KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.9, "top_p": 0.9, "seed": 7},
    {"temperature": 0.0, "frequency_penalty": 0.8},
]


def alone() -> dict[tuple[str, int], str]:
    """Returns the texts that one process on one device gives."""
    llm = load("tiny", dtype="float32")
    cases = [(prompt, index) for prompt in PROMPTS for index in range(len(KINDS))]
    outs = llm.generate(
        [prompt for prompt, _ in cases],
        sampling=[SamplingParams(max_tokens=16, **KINDS[index]) for _, index in cases],
    )
    return {case: out.text for case, out in zip(cases, outs, strict=True)}


async def start_of(port: int) -> tuple[float, float]:
    """Returns the seconds that the engine took to compile and in all, as rank 0 tells."""
    _, _, page = await call(port, "/metrics")
    phases = {
        line.split('phase="')[1].split('"')[0]: float(line.split()[-1])
        for line in page.splitlines()
        if line.startswith("jaxserve_startup_seconds{")
    }
    return phases["compile"], sum(phases.values())


def check(size: int, cache: Path | None = None) -> None:
    """Checks a group of so many processes.

    Args:
        cache: an empty folder for programs: one process is killed, and the group has to be there
            again in warm time.
    """
    wanted = alone()

    async def under_load(port: int) -> None:
        tasks = {
            (prompt, index): asyncio.create_task(ask(port, prompt, KINDS[index]))
            for prompt, index in wanted
        }
        for case, task in tasks.items():
            status, body = await task
            assert status == 200, body
            assert json.loads(body)["choices"][0]["text"] == wanted[case], case

    async def killed(port: int, victim: int) -> None:
        long = {"temperature": 0.0, "ignore_eos": True, "max_tokens": 1500}
        tasks = [asyncio.create_task(ask(port, prompt, long)) for prompt in PROMPTS]
        await running_is(port, len(PROMPTS))
        os.kill(victim, signal.SIGKILL)
        began = time.monotonic()
        for status, body in await asyncio.gather(*tasks):
            assert status == 503, body
            assert "rank" in body
        assert time.monotonic() - began < 30.0
        await ready_again(port)

    with serving(size, cache) as commands:
        http, grpc_port = ports(commands[0].line())
        asyncio.run(under_load(http))
        for prompt in PROMPTS[:2]:
            text = over_grpc(grpc_port, prompt, max_tokens=16, temperature=0.0)
            assert text == wanted[prompt, 0]
        if cache is not None:
            cold = asyncio.run(start_of(http))
            asyncio.run(killed(http, engine_of(commands[-1])))
            warm = asyncio.run(start_of(http))
            print(f"{size} processes: compile, all of the start: {cold=} {warm=}")
            # Every rank waits for the slowest, so that one that compiled would show here.
            assert warm[1] < 0.5 * cold[1], (cold, warm)
            asyncio.run(under_load(http))
        for command in commands:
            command.process.send_signal(signal.SIGTERM)
        assert [command.process.wait(60) for command in commands] == [0] * size
        if cache is None:  # JAX aborts a process that outlives rank 0
            assert not [command for command in commands if "Terminating" in command.text()]


def engine_of(command: Command) -> int:
    path = f"/proc/{command.process.pid}/task/{command.process.pid}/children"
    with open(path, encoding="ascii") as file:
        return int(file.read().split()[0])


def test_two_processes_serve_the_tokens_of_one() -> None:
    check(2)


@pytest.mark.slow
@pytest.mark.parametrize("size", MESHES)
def test_processes_serve_the_tokens_of_one_after_a_killed_rank_too(
    size: int, tmp_path: Path
) -> None:
    check(size, tmp_path)
