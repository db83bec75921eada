"""Two processes that run the same engine on one mesh give the tokens of one device."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from .test_mesh_engine import on_one_device

SCRIPT = Path(__file__).with_name("mesh_process.py")
DEADLINE_S = 500


@pytest.mark.slow  # tests/serving/test_multihost_model.py serves from two processes
def test_two_processes_give_the_tokens_of_one_device() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), address, "2", str(index)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=DEADLINE_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
    wanted = [[*sample, tokens] for sample, tokens in sorted(on_one_device().items())]
    for output, _ in outputs:
        assert json.loads(output.splitlines()[-1]) == wanted
