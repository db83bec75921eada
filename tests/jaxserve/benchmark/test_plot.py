"""The plot of a throughput run."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest

from jaxserve.benchmark.plot import check_installed, save_plot
from jaxserve.benchmark.report import Result
from jaxserve.errors import UnsupportedError, UsageError

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed"
)


@needs_matplotlib
def test_a_plot_shows_every_latency(result: Result, tmp_path: Path):
    path = tmp_path / "run.svg"
    check_installed(path)
    save_plot(result, path)
    text = path.read_text()
    # Text is drawn as outlines, each with what it says in a comment.
    for label in ("TTFT", "E2E", "TPOT", "ITL", "output tokens per second", "places held"):
        assert f"<!-- {label} -->" in text


@needs_matplotlib
def test_a_run_without_an_answer_has_a_plot(result: Result, tmp_path: Path):
    for record in result.records:
        record.times_s.clear()
        record.counts.clear()
    save_plot(dataclasses.replace(result, samples=[]), tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


@needs_matplotlib
@pytest.mark.parametrize(
    ("name", "message"),
    [("run.xyz", "must end in .*.png"), ("run", "must end in"), ("no/run.png", "no folder")],
)
def test_a_plot_that_cannot_be_written_is_refused_beforehand(
    tmp_path: Path, name: str, message: str
):
    with pytest.raises(UsageError, match=message):
        check_installed(tmp_path / name)


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"pip install 'jaxserve\[plan\]'"):
        check_installed(tmp_path / "run.png")
