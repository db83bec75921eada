"""Steps of the engine itself, compiled for slices: what they send, hold and copy.

They need libtpu and no TPU.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jaxserve.config import (
    Activation,
    AttentionSpec,
    LayerSpec,
    MlpSpec,
    ModelConfig,
    NormKind,
    NormSpec,
    RopeSpec,
)
from jaxserve.models.named import named_config
from jaxserve.partitioning import mesh
from jaxserve.partitioning.cost import Where
from jaxserve.partitioning.layout_file import choose
from jaxserve.planner.engine_step import StepReport, check_step, engine_on
from jaxserve.planner.topology import SLICES
from jaxserve.serving.batch import StepShape
from jaxserve.serving.options import EngineOptions

NORM = NormSpec(NormKind.RMS)
LAYER = LayerSpec(
    AttentionSpec(16, 8, 128, rope=RopeSpec(128)), MlpSpec(4096, Activation.SILU, True), NORM
)
MODEL = ModelConfig("llama", 4096, 32000, (LAYER,) * 4, NORM, 512)
WIDE = named_config("llama-2-70b")

OPTIONS = EngineOptions(max_sequences=16, max_step_tokens=1024, page_size=128, kv_bytes=1 << 26)
ROWS: list[dict[str, Any]] = json.loads(
    (Path(__file__).parents[3] / "benchmarks" / "results" / "engine_steps.json").read_text()
)["rows"]


def report(
    heads: str, *, decodes: bool, config: ModelConfig = MODEL, name: str = "v5e:2x4"
) -> StepReport:
    """Returns what the compiler makes of the largest step of a kind on a slice."""
    on = SLICES[name]
    layout = choose(config, "bfloat16", mesh=on.plan, layout="ws2d", attention=heads)
    assert layout is not None
    options = replace(OPTIONS, max_sequences=2 * len(on.mesh().devices.flat))
    runner = engine_on(on, config, layout, options).runner
    shapes = [one for one in runner.ladder.shapes() if one.decode_only is decodes]
    return check_step(runner, shapes[-1])


@pytest.mark.parametrize(("heads", "decodes"), [("batch", True), ("heads", False)])
def test_a_step_of_the_engine_sends_and_holds_what_was_planned_and_copies_nothing(
    heads: str, decodes: bool
) -> None:
    found = report(heads, decodes=decodes)
    assert found.differing == {}
    assert found.exact
    assert found.predicted.keys() & found.compiled.keys()
    assert found.copies == ()
    assert abs(found.argument_bytes - found.planned_bytes) < 0.01 * found.planned_bytes
    # What only those get who ask for it stands in branches.
    assert any(key[-1] is Where.BRANCH for key in found.compiled)


@pytest.mark.slow
def test_projections_that_lie_as_they_are_shaped_are_turned_in_each_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = replace(WIDE, layers=WIDE.layers[:8], max_context_tokens=512)
    monkeypatch.setattr(mesh, "turned", lambda platform, axes: None)
    assert report("batch", decodes=True, config=config, name="v5e:8x8").copies


def test_what_is_sent_besides_differs() -> None:
    key = ("all-gather", ("x",), "bf16", Where.LAYER)
    gathered = ("all-gather", ("x", "y", "z"), "s32", Where.ENDS)
    summed = ("all-reduce", ("x", "y", "z"), "f32", Where.ENDS)
    branch = ("all-gather", ("x",), "bf16", Where.BRANCH)

    def of(predicted: dict[Any, int], compiled: dict[Any, int]) -> StepReport:
        return StepReport(
            StepShape(2, 2),
            ("x", "y", "z"),
            16,
            16,
            predicted,
            compiled,
            (),
            0,
            0,
            0,
            84,
            0.0,
            "program",
        )

    sent = {key: 8, gathered: 84, summed: 84, branch: 4}
    assert of({key: 8}, sent).exact
    assert of({key: 8, summed: 16}, sent | {summed: 100}).exact
    assert of({key: 8}, sent | {key: 9}).differing == {key: (8, 9)}
    assert of({key: 8}, sent | {summed: 100}).differing == {summed: (84, 100)}
    assert of({}, sent).differing == {key: (0, 8)}
    assert not of({key: 8}, {key: 8}).exact


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["case"])
def test_a_step_that_was_compiled_is_as_planned(row: dict[str, Any]) -> None:
    # Projections lie as decoding reads them; prompts that gather them may turn their own piece.
    gathers = row["step"] == "mixed" and "wg-" in row["layout"]
    assert len(row["copies"]) <= gathers
    assert row["argument_bytes"] + row["temp_bytes"] < row["chip_bytes"]
    assert abs(row["argument_bytes"] - row["planned_bytes"]) < 0.03 * row["planned_bytes"]
    assert row["leaves_the_slice"] == []
    assert row["slices"] == 1
    # A scatter whose pieces are no whole tiles is padded, within 2 %, and its ends are moved.
    assert row["exact"] == (row["differing"] == {})
    for name, (predicted, compiled) in row["differing"].items():
        assert "reduce-scatter" in name or "permute" in name, name
        assert abs(compiled - predicted) <= 0.02 * (predicted or row["planned_bytes"]), name
