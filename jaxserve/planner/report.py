"""Reports of a plan: one HTML page that needs nothing else, and pictures of it as PNG.

matplotlib comes with the extra `plan`; `check_installed` says so before anything is written.
"""

from __future__ import annotations

import base64
import html as escape
import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxserve.errors import UnsupportedError
from jaxserve.partitioning.estimate import Estimate, Part
from jaxserve.partitioning.picture import LayoutView
from jaxserve.planner.show import amount, merged, ms

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from jaxserve.planner.answers import Plan

COLOURS = {
    Part.COMPUTE: "#4269d0",
    Part.WEIGHTS: "#efb118",
    Part.KV: "#ff725c",
    Part.ACTIVATIONS: "#6cc5b0",
    Part.COLLECTIVE: "#3ca951",
    Part.FIXED: "#97bbf5",
    Part.HOST: "#9c6b4e",
    Part.OVERLAP: "#bbbbbb",
}

_DARK = (Part.COMPUTE, Part.COLLECTIVE, Part.HOST)
"""Colours that white is read on."""

_MOST_CHIPS = 64
"""A map of more chips than these would not be legible."""


def check_installed() -> None:
    """Raises an UnsupportedError where pictures could not be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UnsupportedError(
            "reports need matplotlib, which is not installed; pip install 'jaxserve[plan]'"
        )


def pictures(plan: Plan, folder: Path) -> list[Path]:
    """Writes the front and the terms as PNG, and returns the file."""
    path = folder / "report.png"
    _figure(plan).savefig(path, dpi=120)
    return [path]


def html(plan: Plan) -> str:
    """Returns the report as one page."""
    best, found, demand = plan.best, plan.found, plan.found.demand
    out = io.BytesIO()
    _figure(plan).savefig(out, dpi=110)
    picture = base64.b64encode(out.getvalue()).decode()
    limits = [
        f"{demand.input_tokens:,} tokens in, {demand.output_tokens:,} out",
        *([f"first token within {ms(demand.ttft_s)}"] if demand.ttft_s else []),
        *([f"{ms(demand.tpot_s)} a token"] if demand.tpot_s else []),
        *([f"{demand.rate:g} requests/s"] if demand.rate else []),
        f"best {demand.objective}",
    ]
    steps = plan.steps
    lacking = best.option.not_run()
    warning = (
        f"<p class='warn'>The runtime does not do this yet: {'; '.join(lacking)}.</p>"
        if lacking
        else ""
    )
    facts = [
        ("tokens/s", f"{best.tokens_per_s:,.0f}"),
        ("first token", ms(best.ttft_s)),
        ("a token", ms(best.tpot_s)),
        ("$ / million", "-" if best.usd_per_million is None else f"{best.usd_per_million:.2f}"),
        ("free memory", f"{best.free_bytes / 1e9:.2f} GB"),
    ]
    cards = "".join(f"<div><b>{value}</b><span>{name}</span></div>" for name, value in facts)
    return _PAGE.format(
        title=escape.escape(f"{plan.model} on {found.on}"),
        limits=escape.escape("; ".join(limits)),
        option=escape.escape(str(best.option)),
        sizes=f"{_count(best.batch, 'sequence')}; "
        f"{_count(best.group, 'prompt')} of {best.chunk} tokens in a step",
        warning=warning,
        cards=cards,
        band=f"{steps['decode'].band:.0%}",
        priced=f"{found.priced:,}",
        picture=picture,
        best=_candidates(found.best),
        terms="".join(_terms(name, step) for name, step in steps.items()),
        memory=_memory(steps),
        chips=_chips(plan),
    )


def _figure(plan: Plan) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8.5), layout="constrained")
    panels: Any = figure.subplot_mosaic(
        [["front", "memory"], ["prefill", "prefill"], ["decode", "decode"]],
        height_ratios=[2.2, 1, 1],
    )
    _draw_front(panels["front"], plan)
    _draw_memory(panels["memory"], plan.steps)
    for name, step in plan.steps.items():
        _draw_terms(panels[name], name, step)
    handles, labels = panels["decode"].get_legend_handles_labels()
    other, names = panels["prefill"].get_legend_handles_labels()
    every = dict(zip([*labels, *names], [*handles, *other], strict=True))
    figure.legend(every.values(), every.keys(), loc="outside lower center", ncols=8, frameon=False)
    figure.suptitle(f"{plan.model} on {plan.found.on}: estimates", fontsize=13)
    return figure


def _draw_front(axes: Axes, plan: Plan) -> None:
    front, best = plan.found.front, plan.found.best
    axes.plot(
        [one.tpot_s * 1e3 for one in front],
        [one.tokens_per_s for one in front],
        "o-",
        color="#4269d0",
        label="not beaten in both",
    )
    for place, one in enumerate(best):
        axes.plot(
            one.tpot_s * 1e3,
            one.tokens_per_s,
            "*" if place == 0 else "x",
            color="#ff725c",
            markersize=15 if place == 0 else 7,
            label="best" if place == 0 else "next best" if place == 1 else None,
        )
    for one in front:
        axes.annotate(
            f"B={one.batch}",
            (one.tpot_s * 1e3, one.tokens_per_s),
            textcoords="offset points",
            xytext=(-5, 5),
            ha="right",
            fontsize=8,
        )
    limit = plan.found.demand.tpot_s
    if limit is not None:
        axes.axvline(limit * 1e3, color="#888888", linestyle="--", linewidth=1)
        axes.annotate(
            "limit", (limit * 1e3, 0.96), xycoords=("data", "axes fraction"), fontsize=8, ha="right"
        )
    axes.set(xlabel="ms a token", ylabel="tokens/s", title="Pareto front of the whole slice")
    axes.margins(x=0.09, y=0.1)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)


def _draw_terms(axes: Axes, name: str, step: Estimate) -> None:
    """Draws the terms as one bar, each after the one before; what overlaps goes back."""
    at, seen = 0.0, set()
    total = float(step.time_s)
    for term in sorted(merged(step.terms), key=lambda one: list(COLOURS).index(one.part)):
        seconds = float(term.seconds)
        label = None if term.part in seen else str(term.part)
        seen.add(term.part)
        if seconds < 0:
            left = (at + seconds) * 1e3
            axes.barh(0.62, -seconds * 1e3, left=left, height=0.2, color="#bbbbbb", label=label)
            continue
        axes.barh(
            0,
            seconds * 1e3,
            left=at * 1e3,
            color=COLOURS[term.part],
            edgecolor="white",
            linewidth=0.6,
            label=label,
        )
        if seconds > 0.12 * total:
            middle = (at + seconds / 2) * 1e3
            axes.annotate(
                f"{term.name}\n{ms(seconds)}",
                (middle, 0),
                ha="center",
                va="center",
                fontsize=7,
                color="white" if term.part in _DARK else "black",
            )
        at += seconds
    axes.set(yticks=[], xlabel="ms", title=f"{name} step: {ms(total)} ± {step.band:.0%}")
    # What overlaps has a bar of its own above.
    axes.set(xlim=(0, None), ylim=(-0.5, 0.8 if Part.OVERLAP in seen else 0.5))
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _draw_memory(axes: Axes, steps: dict[str, Estimate]) -> None:
    names = ("weights", "kv", "gathered", "activation", "logits", "reserve")
    colours = ("#efb118", "#ff725c", "#ff8ab7", "#6cc5b0", "#a463f2", "#bbbbbb")
    for row, (name, step) in enumerate(steps.items()):
        left = 0.0
        for part, colour in zip(names, colours, strict=True):
            size = float(getattr(step.memory, f"{part}_bytes")) / 1e9
            label = {"kv": "keys, values", "activation": "activations"}.get(part, part)
            axes.barh(row, size, left=left, color=colour, label=None if row else label)
            left += size
        axes.annotate(name, (0.0, row + 0.43), fontsize=8)
    device = steps["decode"].memory.device_bytes / 1e9
    axes.axvline(device, color="#222222", linewidth=1.2)
    axes.annotate("a device", (device, -0.55), fontsize=8, ha="right")
    axes.set(yticks=[], xlabel="GB", title="memory of a device")
    axes.set_ylim(-0.7, 2.4)
    axes.legend(loc="upper left", ncols=3, fontsize=8, frameon=False)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _candidates(found: Sequence[Any]) -> str:
    head = (
        "layout",
        "weights",
        "cache",
        "batch",
        "prompts",
        "chunk",
        "first token",
        "a token",
        "tokens/s",
        "$/M",
        "free GB",
    )
    rows = [
        (
            str(one.option),
            one.option.kept.weights.name,
            one.option.kept.kv.name,
            one.batch,
            one.group,
            one.chunk,
            ms(one.ttft_s),
            ms(one.tpot_s),
            f"{one.tokens_per_s:,.0f}",
            "-" if one.usd_per_million is None else f"{one.usd_per_million:.2f}",
            f"{one.free_bytes / 1e9:.2f}",
        )
        for one in found
    ]
    return _table(head, rows)


def _terms(name: str, step: Estimate) -> str:
    rows = [
        (
            term.name,
            term.part,
            amount(term),
            ms(float(term.seconds)),
            f"{float(term.seconds) / float(step.time_s):.1%}",
            term.origin,
            term.remark,
        )
        for term in merged(step.terms)
    ]
    head = ("term", "kind", "amount", "time", "share", "rate is", "note")
    return f"<h3>{name}: {ms(float(step.time_s))}, MFU {step.mfu:.1%}</h3>{_table(head, rows)}"


def _memory(steps: dict[str, Estimate]) -> str:
    names = list(vars(steps["decode"].memory))
    rows = [
        (
            name.removesuffix("_bytes"),
            *(f"{float(getattr(step.memory, name)) / 1e9:,.3f}" for step in steps.values()),
        )
        for name in [*names, "total_bytes", "free_bytes"]
    ]
    return _table(("GB", *steps), rows)


def _chips(plan: Plan) -> str:
    layout = plan.layout
    if layout is None:
        return "<p>Prefill and decode have chips of their own; each side has a layout.</p>"
    if layout.mesh.num_devices > _MOST_CHIPS:
        return f"<p>{layout.mesh.num_devices} chips: too many to draw each.</p>"
    return LayoutView(layout, plan.found.config)._repr_html_()


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    top = "".join(f"<th>{escape.escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    return f"<table><tr>{top}</tr>{body}</table>"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _cell(value: object) -> str:
    """Returns a cell; numbers stand one below the other."""
    text = str(value)
    kind = " class='n'" if text[:1].isdigit() or text[:1] == "-" else ""
    return f"<td{kind}>{escape.escape(text)}</td>"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2rem auto; padding: 0 1rem;
  color: #222; }}
h1 {{ margin-bottom: 0; }} img {{ max-width: 100%; }}
table {{ border-collapse: collapse; margin: 0.5rem 0 1.5rem; font-size: 13px; }}
th, td {{ text-align: left; padding: 3px 10px; border-bottom: 1px solid #ddd; }}
td.n {{ text-align: right; white-space: nowrap; }}
.cards {{ display: flex; gap: 1rem; flex-wrap: wrap; margin: 1rem 0; }}
.cards div {{ background: #f4f5f8; border-radius: 8px; padding: 0.6rem 1.2rem; }}
.cards b {{ font-size: 22px; display: block; }} .cards span {{ color: #666; }}
.warn {{ background: #fff3d6; padding: 0.5rem 1rem; border-radius: 8px; }}
</style></head><body>
<h1>{title}</h1><p>{limits}</p>
<div class="cards">{cards}</div>
<p><b>{option}</b>: {sizes}.</p>{warning}
<p>All times are estimates, within {band} where the program is as good as those that were measured.
{priced} deployments were priced.</p>
<img alt="Pareto front, memory and terms" src="data:image/png;base64,{picture}">
<h2>The best</h2>{best}
<h2>Terms of a step</h2>{terms}
<h2>Memory of a device</h2>{memory}
<h2>Which chip holds what</h2>{chips}
</body></html>
"""
