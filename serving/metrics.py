"""What the engine counts: steps, tokens, and where the time of a step goes.

gaps = Distribution()
gaps.add(0.0001)
gaps.summary().p99
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from jaxserve.serving.request import RequestTimes

RECENT = 4096
"""Values that percentiles are taken over."""


@dataclass(frozen=True)
class Summary:
    """A distribution at one moment: sum and count of all values, percentiles of the newest."""

    total: float
    count: int
    p50: float
    p99: float

    @property
    def mean(self) -> float:
        """Returns the mean of all values; 0 without one."""
        return self.total / self.count if self.count else 0.0


class Distribution:
    """A stream of numbers, of which the newest `RECENT` are kept.

    Written by one thread; another may take a summary, which may lack the value being added.
    """

    def __init__(self) -> None:
        self._total = 0.0
        self._count = 0
        self._recent: deque[float] = deque(maxlen=RECENT)

    def add(self, value: float) -> None:
        """Counts one value."""
        self._total += value
        self._count += 1
        self._recent.append(value)

    def summary(self) -> Summary:
        """Returns sum, count, median and 99th percentile; zeros without a value."""
        ordered = sorted(self._recent.copy())
        p50, p99 = (_percentile(ordered, percent) for percent in (50, 99))
        return Summary(self._total, self._count, p50, p99)


def _percentile(ordered: list[float], percent: float) -> float:
    """Returns the smallest value that `percent` of all do not exceed."""
    if not ordered:
        return 0.0
    return ordered[math.ceil(len(ordered) * percent / 100) - 1]


class HistogramSnapshot(msgspec.Struct, frozen=True):
    """A histogram at one moment.

    Attributes:
        bounds: upper bounds of the buckets; the last one has none.
        counts: values in each, one more than there are bounds.
        total: sum of all values.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float


class Histogram:
    """Counts values by bucket. One thread writes it; another may take a snapshot.

    Args:
        bounds: upper bounds of the buckets, which include them, ascending.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._total = 0.0

    def add(self, value: float) -> None:
        """Counts one value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value

    def snapshot(self) -> HistogramSnapshot:
        """Returns the counts of this moment."""
        return HistogramSnapshot(self._bounds, tuple(self._counts), self._total)


class Rate:
    """How much of something came per second lately. Times are the caller's clock.

    One thread writes it; another may ask.

    Args:
        window_s: how far back it looks.
    """

    def __init__(self, window_s: float = 5.0) -> None:
        self.window_s = window_s
        self._marks: deque[tuple[float, int]] = deque()
        self._since_s = 0.0

    def add(self, amount: int, now_s: float) -> None:
        """Counts what came now."""
        marks = self._marks
        if not marks:
            self._since_s = now_s
        if marks and now_s - marks[-1][0] < self.window_s / 50:
            marks[-1] = (marks[-1][0], marks[-1][1] + amount)
        else:
            marks.append((now_s, amount))
        while now_s - marks[0][0] > self.window_s:
            marks.popleft()

    def since(self, then_s: float) -> int:
        """Returns how much came from a moment on, which lies in the window."""
        return sum(amount for at_s, amount in tuple(self._marks) if at_s >= then_s)

    def per_s(self, now_s: float) -> float:
        """Returns the mean over the window, or since things began to come."""
        came = self.since(now_s - self.window_s)
        return came / min(max(now_s - self._since_s, self.window_s / 20), self.window_s)


_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_GAPS = (1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.1, 1)
_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 131072)


class Watch:
    """Tells how long the engine's loop has been at one turn. Another thread may look.

    Turns of a kind (steps of one size) take about the same time, so that one that takes many
    times as long as the slowest before is a stall.
    """

    def __init__(self) -> None:
        self.number = 0
        self.busy = False
        self._began_s = 0.0
        self._kind = (0, 0)
        self._slowest: dict[tuple[int, int], float] = {}

    def begin(self, now_s: float) -> None:
        """Notes that a turn begins."""
        self.number += 1
        self._began_s = now_s
        self._kind = (0, 0)
        self.busy = True

    def waits_for(self, num_tokens: int, num_rows: int) -> None:
        """Notes what the turn waits for: a step of so many tokens and rows."""
        self._kind = (num_tokens.bit_length(), num_rows.bit_length())

    def end(self, now_s: float) -> None:
        """Notes that the turn is over."""
        self.busy = False
        taken = now_s - self._began_s
        if taken > self._slowest.get(self._kind, 0.0):
            self._slowest[self._kind] = taken

    def slowest_s(self) -> float:
        """Returns the time of the slowest turn of the present one's kind."""
        return self._slowest.get(self._kind, 0.0)


@dataclass(slots=True)
class Timeline:
    """When what happened to a request, by the engine's clock; the engine alone writes it."""

    submitted_s: float = 0.0
    started_s: float | None = None
    first_s: float | None = None
    last_s: dict[int, float] = field(default_factory=dict[int, float])
    num_tokens: int = 0
    _told: bool = False

    def take_times(self, last: bool) -> RequestTimes | None:
        """Returns where the time went, the first time it is asked and the last.

        Args:
            last: a sample ends.
        """
        if (self._told and not last) or self.first_s is None or self.started_s is None:
            return None
        self._told = True
        return RequestTimes(
            self.started_s - self.submitted_s,
            self.first_s - self.started_s,
            max(self.last_s.values()) - self.first_s,
        )


class RequestHistograms:
    """Histograms of requests by the names that dashboards know; the engine alone writes them."""

    def __init__(self) -> None:
        self.time_to_first_token = Histogram(_SECONDS)
        self.inter_token_latency = Histogram(_SECONDS)
        self.e2e_latency = Histogram(_SECONDS)
        self.queue_time = Histogram(_SECONDS)
        self.prefill_time = Histogram(_SECONDS)
        self.decode_time = Histogram(_SECONDS)
        self.prompt_tokens = Histogram(_TOKENS)
        self.generation_tokens = Histogram(_TOKENS)
        self.starts = Rate(10.0)

    def started(self, timeline: Timeline, now_s: float) -> None:
        """Notes that a request got a slot; what is preempted later has had its start."""
        if timeline.started_s is None:
            timeline.started_s = now_s
            self.queue_time.add(now_s - timeline.submitted_s)
            self.starts.add(1, now_s)

    def gained(self, timeline: Timeline, sample_index: int, count: int, now_s: float) -> None:
        """Notes tokens of a sample."""
        timeline.num_tokens += count
        if (before := timeline.last_s.get(sample_index)) is not None:
            self.inter_token_latency.add(now_s - before)
        elif timeline.first_s is None:
            timeline.first_s = now_s
            self.time_to_first_token.add(now_s - timeline.submitted_s)
            self.prefill_time.add(now_s - (timeline.started_s or now_s))
        timeline.last_s[sample_index] = now_s

    def ended(self, timeline: Timeline, prompt_tokens: int, now_s: float) -> None:
        """Notes that a request is over."""
        self.e2e_latency.add(now_s - timeline.submitted_s)
        self.prompt_tokens.add(prompt_tokens)
        self.generation_tokens.add(timeline.num_tokens)
        if timeline.first_s is not None:
            self.decode_time.add(max(timeline.last_s.values()) - timeline.first_s)

    def snapshots(self) -> dict[str, HistogramSnapshot]:
        """Returns the histograms of this moment, by name."""
        return {
            name: histogram.snapshot()
            for name, histogram in vars(self).items()
            if isinstance(histogram, Histogram)
        }


class MetricsSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """What servers publish of an engine; it travels between processes.

    Attributes:
        gauges: running, waiting, waiting_tokens, pages, pages_held, pages_cached, tokens_per_s,
            expected_wait_s, in_flight, host_gap_seconds_p99.
        counters: prompt_tokens, generated_tokens, requests, steps, failures, preemptions,
            prefix_query_tokens, prefix_hit_tokens, compiles_after_ready, and whatever the servers
            add.
        finished: samples by finish reason.
        histograms: of requests and steps.
        phase_seconds: time of the engine's loop by phase.
        startup_seconds: by phase.
    """

    gauges: dict[str, float]
    counters: dict[str, float]
    finished: dict[str, int] = {}
    histograms: dict[str, HistogramSnapshot] = {}
    phase_seconds: dict[str, float] = {}
    startup_seconds: dict[str, float] = {}


@dataclass(frozen=True)
class EngineMetrics:
    """The engine at one moment. Times are in seconds, counts since it was made.

    Attributes:
        requests: taken in.
        finished: samples by finish reason; those that a client cut short count as "stop".
        failures: steps that failed.
        steps: collected.
        prompt_tokens: read in, by chunks; those of a preempted sequence again.
        output_tokens: given to sinks.
        host_gap_seconds: per step, how long the device had waited for it since the step before;
            0 where it was dispatched before that one was done. Steps after idleness do not count.
        device_seconds: per step, from the later of its dispatch and the end of the one before.
        host_seconds: per step, time of the loop that was not spent waiting for the device.
        phase_seconds: sums: schedule, dispatch, wait, commit, deliver.
        tokens_per_s: given to sinks in the last seconds.
        expected_wait_s: how long a request that comes now will probably wait for a slot: as long
            as those before it need at the rate of the last seconds in which some waited.
        histograms: of requests and steps, by name.
        scheduler: the scheduler's own counts.
    """

    requests: int
    finished: dict[str, int]
    failures: int
    steps: int
    prompt_tokens: int
    output_tokens: int
    host_gap_seconds: Summary
    device_seconds: Summary
    host_seconds: Summary
    phase_seconds: dict[str, float]
    tokens_per_s: float
    expected_wait_s: float
    histograms: dict[str, HistogramSnapshot]
    scheduler: Any


@dataclass
class StepTimes:
    """What the loop has counted; the loop alone writes it."""

    requests: int = 0
    finished: Counter[str] = field(default_factory=Counter[str])
    failures: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    host_gap: Distribution = field(default_factory=Distribution)
    device: Distribution = field(default_factory=Distribution)
    host: Distribution = field(default_factory=Distribution)
    of_requests: RequestHistograms = field(default_factory=RequestHistograms)
    host_gaps: Histogram = field(default_factory=lambda: Histogram(_GAPS))
    step_tokens: Histogram = field(default_factory=lambda: Histogram(_TOKENS))
    tokens: Rate = field(default_factory=Rate)
    phases: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(
            ("schedule", "dispatch", "wait", "commit", "deliver"), 0.0
        )
    )
    _ready_s: float | None = None
    _host_s: float = 0.0

    def spent(self, phase: str, seconds: float) -> None:
        """Counts time of the loop."""
        self.phases[phase] += seconds
        if phase != "wait":
            self._host_s += seconds

    def done(self, dispatched_s: float, ready_s: float) -> None:
        """Counts a step by when its dispatch returned and when its results were there."""
        before = self._ready_s
        if before is not None:
            gap = max(0.0, dispatched_s - before)
            self.host_gap.add(gap)
            self.host_gaps.add(gap)
        self.device.add(max(0.0, ready_s - max(dispatched_s, before or dispatched_s)))
        self.host.add(self._host_s)
        self.steps += 1
        self._ready_s, self._host_s = ready_s, 0.0

    def idle(self) -> None:
        """Notes that the device has nothing to do for want of work, not because of the host."""
        self._ready_s = None

    def snapshot(
        self, scheduler: Any, now_s: float, waits_since_s: float | None = None
    ) -> EngineMetrics:
        """Returns the counts of this moment.

        Args:
            waits_since_s: when the oldest of the requests that wait came.
        """
        histograms = self.of_requests.snapshots()
        histograms["host_gap"] = self.host_gaps.snapshot()
        histograms["iteration_tokens"] = self.step_tokens.snapshot()
        return EngineMetrics(
            self.requests,
            dict(self.finished),
            self.failures,
            self.steps,
            self.prompt_tokens,
            self.output_tokens,
            self.host_gap.summary(),
            self.device.summary(),
            self.host.summary(),
            dict(self.phases),
            self.tokens.per_s(now_s),
            self._expected_wait_s(scheduler.waiting, now_s, waits_since_s),
            histograms,
            scheduler,
        )

    def _expected_wait_s(self, waiting: int, now_s: float, since_s: float | None) -> float:
        """Returns how long a request will wait behind so many others.

        Before some waited there was no need to start any, so only the time since then counts.
        """
        if since_s is None:
            return 0.0
        starts = self.of_requests.starts
        span_s = min(now_s - since_s, starts.window_s)
        return waiting * span_s / max(starts.since(now_s - span_s), 1)


def snapshot(metrics: EngineMetrics) -> MetricsSnapshot:
    """Returns an engine's counts as they travel between processes."""
    stats = metrics.scheduler
    pages, held = sum(stats.pages_free + stats.pages_held + stats.pages_cached), stats.pages_held
    return MetricsSnapshot(
        gauges={
            "running": stats.running + stats.loading,
            "waiting": stats.waiting + stats.resuming,
            "waiting_tokens": stats.waiting_tokens,
            "pages": pages,
            "pages_held": sum(held),
            "pages_cached": sum(stats.pages_cached),
            "tokens_per_s": metrics.tokens_per_s,
            "expected_wait_s": metrics.expected_wait_s,
            "in_flight": stats.in_flight,
            "host_gap_seconds_p99": metrics.host_gap_seconds.p99,
        },
        counters={
            "requests": metrics.requests,
            "prompt_tokens": metrics.prompt_tokens,
            "generated_tokens": metrics.output_tokens,
            "steps": metrics.steps,
            "failures": metrics.failures,
            "preemptions": stats.preemptions,
            "prefix_query_tokens": stats.prefix_query_tokens,
            "prefix_hit_tokens": stats.prefix_hit_tokens,
        },
        finished=metrics.finished,
        histograms=metrics.histograms,
        phase_seconds=metrics.phase_seconds,
    )
