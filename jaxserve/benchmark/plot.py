"""Draws a throughput run: latencies, tokens per second, sequences and their KV memory.

matplotlib comes with the extra `plan`; `check_installed` says so before a run begins.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxserve.benchmark.metrics import KvSample, Record
from jaxserve.benchmark.report import Result
from jaxserve.errors import UnsupportedError, UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BUCKETS = 60


def check_installed(path: Path) -> None:
    """Raises if a plot could not be written to `path`.

    Raises:
        UnsupportedError: matplotlib is missing.
        UsageError: there is no such folder, or no such kind of picture.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UnsupportedError(
            "--plot needs matplotlib, which is not installed; pip install 'jaxserve[plan]'"
        )
    if not path.parent.is_dir():
        raise UsageError(f"--plot {path}: there is no folder {path.parent}; make it first")
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix.removeprefix(".") not in kinds:
        raise UsageError(f"--plot {path}: the name must end in .{', .'.join(kinds)}")


def save_plot(result: Result, path: Path) -> None:
    """Writes four panels; the kind of picture follows the file's ending."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    panels: Any = figure.subplots(2, 2)
    draw_shares(panels[0, 0], "from due to first and last token", _first_and_last(result.records))
    draw_shares(panels[0, 1], "per token", _per_token(result.records))
    _draw_rate(panels[1, 0], result.records)
    _draw_memory(panels[1, 1], result.samples)
    fields = result.fields()
    figure.suptitle(
        f"{fields['model']}: {fields['output_tokens_per_s']:.0f} output tokens/s, "
        f"{fields['requests_per_s']:.2f} requests/s"
    )
    figure.savefig(path, dpi=120)


def _first_and_last(records: Sequence[Record]) -> dict[str, list[float]]:
    answered = [record for record in records if record.times_s]
    return {"TTFT": [r.ttft_s for r in answered], "E2E": [r.e2e_s for r in answered]}


def _per_token(records: Sequence[Record]) -> dict[str, list[float]]:
    tpots = [record.tpot_s for record in records if record.times_s]
    return {
        "TPOT": [tpot for tpot in tpots if tpot is not None],
        "ITL": [gap for record in records for gap in record.itl_s],
    }


def draw_shares(axes: Axes, title: str, series: dict[str, list[float]]) -> None:
    """Draws which share of the values is at most so large."""
    for name, values in series.items():
        axes.ecdf(values, label=name) if values else axes.plot([], [], label=name)
    axes.set(title=title, xlabel="s", ylabel="share", ylim=(0, 1))
    axes.legend()


def _draw_rate(axes: Axes, records: Sequence[Record]) -> None:
    """Draws output tokens per second over time."""
    times = [time for record in records for time in record.times_s]
    counts = [count for record in records for count in record.counts]
    tokens, edges = np.histogram(times, BUCKETS, (0, max(times, default=1.0)), weights=counts)
    axes.stairs(tokens / np.diff(edges), edges, fill=True)
    axes.set(title="output tokens per second", xlabel="s", ylim=(0, None))


def _draw_memory(axes: Axes, samples: Sequence[KvSample]) -> None:
    """Draws running sequences, and token places held and used."""
    times = [sample.time_s for sample in samples]
    axes.plot(times, [sample.allocated for sample in samples], label="places held")
    axes.plot(times, [sample.used for sample in samples], label="places used")
    axes.set(title="KV cache and sequences", xlabel="s", ylabel="tokens", ylim=(0, None))
    axes.legend(loc="upper right")
    right = axes.twinx()
    right.plot(times, [sample.running for sample in samples], color="grey", lw=0.8)
    right.set(ylabel="running sequences (grey)", ylim=(0, None))
