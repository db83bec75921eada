"""A layout's estimates beside what this machine takes."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from jaxserve.api import load
from jaxserve.benchmark import against as module
from jaxserve.benchmark.against import Rounding, Served, served
from jaxserve.benchmark.terms import Load, Terms
from jaxserve.cli import app
from jaxserve.errors import UsageError
from jaxserve.partitioning.estimate import Coster
from jaxserve.partitioning.hardware import chips, parse_chips, slice_of
from jaxserve.partitioning.layout import Ffn, Heads, PhaseLayout
from jaxserve.partitioning.layout_file import choose
from jaxserve.planner.calibrate import Calibration
from jaxserve.planner.model import plan_config
from jaxserve.serving.options import EngineOptions
from jaxserve.serving.slot_state import NUM_COLUMNS


def layout_file(folder: Path, mesh: str) -> Path:
    made = choose(plan_config("tiny"), "bfloat16", mesh=mesh, layout="ws2d", attention="heads")
    assert made is not None
    made.write(folder / "layout.json")
    return folder / "layout.json"


TERMS = {
    "embedding",
    "queries, keys, values",
    "attention output",
    "MLP in",
    "MLP out",
    "attention, keys and values",
    "logits",
    "sampling",
    "layers",
    "host, between two steps",
    "the whole step",
}


def test_every_term_is_estimated_and_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "POINT_S", 1e-3)
    # The engine is measured by the test below.
    monkeypatch.setattr(module, "served", lambda llm, batch: Served(0.7, 0.5, 0.01))
    path = layout_file(tmp_path, "2,2,2")
    done = CliRunner().invoke(app, ["bench", "--against", str(path), "--json"])
    assert done.exit_code == 0, done.exception
    lines = json.loads(done.stdout)["terms"]
    for phase, step_s in (("decode", 0.51), ("prefill", 0.7)):
        own = [line for line in lines if line["phase"] == phase]
        names = {line["name"] for line in own if line["kind"] != "collective"}
        assert names == TERMS
        assert any("all-gather over" in line["name"] for line in own)
        assert own[-1]["kind"] == "step" and own[-1]["measured_s"] == pytest.approx(step_s)
        # The parts of the estimate are the whole of it.
        parts = sum(line["estimated_s"] for line in own[:-1])
        assert parts == pytest.approx(own[-1]["estimated_s"], rel=1e-6)
        for line in own:
            assert line["estimated_s"] > 0
            assert line["note"] if line["measured_s"] is None else line["measured_s"] > 0
    measured, chip = tmp_path / "measured.json", tmp_path / "chip.toml"
    measured.write_text(done.stdout)
    words = ["plan", "calibrate", "--from", str(measured), "--name", "mine", "--out", str(chip)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.exception
    assert chips(chip)["mine"].values["layer_s"].number > 0
    assert chips(chip)["mine"].values["host_s"].number == 0.01


def test_longer_products_take_longer(tmp_path: Path):
    """The terms are those of the sizes that are asked for."""
    llm = load("tiny", show="silent", dtype="bfloat16")
    known = parse_chips(
        Calibration("here", "", 1, 1e9, ((1, 1e9),), ((1, 1e9),), (), "").text(), ""
    )
    phase = PhaseLayout(Ffn.WS2D, Heads.HEADS)
    coster = Coster.of(llm.config, phase, slice_of("here:1", known), {"x": 1, "y": 1, "z": 1})
    row = np.zeros(NUM_COLUMNS, np.int32)
    short, long = (
        {
            line.name: line.measured_s or 0.0
            for line in Terms(llm.program, coster, load_of, row, 5e-3).lines()
        }
        for load_of in (Load(1, 1, 16), Load(8, 128, 512))
    )
    for name in ("MLP in", "attention, keys and values"):
        assert long[name] > 3 * short[name]


@pytest.mark.slow
def test_the_whole_steps_are_measured(tmp_path: Path):
    llm = load("tiny", show="silent", engine=EngineOptions(prefix_cache=False))
    found = served(llm, 8)
    # A prefill of 512 tokens is much more than a step of 8.
    assert found.prefill_s > 2 * found.decode_s > 1e-4
    assert 0 <= found.gap_s < 1


@pytest.mark.slow
def test_a_rounded_model_is_estimated_and_measured_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "POINT_S", 1e-3)
    monkeypatch.setattr(module, "served", lambda llm, batch: Served(0.7, 0.5, 0.01))
    made = choose(plan_config("tiny"), "bfloat16", mesh="1,1,1")
    assert made is not None
    made.write(tmp_path / "layout.json")
    sizes = {}
    monkeypatch.setattr(module, "_check_devices", lambda path, layout: None)
    monkeypatch.setattr(
        module,
        "calibrated",
        lambda name, seconds: Calibration(
            name, "", 1, 1e9, ((1, 1e9),), ((1, 1e9),), (), "bfloat16"
        ),
    )
    for rounding in (Rounding(), Rounding("int8", "int8")):
        found = module.against("tiny", tmp_path / "layout.json", rounding)
        (line,) = (one for one in found.lines if one.name == "MLP in" and one.phase == "decode")
        sizes[rounding] = line.estimated_s
        assert line.measured_s
    assert sizes[Rounding("int8", "int8")] < sizes[Rounding()]


def test_devices_that_are_missing_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "POINT_S", 1e-3)
    with pytest.raises(UsageError, match="is for 4 devices and there are 8"):
        module.against("tiny", layout_file(tmp_path, "2,2,1"))


@pytest.mark.parametrize("words", [[], ["--against", "x.json", "throughput"]])
def test_bench_alone_says_what_it_takes(words: list[str]):
    done = CliRunner().invoke(app, ["bench", *words])
    assert done.exit_code != 0
