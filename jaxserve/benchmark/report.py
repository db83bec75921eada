"""The result of a throughput run, as plain data and as a table.

result = Result(spec, slo, records, samples, engine)
json.dumps(result.fields())
print(table(result.fields()))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from jaxserve.benchmark.figures import (
    LATENCIES,
    aligned,
    limits_line,
    ms,
    number,
    rounded,
    run_fields,
    sizes,
    sizes_line,
    spread_line,
)
from jaxserve.benchmark.metrics import KvSample, KvWaste, Record, Slo
from jaxserve.benchmark.trace import TraceSpec


@dataclass(frozen=True)
class StepTimes:
    """Seconds of the engine's steps; see `serving.metrics.EngineMetrics`.

    Attributes:
        steps: how many.
        host_s, device_s: sums of the loop's own work and of the device's time, which overlap.
        wait_s: of the loop's time, how much it waited for the device.
        host_p50_s, host_p99_s, device_p50_s, device_p99_s: of one step.
        host_gap_p50_s, host_gap_p99_s: how long the device had nothing to do before a step.
    """

    steps: int
    host_s: float
    device_s: float
    wait_s: float
    host_p50_s: float
    host_p99_s: float
    device_p50_s: float
    device_p99_s: float
    host_gap_p50_s: float
    host_gap_p99_s: float


@dataclass(frozen=True)
class Compiles:
    """What was compiled during a run; each was a pause.

    Attributes:
        steps: programs of the engine.
        programs: programs of any kind, small helpers included.
        seconds: that these took.
    """

    steps: int
    programs: int
    seconds: float


@dataclass(frozen=True)
class EngineFacts:
    """What the engine counted during a run.

    Attributes:
        settings: what the run was made with.
        times: of the steps.
        compiles: after warming up.
        preemptions: sequences that lost their pages and were read in again.
        prefix_queries, prefix_hits: prompt tokens looked up in the prefix cache, and found.
    """

    settings: dict[str, Any]
    times: StepTimes
    compiles: Compiles
    preemptions: int
    prefix_queries: int
    prefix_hits: int


@dataclass(frozen=True)
class Result:
    """A finished run."""

    spec: TraceSpec
    slo: Slo
    records: Sequence[Record]
    samples: Sequence[KvSample]
    engine: EngineFacts

    @property
    def failures(self) -> list[str]:
        """Returns the causes of the requests that failed."""
        return [record.error for record in self.records if record.error is not None]

    def fields(self) -> dict[str, Any]:
        """Returns the result as JSON shows it; times are in seconds."""
        waste = KvWaste.of(self.samples)
        engine = self.engine
        asked = engine.prefix_queries
        return {
            "benchmark": "throughput",
            **engine.settings,
            "trace": {
                "lengths": "log-normal, ShareGPT",
                **{k: getattr(self.spec, k) for k in ("requests", "seed", "scale", "rate")},
                "prompt_tokens": sizes([record.prompt_tokens for record in self.records]),
                "output_tokens": sizes([record.output_tokens for record in self.records]),
            },
            "failed_requests": len(self.failures),
            **run_fields(self.records, self.slo),
            "kv_waste": None if waste is None else rounded(asdict(waste)),
            "step": rounded(asdict(engine.times)),
            "compiles_after_ready": engine.compiles.steps,
            "compiled": rounded(asdict(engine.compiles)),
            "preemptions": engine.preemptions,
            "prefix_hit_rate": number(engine.prefix_hits / asked) if asked else 0.0,
        }


def table(fields: dict[str, Any]) -> str:
    """Returns the result as aligned lines for people."""
    trace, step, goodput = fields["trace"], fields["step"], fields["goodput"]
    rate = "all at once" if trace["rate"] is None else f"{trace['rate']:g} a second"
    lines = [
        ("model", f"{fields['model']}, {fields['dtype']}, {fields['device']}"),
        ("requests", f"{trace['requests']}, {rate}, seed {trace['seed']}"),
        ("prompt", sizes_line(trace["prompt_tokens"])),
        ("output", sizes_line(trace["output_tokens"])),
        ("", ""),
        ("duration", f"{fields['duration_s']:.2f} s"),
        ("requests/s", f"{fields['requests_per_s']:.2f}"),
        ("output tokens/s", f"{fields['output_tokens_per_s']:.1f}"),
        ("total tokens/s", f"{fields['total_tokens_per_s']:.1f}"),
        ("goodput", f"{goodput['requests_per_s']:.2f} requests/s, {limits_line(goodput)}"),
        ("", ""),
        *[(name.upper(), spread_line(fields[f"{name}_s"])) for name in LATENCIES],
        ("", ""),
        ("KV waste", _waste_line(fields["kv_waste"])),
        (
            "step",
            f"{ms(step['device_p50_s'])} device, {ms(step['host_p50_s'])} host at p50; "
            f"{step['steps']} steps",
        ),
        (
            "host gap",
            f"{1e6 * step['host_gap_p50_s']:.0f} us p50, {1e6 * step['host_gap_p99_s']:.0f} us p99",
        ),
        ("compiles", _compiles_line(fields["compiled"])),
        ("preemptions", str(fields["preemptions"])),
        ("prefix hits", f"{fields['prefix_hit_rate']:.1%}"),
    ]
    if fields["failed_requests"]:
        lines.append(("failed", f"{fields['failed_requests']} requests"))
    return aligned(lines)


def _waste_line(waste: dict[str, float] | None) -> str:
    if waste is None:
        return "-"
    return f"{waste['paged']:.1%} (contiguous reservation: {waste['contiguous']:.1%})"


def _compiles_line(compiled: dict[str, Any]) -> str:
    line = f"{compiled['steps']} after ready"
    if compiled["programs"]:
        line += f"; XLA compiled {compiled['programs']} programs in {ms(compiled['seconds'])}"
    return line
