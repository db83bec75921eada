"""The figures of a run's records as JSON shows them, and as lines for people.

fields = run_fields(records, Slo(ttft_s=1.0))
fields["ttft_s"]["p99"], fields["goodput"]["requests_per_s"]
print(aligned([("TTFT", spread_line(fields["ttft_s"]))]))
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from jaxserve.benchmark.metrics import Latencies, Record, Slo, Spread, Throughput

LATENCIES = ("ttft", "tpot", "itl", "e2e")


def run_fields(records: Sequence[Record], slo: Slo) -> dict[str, Any]:
    """Returns rates, latencies and goodput of a run; times are in seconds."""
    rates = Throughput.of(records, slo)
    found = asdict(Latencies.of(records))
    return {
        "duration_s": number(rates.duration_s),
        "requests_per_s": number(rates.requests_per_s),
        "output_tokens_per_s": number(rates.output_tokens_per_s),
        "total_tokens_per_s": number(rates.total_tokens_per_s),
        **{f"{name}_s": found[name] and rounded(found[name]) for name in LATENCIES},
        "goodput": {
            "slo_ttft_s": slo.ttft_s,
            "slo_tpot_s": slo.tpot_s,
            "requests_per_s": number(rates.good_requests_per_s),
            "fraction": number(rates.good_fraction),
        },
    }


def sizes(counts: Sequence[int]) -> dict[str, Any]:
    """Returns the sum of some numbers of tokens and their spread."""
    spread = Spread.of(counts)
    return {"total": sum(counts)} | ({} if spread is None else rounded(asdict(spread)))


def sizes_line(sizes: dict[str, Any]) -> str:
    """Returns what `sizes` found, for people."""
    return f"{sizes['mean']:.0f} tokens mean, {sizes['p50']:.0f} p50, {sizes['p99']:.0f} p99"


def spread_line(spread: dict[str, float] | None) -> str:
    """Returns a spread of seconds, for people."""
    if spread is None:
        return "-"
    return f"{ms(spread['p50'])} p50, {ms(spread['p99'])} p99, {ms(spread['mean'])} mean"


def limits_line(goodput: dict[str, Any]) -> str:
    """Returns which share of the requests kept which limits."""
    asked = limits(goodput)
    return f"{goodput['fraction']:.0%} within {asked}" if asked else "no limits set"


def limits(goodput: dict[str, Any]) -> str:
    """Returns the limits of a good request; empty if there are none."""
    return ", ".join(
        f"{name.upper()} <= {goodput[f'slo_{name}_s']:g} s"
        for name in ("ttft", "tpot")
        if goodput[f"slo_{name}_s"] is not None
    )


def aligned(lines: Iterable[tuple[str, str]]) -> str:
    """Returns names and values in two columns."""
    return "\n".join(f"{name:<16} {value}".rstrip() for name, value in lines)


def ms(seconds: float) -> str:
    """Returns a time in milliseconds."""
    return f"{1e3 * seconds:.2f} ms"


def rounded(fields: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields, fractions as `number` gives them."""
    return {k: number(v) if isinstance(v, float) else v for k, v in fields.items()}


def number(value: float) -> float:
    """Returns six significant digits: more are noise."""
    return float(f"{value:.6g}")
