"""Puts a server under load in an open loop: requests come at their times, whatever is still open.

    result = await measure(target, ServeJob(rates=(1.0, 2.0, 4.0), requests=100))
    result.fields()["rates"][0]["ttft_s"]["p99"]

Requests and arrivals are those of `trace.py`; each rate has the same lengths and other tokens, so
a prefix cache never knows a prompt. Times count from when a request was due, so time that this
process lost is in them, and is reported: the generator needs a processor beside the server.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

from jaxserve.benchmark.metrics import Record, Slo
from jaxserve.benchmark.serve_report import ClientCost, RateRun, ServeResult
from jaxserve.benchmark.serve_target import Askable, CallError, RefusedError, Target, TargetFacts
from jaxserve.benchmark.trace import TraceRequest, TraceSpec, make_trace
from jaxserve.errors import UsageError

DEFAULT_CONTEXT = 2048
DEFAULT_VOCAB = 1000
"""Ids that every real vocabulary holds, for servers that do not tell its size."""


@dataclass(frozen=True, kw_only=True)
class ServeJob:
    """What to send.

    Attributes:
        rates: mean arrivals per second, measured one after the other; None: all at once.
        requests: how many for each rate.
        duration_s: instead: as many as the rate brings in this time.
        seed, scale: of the trace; see `TraceSpec`.
        variant: of the first rate's trace; those after it count on.
        slo: limits of a good request.
        concurrency: most requests open at once; None sets no limit.
        context, vocab_size: bounds of the trace, instead of what the server tells.
        prompt_tokens, output_tokens: lengths of every request; see `TraceSpec`.
    """

    rates: tuple[float | None, ...] = (None,)
    requests: int = 100
    duration_s: float | None = None
    seed: int = 0
    scale: float = 1.0
    variant: int = 0
    slo: Slo = field(default_factory=Slo)
    concurrency: int | None = None
    context: int | None = None
    vocab_size: int | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None

    def __post_init__(self) -> None:
        if not self.rates:
            raise UsageError("no rate to measure; name one or several, as 1,2,4")
        if self.concurrency is not None and self.concurrency < 1:
            raise UsageError(f"concurrency={self.concurrency} must be at least 1")
        if self.duration_s is not None:
            if not 0 < self.duration_s < math.inf:
                raise UsageError(f"duration={self.duration_s:g} s must be above 0")
            if None in self.rates:
                raise UsageError("a duration needs a rate; without one all requests come at once")
        for spec in self.specs(TargetFacts("", None, None, "", True, "")):
            assert spec  # a trace that cannot be made is refused here

    def specs(self, facts: TargetFacts) -> list[TraceSpec]:
        """Returns the trace of each rate."""
        # A server that does not tell its context is taken to have room for what is asked.
        longest = max(DEFAULT_CONTEXT, (self.prompt_tokens or 0) + (self.output_tokens or 0))
        return [
            TraceSpec(
                requests=self._count(rate),
                seed=self.seed,
                vocab_size=self.vocab_size or facts.vocab_size or DEFAULT_VOCAB,
                context=self.context or facts.context or longest,
                rate=rate,
                scale=self.scale,
                variant=variant,
                prompt_tokens=self.prompt_tokens,
                output_tokens=self.output_tokens,
            )
            for variant, rate in enumerate(self.rates, self.variant)
        ]

    def _count(self, rate: float | None) -> int:
        if self.duration_s is None or rate is None:
            return self.requests
        return max(1, round(rate * self.duration_s))


async def measure(
    target: Target, job: ServeJob, say: Callable[[str], None] = lambda text: None
) -> ServeResult:
    """Returns what became of the requests of each rate.

    Args:
        say: takes a line on each run's begin and end.

    Raises:
        CallError: the server could not be asked at all.
    """
    try:
        facts = await target.prepare()
        runs: list[RateRun] = []
        for spec in job.specs(facts):
            rate = "all at once" if spec.rate is None else f"at {spec.rate:g} a second"
            say(f"{spec.requests} requests {rate}")
            records, refused, cost = await offer(target, make_trace(spec), job.concurrency)
            runs.append(RateRun(spec, job.slo, records, refused, cost))
        return ServeResult(facts, job.concurrency, runs)
    finally:
        await target.close()


async def offer(
    target: Askable, trace: Sequence[TraceRequest], concurrency: int | None = None
) -> tuple[list[Record], int, ClientCost]:
    """Returns what became of each request, how many were refused, and what asking cost."""
    records = [Record(request.due_s, len(request.prompt)) for request in trace]
    late_s: list[float] = []
    refused: list[int] = []
    slots = asyncio.Semaphore(concurrency) if concurrency else nullcontext()
    began, cpu_began = time.perf_counter(), time.process_time()

    def clock() -> float:
        return time.perf_counter() - began

    async def send(index: int) -> None:
        async with slots:
            try:
                await target.call(trace[index], records[index], clock)
            except CallError as error:
                records[index].error = str(error)
                if isinstance(error, RefusedError):
                    refused.append(index)

    async with asyncio.TaskGroup() as tasks:
        for index, request in enumerate(trace):
            if (wait := request.due_s - clock()) > 0:
                await asyncio.sleep(wait)
            late_s.append(clock() - request.due_s)
            tasks.create_task(send(index))
    cost = ClientCost(time.process_time() - cpu_began, clock(), tuple(late_s))
    return records, len(refused), cost
