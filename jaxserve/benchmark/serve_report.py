"""The result of putting a server under load, as plain data and as a table.

json.dumps(result.fields())
print(table(result.fields()))
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from jaxserve.benchmark.figures import (
    LATENCIES,
    aligned,
    limits,
    ms,
    number,
    rounded,
    run_fields,
    sizes,
    sizes_line,
    spread_line,
)
from jaxserve.benchmark.metrics import Record, Slo, Spread
from jaxserve.benchmark.serve_target import TargetFacts
from jaxserve.benchmark.trace import TraceSpec

SHOWN_ERRORS = 5
"""Different causes of failure that a result lists, the most frequent first."""


@dataclass(frozen=True)
class ClientCost:
    """What generating the load took.

    Attributes:
        cpu_s: processor time of this process.
        wall_s: how long the run took.
        late_s: per request, how long after its due time this process got to it.
    """

    cpu_s: float
    wall_s: float
    late_s: Sequence[float]

    def fields(self, tokens: int) -> dict[str, Any]:
        """Returns the cost as JSON shows it."""
        late = Spread.of(self.late_s)
        return {
            "cpu_s": number(self.cpu_s),
            "cpu_cores": number(self.cpu_s / self.wall_s) if self.wall_s > 0 else 0.0,
            "cpu_us_per_token": number(1e6 * self.cpu_s / tokens) if tokens else None,
            "late_s": late and rounded(asdict(late)),
        }


@dataclass(frozen=True)
class RateRun:
    """One rate's run.

    Attributes:
        refused: requests that the server had no room for.
    """

    spec: TraceSpec
    slo: Slo
    records: Sequence[Record]
    refused: int
    cost: ClientCost

    @property
    def errors(self) -> list[str]:
        """Returns why requests were refused or failed."""
        return [record.error for record in self.records if record.error is not None]

    def fields(self) -> dict[str, Any]:
        """Returns the run as JSON shows it; times are in seconds."""
        errors = self.errors
        return {
            "rate": self.spec.rate,
            "requests": len(self.records),
            "completed": len(self.records) - len(errors),
            "refused": self.refused,
            "failed": len(errors) - self.refused,
            "errors": dict(Counter(errors).most_common(SHOWN_ERRORS)),
            "prompt_tokens": sizes([record.prompt_tokens for record in self.records]),
            "output_tokens": sizes([record.output_tokens for record in self.records]),
            "cached_tokens": sum(record.cached_tokens for record in self.records),
            **run_fields(self.records, self.slo),
            "client": self.cost.fields(sum(record.output_tokens for record in self.records)),
        }


@dataclass(frozen=True)
class ServeResult:
    """A finished measurement of one server."""

    facts: TargetFacts
    concurrency: int | None
    runs: Sequence[RateRun]

    @property
    def errors(self) -> list[str]:
        """Returns why requests were refused or failed, over all rates."""
        return [error for run in self.runs for error in run.errors]

    def fields(self) -> dict[str, Any]:
        """Returns the result as JSON shows it; times are in seconds."""
        first = self.runs[0]
        rates = [run.fields() for run in self.runs]
        best = max(rates, key=lambda fields: fields["goodput"]["requests_per_s"])
        return {
            "benchmark": "serve",
            "model": self.facts.model,
            "prompts": self.facts.prompts,
            "ignore_eos": self.facts.ignore_eos,
            "tokens_counted_by": self.facts.counted,
            "trace": {
                "lengths": "log-normal, ShareGPT",
                "prompt_tokens": first.spec.prompt_tokens,
                "output_tokens": first.spec.output_tokens,
                **{k: getattr(first.spec, k) for k in ("seed", "scale", "context", "vocab_size")},
                "concurrency": self.concurrency,
            },
            "slo": {"ttft_s": first.slo.ttft_s, "tpot_s": first.slo.tpot_s},
            "rates": rates,
            "best_goodput": {
                "rate": best["rate"],
                "requests_per_s": best["goodput"]["requests_per_s"],
            },
        }


def table(fields: dict[str, Any]) -> str:
    """Returns the result as aligned lines for people, the rates one after the other."""
    trace = fields["trace"]
    eos = "end of text ignored" if fields["ignore_eos"] else "end of text ends an answer"
    head = [
        ("model", f"{fields['model']}"),
        ("asked", f"{fields['prompts']} as prompts, {eos}, seed {trace['seed']}"),
    ]
    parts = [aligned(head), *(aligned(_rate_lines(run)) for run in fields["rates"])]
    if len(fields["rates"]) > 1:
        best = fields["best_goodput"]
        parts.append(
            aligned([("best goodput", f"{best['requests_per_s']:.2f} good requests/s")])
            + f" at {_rate(best['rate'])}"
        )
    return "\n\n".join(parts)


def _rate_lines(run: dict[str, Any]) -> list[tuple[str, str]]:
    goodput, client = run["goodput"], run["client"]
    kept = limits(goodput)
    good = f"{goodput['requests_per_s']:.2f} requests/s, {goodput['fraction']:.0%} of those sent"
    lines = [
        ("rate", _rate(run["rate"])),
        (
            "requests",
            f"{run['completed']} of {run['requests']} done, {run['refused']} refused, "
            f"{run['failed']} failed",
        ),
        ("prompt", sizes_line(run["prompt_tokens"])),
        ("output", sizes_line(run["output_tokens"])),
        ("duration", f"{run['duration_s']:.2f} s"),
        ("requests/s", f"{run['requests_per_s']:.2f}"),
        ("output tokens/s", f"{run['output_tokens_per_s']:.1f}"),
        ("goodput", f"{good}, {f'within {kept}' if kept else 'no limits set'}"),
        *[(name.upper(), spread_line(run[f"{name}_s"])) for name in LATENCIES],
        ("client", _client_line(client)),
    ]
    lines += [("error", f"{count} x {text}") for text, count in run["errors"].items()]
    return lines


def _client_line(client: dict[str, Any]) -> str:
    line = f"{client['cpu_cores']:.1%} of a core"
    if client["cpu_us_per_token"] is not None:
        line += f", {client['cpu_us_per_token']:.0f} us a token"
    return f"{line}, sent {ms(client['late_s']['p99'])} late at p99"


def _rate(rate: float | None) -> str:
    return "all at once" if rate is None else f"{rate:g} a second"
