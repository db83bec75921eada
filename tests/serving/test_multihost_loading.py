"""Every process of a group reads the parts of the weights that its devices hold, and no others."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jaxserve.checkpoint import orbax
from jaxserve.checkpoint.locate import locate

from .test_multihost_faults import free_port

SCRIPT = Path(__file__).with_name("multihost_loading.py")
NUM_PROCESSES = 4
DEADLINE_S = 300
CHUNK_BYTES = 1 << 14


@pytest.fixture
def converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns the model in chunks that are to it what 16 MiB are to a large one."""
    monkeypatch.setattr(orbax, "_CHUNK_BYTES", CHUNK_BYTES)
    orbax.convert(locate("tiny"), tmp_path / "tiny")
    return tmp_path / "tiny"


def test_four_processes_read_what_they_hold(converted: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                str(SCRIPT),
                address,
                str(NUM_PROCESSES),
                str(index),
                str(converted),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(NUM_PROCESSES)
    ]
    try:
        outputs = [process.communicate(timeout=DEADLINE_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
    found = [json.loads(output.splitlines()[-1]) for output, _ in outputs]
    for one in found:
        # The checkpoint's dtype is the model's, and nothing of it is padded.
        assert one["read"] == one["held"]
        assert one["read"] < 0.4 * one["whole"]
        assert one["from_store"] == {name: one[name] for name in ("held", "whole", "read")}
        # Gaps are larger than any tensor here, so what is cut within rows comes in whole rows.
        assert one["held"] < one["with_gaps"]["read"] < 2.7 * one["held"] < 0.71 * one["whole"]
        # Chunks that lie on both sides of a cut are read by both.
        assert one["held"] <= one["converted"]["read"] < 1.3 * one["held"] < 0.34 * one["whole"]
    assert sum(one["read"] for one in found) >= found[0]["whole"]
