"""Tables, bars and a plot of answers, for terminals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from jaxserve.partitioning.estimate import Estimate, Term, band
from jaxserve.partitioning.found import Candidate, Verdict

if TYPE_CHECKING:
    from jaxserve.planner.answers import Plan, Room, StepPlan

_BAR = 30
_PLOT = (60, 12)


def plan(answer: Plan) -> RenderableType:
    """Returns the answer of a search."""
    found, demand = answer.found, answer.found.demand
    limits = [
        f"{demand.input_tokens} in, {demand.output_tokens} out",
        *([f"first token within {ms(demand.ttft_s)}"] if demand.ttft_s else []),
        *([f"{ms(demand.tpot_s)} a token"] if demand.tpot_s else []),
        *([f"{demand.rate:g} requests/s"] if demand.rate else []),
    ]
    head = Text(f"{answer.model} on {found.on}: {', '.join(limits)}; best {demand.objective}")
    if found.verdict is not Verdict.OK:
        within = f"times are estimates, within {band(found.on):.0%}; memory is summed up"
        parts: list[RenderableType] = [head, Text(found.why), Text(within)]
        if found.nearest is not None:
            parts.append(candidates("nearest", [found.nearest]))
        return Group(*parts)
    notes = Text(
        f"estimates, within {band(found.on):.0%} where the program is as good as those that were "
        f"measured; {found.priced:,} deployments priced"
    )
    parts = [head, candidates("best", found.best), plot(found.front), notes]
    if lacking := answer.best.option.not_run():
        parts.append(Text(f"the runtime does not do this yet: {'; '.join(lacking)}"))
    return Group(*parts)


def sizes(plans: Sequence[Plan]) -> Table:
    """Returns slices that carry a load, the cheapest first."""
    table = Table(
        caption="The smallest slice of each chip that does. Times are estimates, each within its "
        "band. TTFT counts the wait for a turn and for the prompts of the same step: where many "
        "prompts go together at a low rate most of it is that; --ttft asks for less."
    )
    names = ("slice", "layout", "batch", "prompts", "TTFT", "TPOT", "band", "requests/s", "$/hour")
    for name in (*names, "runs"):
        table.add_column(name, justify="left" if name in ("slice", "layout") else "right")
    for one in plans:
        best = one.best
        table.add_row(
            one.found.on.name,
            str(best.option),
            str(best.batch),
            str(best.group),
            ms(best.ttft_s),
            ms(best.tpot_s),
            f"± {band(one.found.on):.0%}",
            f"{best.requests_per_s:,.2f}",
            f"{one.found.on.usd_hour:,.2f}",
            "no" if best.option.not_run() else "yes",
        )
    return table


def candidates(title: str, found: Sequence[Candidate]) -> Table:
    """Returns deployments as a table."""
    table = Table(title=title, title_justify="left")
    table.add_column("layout", overflow="fold")
    for name in ("batch", "prompts", "chunk", "TTFT", "TPOT", "tokens/s", "$/M", "free GB", "runs"):
        table.add_column(name, justify="right")
    for one in found:
        dtypes = one.option.kept
        plain = (dtypes.weights.name, dtypes.kv.name) == ("bfloat16", "bfloat16")
        names = "" if plain else f", {dtypes.weights.name}/{dtypes.kv.name}"
        table.add_row(
            f"{one.option}{names}",
            str(one.batch),
            str(one.group),
            str(one.chunk),
            ms(one.ttft_s),
            ms(one.tpot_s),
            f"{one.tokens_per_s:,.0f}",
            "-" if one.usd_per_million is None else f"{one.usd_per_million:.2f}",
            f"{one.free_bytes / 1e9:.2f}",
            "no" if one.option.not_run() else "yes",
        )
    return table


def plot(front: Sequence[Candidate]) -> Text:
    """Returns Pareto's front as characters: tokens per second over time per token."""
    width, height = _PLOT
    xs = [math.log(one.tpot_s) for one in front]
    ys = [math.log(one.tokens_per_s) for one in front]
    rows = [[" "] * width for _ in range(height)]
    for x, y in zip(xs, ys, strict=True):
        rows[-1 - _at(y, ys, height)][_at(x, xs, width)] = "●"
    low, high = front[0], front[-1]
    lines = [f"{high.tokens_per_s:>10,.0f} ┤{''.join(rows[0])}"]
    lines += [f"{'':>10} │{''.join(row)}" for row in rows[1:-1]]
    lines.append(f"{low.tokens_per_s:>10,.0f} ┤{''.join(rows[-1])}")
    lines.append(f"{'tokens/s':>10} └{'─' * width}")
    lines.append(
        f"{'':>12}{ms(low.tpot_s)}{ms(high.tpot_s):>{width - len(ms(low.tpot_s))}} a token"
    )
    return Text("\n".join(lines))


def step(answer: StepPlan) -> RenderableType:
    """Returns the estimate of a step."""
    found, phase = answer.estimate, answer.coster.share.phase
    tokens = answer.context + (answer.new if answer.phase == "prefill" else 0)
    head = (
        f"{answer.model}, {answer.phase} of {answer.batch} x {tokens} tokens on {found.on} as "
        f"{answer.mesh}, {phase}, weights {answer.coster.kept.weights.name}, keys and values "
        f"{answer.coster.kept.kv.name}"
    )
    fits = "" if found.fits else f" - DOES NOT FIT, {-found.memory.free_bytes / 1e9:,.2f} GB short"
    line = (
        f"estimate: {ms(float(found.time_s))} ± {found.band:.0%}, MFU {found.mfu:.1%}, "
        f"{found.memory.total_bytes / 1e9:,.2f} of {found.memory.device_bytes / 1e9:,.2f} GB{fits}"
    )
    return Group(Text(head), Text(line), terms("terms", found), memory(found))


def terms(title: str, found: Estimate) -> Table:
    """Returns the terms of a step, as numbers and bars."""
    table = Table(title=f"{title}: {ms(float(found.time_s))}", title_justify="left")
    for name in ("term", "kind", "amount", "time", "", "rate is"):
        right = name in ("amount", "time")
        table.add_column(name, justify="right" if right else "left", no_wrap=name != "term")
    longest = max(abs(float(term.seconds)) for term in found.terms)
    for term in merged(found.terms):
        seconds = float(term.seconds)
        bar = "█" * round(_BAR * abs(seconds) / longest)
        note = f" {term.note}" if term.note else ""
        table.add_row(
            f"{term.name}{note}",
            str(term.part),
            amount(term),
            ms(seconds),
            bar,
            str(term.origin),
        )
    return table


def memory(found: Estimate) -> Table:
    """Returns a device's memory."""
    table = Table(title="memory of a device", title_justify="left")
    table.add_column("")
    table.add_column("GB", justify="right")
    rows = vars(found.memory) | {
        "total_bytes": found.memory.total_bytes,
        "free_bytes": found.memory.free_bytes,
    }
    for name, value in rows.items():
        table.add_row(name.removesuffix("_bytes"), f"{float(value) / 1e9:,.3f}")
    return table


def room(answer: Room) -> RenderableType:
    """Returns a longest context."""
    return Text(
        f"{answer.max_context_tokens:,} tokens of {answer.batch} sequences by {answer.attention} "
        f"on {answer.on} as {answer.mesh}: {answer.hbm_fraction:.0%} of a device's memory, "
        f"{answer.budget_bytes / 1e9:,.2f} GB, for keys and values; exact, as bytes are counted"
    )


def merged(found: Sequence[Term]) -> list[Term]:
    """Returns terms that take time, those of one name and kind together."""
    from dataclasses import replace

    kept: dict[tuple[str, str, str], Term] = {}
    for term in found:
        key = term.name, str(term.part), term.note
        if key in kept:
            old = kept[key]
            kept[key] = replace(
                old,
                amount=old.amount + term.amount,
                seconds=old.seconds + term.seconds,
                count=old.count + term.count,
                hops_s=old.hops_s + term.hops_s,
            )
        else:
            kept[key] = term
    return [term for term in kept.values() if float(term.seconds)]


def ms(seconds: float) -> str:
    """Returns a time for people."""
    if abs(seconds) >= 1:
        return f"{seconds:,.2f} s"
    return f"{seconds * 1e3:,.3g} ms" if abs(seconds) < 0.1 else f"{seconds * 1e3:,.0f} ms"


def amount(term: Term) -> str:
    """Returns an amount for people."""
    value = float(term.amount)
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:,.2f} {prefix}{_UNITS.get(term.unit, ' ' + term.unit)}"
    return f"{value:,.0f} {term.unit}" if term.part not in ("overlap",) else ""


_UNITS = {"bytes": "B", "flop": "flop"}


def _at(value: float, values: Sequence[float], count: int) -> int:
    low, high = min(values), max(values)
    return 0 if high == low else round((value - low) / (high - low) * (count - 1))
