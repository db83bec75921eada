"""Steps for pod slices that are not here: what was compiled fits, and stays in its slice."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.engine_steps import PODS, STEPS, measure

ROOT = Path(__file__).resolve().parents[2]
ROWS = json.loads((ROOT / "benchmarks" / "results" / "engine_steps.json").read_text())["rows"]
PAGE = (ROOT / "docs" / "pods.md").read_text()
NAMES = [f"{case}: {step}" for case in PODS for step in STEPS]


def kept(name: str) -> dict[str, Any]:
    (row,) = [row for row in ROWS if row["case"] == name]
    return row


@pytest.mark.parametrize("name", NAMES)
def test_a_compiled_step_fits_its_chips_and_stays_in_its_slice(name: str) -> None:
    row = kept(name)
    assert row["argument_bytes"] + row["temp_bytes"] < row["chip_bytes"]
    assert not row["leaves_the_slice"]
    assert row["slices"] == 1
    assert row["hosts"] == row["mesh"]["x"] * row["mesh"]["y"] * row["mesh"]["z"] // 4
    assert row["axes_between_hosts"]
    assert row["sent"]
    cells = [
        *(row[part] for part in ("model", "weights", "slice")),
        f"{row['step']}, {row['tokens']} tokens",
        str(row["hosts"]),
        ", ".join(row["axes_between_hosts"]),
        f"{row['argument_bytes'] / 1e9:.2f}",
        f"{row['temp_bytes'] / 1e6:.1f}",
        f"{row['chip_bytes'] / 1e9:.0f}",
    ]
    assert f"| {' | '.join(cells)} |" in PAGE


@pytest.mark.slow
def test_a_step_is_compiled_again_as_it_was() -> None:
    pytest.importorskip("libtpu", reason="libtpu, the compiler of TPUs, is not installed")
    again, row = measure(PODS[2], "decode"), kept(f"{PODS[2]}: decode")
    for name in ("hosts", "axes_between_hosts", "sent", "argument_bytes", "leaves_the_slice"):
        assert again[name] == row[name], name
