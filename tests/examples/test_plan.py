"""The notebook of the planner runs from top to bottom."""

import ast
import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "plan.ipynb"


def test_every_cell_runs_and_every_last_value_shows_itself(capsys: pytest.CaptureFixture[str]):
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    names: dict[str, object] = {}
    shown = []
    for cell in cells:
        if cell["cell_type"] != "code":
            continue
        body = ast.parse("".join(cell["source"])).body
        last = body[-1] if isinstance(body[-1], ast.Expr) else None
        body = body[:-1] if last is not None else body
        exec(compile(ast.Module(body, []), cell["id"], "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), cell["id"], "eval"), names)
            if value is not None:
                shown.append(value._repr_html_())  # type: ignore[attr-defined]
    assert len(shown) == 3 and all("<" in html for html in shown)
    text = capsys.readouterr().out
    assert "in all" in text and "give or take" in text
    assert cells[1]["outputs"] == []
