"""A layout's estimates beside what this machine takes."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jaxserve.benchmark import against as module
from jaxserve.cli import app
from jaxserve.errors import UsageError
from jaxserve.partitioning.hardware import chips
from jaxserve.partitioning.layout_file import choose
from jaxserve.planner.model import plan_config


def layout_file(folder: Path, mesh: str) -> Path:
    made = choose(plan_config("tiny"), "bfloat16", mesh=mesh, layout="ws2d", attention="heads")
    assert made is not None
    made.write(folder / "layout.json")
    return folder / "layout.json"


def test_every_term_is_estimated_and_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "POINT_S", 1e-3)
    # The model itself is measured by the tests of throughput.
    monkeypatch.setattr(module, "_step_s", lambda model, layout: 0.5)
    path = layout_file(tmp_path, "2,2,2")
    done = CliRunner().invoke(app, ["bench", "--against", str(path), "--json"])
    assert done.exit_code == 0, done.exception
    lines = json.loads(done.stdout)["terms"]
    assert lines[-1]["name"] == "the whole step" and lines[-1]["measured_s"] == 0.5
    assert {"MLP in", "attention output"} <= {line["name"] for line in lines}
    assert any("all-gather over" in line["name"] for line in lines)
    assert all(line["estimated_s"] > 0 and line["measured_s"] > 0 for line in lines)
    measured, chip = tmp_path / "measured.json", tmp_path / "chip.toml"
    measured.write_text(done.stdout)
    words = ["plan", "calibrate", "--from", str(measured), "--name", "mine", "--out", str(chip)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.exception
    assert chips(chip)["mine"].values["layer_s"].number > 0


@pytest.mark.slow
def test_the_whole_step_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "POINT_S", 1e-3)
    found = module.against("tiny", layout_file(tmp_path, "2,2,2"))
    assert found.lines[-1].kind == "step" and found.lines[-1].measured_s > 1e-4


def test_devices_that_are_missing_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "POINT_S", 1e-3)
    with pytest.raises(UsageError, match="is for 4 devices and there are 8"):
        module.against("tiny", layout_file(tmp_path, "2,2,1"))


@pytest.mark.parametrize("words", [[], ["--against", "x.json", "throughput"]])
def test_bench_alone_says_what_it_takes(words: list[str]):
    done = CliRunner().invoke(app, ["bench", *words])
    assert done.exit_code != 0
