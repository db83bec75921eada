"""Steps for pod slices that are not here: what was compiled fits, and stays in its slice."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROWS = json.loads((ROOT / "benchmarks" / "results" / "pods.json").read_text())["rows"]
PAGE = (ROOT / "docs" / "pods.md").read_text()

CODE = """
import json
from benchmarks.pods import CASES, measure
print(json.dumps(measure(CASES[1], "decode")))
"""


@pytest.mark.parametrize(
    "row", ROWS, ids=lambda row: f"{row['model']} {row['slice']} {row['phase']}"
)
def test_a_compiled_step_fits_its_chips_and_stays_in_its_slice(row: dict) -> None:
    assert row["fits"]
    assert not row["leaves_the_slice"]
    assert row["slices"] == 1
    chips = row["mesh"]["x"] * row["mesh"]["y"] * row["mesh"]["z"]
    assert row["hosts"] == chips // 4
    assert row["axes_between_hosts"]
    assert row["collectives"]
    cells = [row["model"], row["slice"], f"{row['phase']}, {row['tokens']} tokens"]
    assert f"| {' | '.join(cells)} | {row['hosts']} |" in PAGE


def test_every_model_and_step_was_compiled() -> None:
    found = {(row["model"], row["slice"], row["phase"]) for row in ROWS}
    assert len(found) == len(ROWS) == 6


@pytest.mark.slow
def test_a_step_is_compiled_again_as_it_was() -> None:
    pytest.importorskip("libtpu", reason="libtpu, the compiler of TPUs, is not installed")
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    again = json.loads(done.stdout.splitlines()[-1])
    (kept,) = [
        row
        for row in ROWS
        if (row["model"], row["slice"], row["phase"]) == ("llama-3-70b", "v6e:2x4", "decode")
    ]
    for name in ("hosts", "axes_between_hosts", "collectives", "argument_gb", "leaves_the_slice"):
        assert again[name] == kept[name], name
