"""The notebooks run from top to bottom, and what is committed is what they gave."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SLOW = {"batched_sampling", "inside_the_model", "train_then_serve"}
NAMES = ["quickstart", *sorted(SLOW)]


def cells(name: str) -> list[dict[str, Any]]:
    text = (EXAMPLES / f"{name}.ipynb").read_text(encoding="utf-8")
    return [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]


def run(source: str, name: str, names: dict[str, object]) -> object:
    """Returns the value of a cell's last expression; None where it has none."""
    body = ast.parse(source).body
    last = body.pop() if isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), name, "exec"), names)
    if not isinstance(last, ast.Expr):
        return None
    return eval(compile(ast.Expression(last.value), name, "eval"), names)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in NAMES]
)
def test_every_cell_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {"__name__": name}
    for cell in cells(name):
        value = run("".join(cell["source"]), cell["id"], names)
        kept = cell["outputs"]
        if capsys.readouterr().out:
            assert any(one.get("name") == "stdout" or "data" in one for one in kept), cell["id"]
        if value is None:
            continue
        data = [one["data"] for one in kept if one["output_type"] == "execute_result"]
        assert len(data) == 1, cell["id"]
        shown = getattr(value, "_repr_html_", lambda: None)()
        if shown is not None:
            assert shown.startswith("<div") and "text/html" in data[0]
        else:
            assert "image/png" in data[0] or "".join(data[0]["text/plain"]) == repr(value)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_committed_was_run_and_went_well(name: str) -> None:
    counts = [cell["execution_count"] for cell in cells(name)]
    assert counts == list(range(1, len(counts) + 1))
    outputs = [one for cell in cells(name) for one in cell["outputs"]]
    assert outputs
    assert not [one for one in outputs if one["output_type"] == "error"]
    assert not [one for one in outputs if one.get("name") == "stderr"]
