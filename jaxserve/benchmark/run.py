"""Loads a model, compiles everything, plays a trace and gathers what the engine counted.

result = measure(Job(model="tiny", requests=200, seed=0))
result.fields()["output_tokens_per_s"]
"""

from __future__ import annotations

import itertools
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from jaxserve.benchmark.compiles import CompileCount
from jaxserve.benchmark.metrics import KvSample, Record, Slo
from jaxserve.benchmark.replay import Steppable, replay
from jaxserve.benchmark.report import Compiles, EngineFacts, Result, StepTimes
from jaxserve.benchmark.trace import TraceRequest, TraceSpec, make_trace

if TYPE_CHECKING:
    from jaxserve.api import LLM
    from jaxserve.serving.metrics import EngineMetrics
    from jaxserve.serving.options import EngineOptions
    from jaxserve.serving.scheduler import SchedulerStats


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to run.

    Attributes:
        model: as `jaxserve.load` takes it; so are `dtype`, `quantize` and `kv_dtype`.
        requests, rate, seed, scale: of the trace; see `TraceSpec`.
        slo: limits of a good request.
        engine: fields of `EngineOptions` that differ from its defaults.
        sharding: arguments of `load` that say the mesh, its layout and the devices.
        quiet: no progress on standard error.
    """

    model: str = "tiny"
    dtype: str | None = None
    quantize: str | None = None
    kv_dtype: str | None = None
    requests: int = 200
    rate: float | None = None
    seed: int = 0
    scale: float = 1.0
    slo: Slo = field(default_factory=Slo)
    engine: Mapping[str, Any] = field(default_factory=dict)
    sharding: Mapping[str, Any] = field(default_factory=dict)
    quiet: bool = False


SAMPLE_EVERY = 7
"""Turns of the engine between looks at the cache, which cost as much as a turn's own work.

Pages fill every so many steps, a power of two; an odd number meets all of their states alike.
"""


class Observable(Steppable, Protocol):
    """An engine that tells what it counted; `serving.engine.Engine` is one."""

    @property
    def metrics(self) -> EngineMetrics:
        """Returns what was counted so far."""
        ...


def measure(job: Job) -> Result:
    """Returns the result of a run on a freshly loaded model, compilation not included."""
    from jaxserve.api import load
    from jaxserve.serving.options import EngineOptions

    show = "silent" if job.quiet else "auto"
    options = EngineOptions(**job.engine)
    llm = load(
        job.model,
        dtype=job.dtype,
        quantize=job.quantize,
        kv_dtype=job.kv_dtype,
        engine=options,
        show=show,
        **job.sharding,
    )
    spec = TraceSpec(
        requests=job.requests,
        seed=job.seed,
        vocab_size=llm.config.vocab_size,
        context=llm.config.max_context_tokens,
        rate=job.rate,
        scale=job.scale,
    )
    llm.warm_up(show)
    trace = make_trace(spec)
    with CompileCount() as compiled:
        records, samples = observe(llm.engine, trace, spec.context)
    settings = {"model": job.model, **_settings(llm, options)}
    compiles = Compiles(llm.compiles_after_ready, compiled.total, compiled.seconds)
    facts = engine_facts(llm.engine.metrics, settings, compiles)
    return Result(spec, job.slo, records, samples, facts)


def observe(
    engine: Observable,
    trace: list[TraceRequest],
    context: int,
    sample_every: int = SAMPLE_EVERY,
) -> tuple[list[Record], list[KvSample]]:
    """Returns the records of a replay, and the cache's load after every so many turns.

    Args:
        context: tokens that an engine without pages would reserve for each sequence.
    """
    samples: list[KvSample] = []
    turns = itertools.count(1)

    def look(now_s: float) -> None:
        if next(turns) % sample_every == 0:
            samples.append(kv_sample(now_s, engine.metrics.scheduler, context))

    return replay(engine, trace, look), samples


def kv_sample(now_s: float, stats: SchedulerStats, context: int) -> KvSample:
    """Returns the cache's load at one moment."""
    running = stats.loading + stats.running
    return KvSample(
        time_s=now_s,
        running=running,
        allocated=stats.held_tokens,
        used=stats.held_tokens - stats.unused_tokens,
        reserved=running * context * len(stats.pages_held),
    )


def engine_facts(
    metrics: EngineMetrics, settings: dict[str, Any], compiles: Compiles
) -> EngineFacts:
    """Returns what an engine counted, all its steps being those of the run."""
    host, device, gap = metrics.host_seconds, metrics.device_seconds, metrics.host_gap_seconds
    stats: SchedulerStats = metrics.scheduler
    return EngineFacts(
        settings=settings,
        times=StepTimes(
            steps=metrics.steps,
            host_s=host.total,
            device_s=device.total,
            wait_s=metrics.phase_seconds["wait"],
            host_p50_s=host.p50,
            host_p99_s=host.p99,
            device_p50_s=device.p50,
            device_p99_s=device.p99,
            host_gap_p50_s=gap.p50,
            host_gap_p99_s=gap.p99,
        ),
        compiles=compiles,
        preemptions=stats.preemptions,
        prefix_queries=stats.prefix_query_tokens,
        prefix_hits=stats.prefix_hit_tokens,
    )


def _settings(llm: LLM, options: EngineOptions) -> dict[str, Any]:
    """Returns what the figures depend on besides the trace."""
    import jax

    device = jax.devices()[0]
    return {
        "dtype": llm.program.model.declare.dtype,
        "backend": jax.default_backend(),
        "device": device.device_kind,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "layout": None if llm.program.mesh is None else str(llm.layout.layout),
        "engine": asdict(options),
    }
