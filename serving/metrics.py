"""What the engine counts: steps, tokens, and where the time of a step goes.

gaps = Distribution()
gaps.add(0.0001)
gaps.summary().p99
"""

from __future__ import annotations

import math
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

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
            self.host_gap.add(max(0.0, dispatched_s - before))
        self.device.add(max(0.0, ready_s - max(dispatched_s, before or dispatched_s)))
        self.host.add(self._host_s)
        self.steps += 1
        self._ready_s, self._host_s = ready_s, 0.0

    def idle(self) -> None:
        """Notes that the device has nothing to do for want of work, not because of the host."""
        self._ready_s = None

    def snapshot(self, scheduler: Any) -> EngineMetrics:
        """Returns the counts of this moment."""
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
            scheduler,
        )
