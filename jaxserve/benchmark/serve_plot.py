"""Draws a server's rates beside each other: latencies, and what it got done within the limits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxserve.benchmark.figures import limits
from jaxserve.benchmark.plot import draw_shares
from jaxserve.benchmark.serve_report import RateRun, ServeResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def save_plot(result: ServeResult, path: Path) -> None:
    """Writes four panels; the kind of picture follows the file's ending."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    panels: Any = figure.subplots(2, 2)
    slo = result.runs[0].slo
    answered = {_name(run): [r for r in run.records if r.times_s] for run in result.runs}
    ttft = {name: [r.ttft_s for r in records] for name, records in answered.items()}
    tpot = {
        name: [t for r in records if (t := r.tpot_s) is not None]
        for name, records in answered.items()
    }
    e2e = {name: [r.e2e_s for r in records] for name, records in answered.items()}
    for axes, title, series, limit_s in (
        (panels[0, 0], "time to first token", ttft, slo.ttft_s),
        (panels[0, 1], "time per output token", tpot, slo.tpot_s),
        (panels[1, 0], "end to end", e2e, None),
    ):
        draw_shares(axes, title, series)
        axes.locator_params(axis="x", nbins=6)
        if limit_s is not None:
            axes.axvline(limit_s, color="grey", ls="--", lw=1)
    _draw_requests(panels[1, 1], result.runs)
    kept = limits(result.fields()["rates"][0]["goodput"])
    figure.suptitle(result.facts.model + (f", good: {kept}" if kept else ""))
    figure.savefig(path, dpi=120)


def _draw_requests(axes: Axes, runs: Sequence[RateRun]) -> None:
    """Draws requests per second by rate: finished, and finished within the limits."""
    fields = [run.fields() for run in runs]
    done = [run["requests_per_s"] for run in fields]
    good = [run["goodput"]["requests_per_s"] for run in fields]
    places = range(len(runs))
    axes.bar([x - 0.2 for x in places], done, 0.4, label="finished")
    axes.bar([x + 0.2 for x in places], good, 0.4, label="within the limits")
    axes.set_xticks(places, [_name(run) for run in runs])
    axes.set(title="requests per second", xlabel="offered", ylim=(0, None))
    axes.legend()


def _name(run: RateRun) -> str:
    return "all at once" if run.spec.rate is None else f"{run.spec.rate:g}/s"
