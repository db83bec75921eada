"""Runs servers of the OpenAI interface as processes of their own, one at work at a time.

with start_vllm(python, model, log) as theirs:
    theirs.wait_ready()
    with theirs.paused(): ...          # its processes are stopped meanwhile
    theirs.cpu_s()
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from benchmarks.peers.vllm_cpu import KV_CACHE_GIB, find_tcmalloc

ROOT = Path(__file__).parents[2]
START_S = 1800.0
POLL_S = 0.25
STOP_S = 30.0
RESUME_S = 1.0
"""How long a server that was stopped gets to find its feet."""


class ServerError(RuntimeError):
    """A server ended or did not become ready."""


@dataclass
class ServerProcess:
    """A server and all processes it started; they share a process group.

    Attributes:
        name: of the engine.
        url: of its HTTP interface.
        log: what it printed.
        ready_path: route that answers 200 once requests are taken.
        grpc: address of its gRPC interface, if it has one.
        closed: it was ended.
    """

    name: str
    url: str
    process: subprocess.Popen[bytes]
    log: Path
    ready_path: str
    grpc: str | None = None
    closed: bool = False

    @classmethod
    def start(
        cls,
        name: str,
        command: list[str],
        log: Path,
        environment: Mapping[str, str],
        **addresses: Any,
    ) -> Self:
        """Starts a server; what it prints goes to `log`."""
        with open(log, "wb") as output:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return cls(name, process=process, log=log, **addresses)

    def wait_ready(self) -> float:
        """Returns the seconds until it answered that it is ready.

        Raises:
            ServerError: it ended, or took too long.
        """
        began = time.perf_counter()
        while time.perf_counter() - began < START_S:
            if (status := self.process.poll()) is not None:
                raise ServerError(f"{self.name} ended with status {status}; see {self.log}")
            try:
                urllib.request.urlopen(self.url + self.ready_path, timeout=2).close()
            except (urllib.error.URLError, OSError):
                time.sleep(POLL_S)
            else:
                return time.perf_counter() - began
        raise ServerError(f"{self.name} was not ready after {START_S:g} s; see {self.log}")

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stops its processes; they hold memory meanwhile, and no core."""
        os.killpg(self.process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.killpg(self.process.pid, signal.SIGCONT)
            time.sleep(RESUME_S)

    def cpu_s(self) -> dict[str, float]:
        """Returns the processor time of each of its processes so far, by name and number."""
        tick = os.sysconf("SC_CLK_TCK")
        found = {}
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit():
                continue
            try:
                line = (folder / "stat").read_text()
            except OSError:  # it ended meanwhile
                continue
            name = line[line.index("(") + 1 : line.rindex(")")]
            fields = line[line.rindex(")") + 2 :].split()
            if int(fields[2]) == self.process.pid:
                found[f"{name} {folder.name}"] = (int(fields[11]) + int(fields[12])) / tick
        return found

    def close(self) -> None:
        """Ends the server and whatever it started; a second time does nothing."""
        if self.closed:
            return
        self.closed = True
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_S)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def start_ours(
    model: Path | str, log: Path, sequences: int, flags: Sequence[str] = ()
) -> ServerProcess:
    """Starts `jaxserve serve` with both of its interfaces, and other flags."""
    http, grpc = free_port(), free_port()
    command = [sys.executable, "-m", "jaxserve", "serve", "--model", str(model)]
    command += ["--http-port", str(http), "--grpc-port", str(grpc)]
    command += ["--max-sequences", str(sequences), *flags]
    return ServerProcess.start(
        "ours",
        command,
        log,
        {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        url=f"http://127.0.0.1:{http}",
        ready_path="/health/ready",
        grpc=f"127.0.0.1:{grpc}",
    )


def start_vllm(python: str, model: Path, log: Path, reserved: int = 1) -> ServerProcess:
    """Starts vLLM's own server, set up as its CPU documentation asks.

    Args:
        reserved: cores on which no thread of the model runs, for its scheduler and HTTP server.
    """
    port = free_port()
    iomp5 = Path(python).parents[1] / "lib" / "libiomp5.so"
    environment = {
        "LD_PRELOAD": f"{find_tcmalloc()}:{iomp5}",
        "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
        "VLLM_CPU_NUM_OF_RESERVED_CPU": str(reserved),
        "VLLM_NO_USAGE_STATS": "1",
    }
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16"]
    command += ["--no-enable-log-requests", "--disable-uvicorn-access-log"]
    return ServerProcess.start(
        "vllm_cpu",
        command,
        log,
        environment,
        url=f"http://127.0.0.1:{port}",
        ready_path="/health",
    )


def free_port() -> int:
    """Returns a port that nobody listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]
