"""Figures of serving, from when each request was due and when each of its tokens came.

    record = Record(due_s=0.0, prompt_tokens=12)
    record.add(0.5, 1)                     # the first token, at 0.5 s
    record.add(0.7, 2)                     # two more
    record.ttft_s, record.tpot_s           # 0.5, 0.1

TTFT is the time to the first token, E2E that to the last, both from when the request was due, so
waiting counts even where the request could not be handed over in time. TPOT, the time per output
token after the first, is (E2E - TTFT) / (tokens - 1). ITL, the inter-token latency, is the time
between arrivals of tokens that follow each other; tokens that arrive together are one arrival.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Record:
    """What happened to one request; written by the replay alone.

    Attributes:
        due_s: when it was due.
        prompt_tokens: length of its prompt.
        cached_tokens: tokens of the prompt that the prefix cache held.
        times_s: when tokens arrived, oldest first.
        counts: how many tokens arrived at each of these times.
        token_ids: the tokens.
        error: why it failed, if it did.
    """

    due_s: float
    prompt_tokens: int
    cached_tokens: int = 0
    times_s: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    error: str | None = None

    def add(self, time_s: float, count: int) -> None:
        """Notes the arrival of `count` tokens."""
        self.times_s.append(time_s)
        self.counts.append(count)

    @property
    def output_tokens(self) -> int:
        """Returns the tokens that arrived."""
        return sum(self.counts)

    @property
    def ttft_s(self) -> float:
        """Returns the time from due to the first token."""
        return self.times_s[0] - self.due_s

    @property
    def e2e_s(self) -> float:
        """Returns the time from due to the last token."""
        return self.times_s[-1] - self.due_s

    @property
    def tpot_s(self) -> float | None:
        """Returns the mean time per token after the first; None for a single token."""
        tokens = self.output_tokens
        return None if tokens < 2 else (self.e2e_s - self.ttft_s) / (tokens - 1)

    @property
    def itl_s(self) -> list[float]:
        """Returns the times between arrivals that follow each other."""
        return [b - a for a, b in zip(self.times_s, self.times_s[1:], strict=False)]


@dataclass(frozen=True)
class Slo:
    """Longest times a request may take to count as good; None sets no limit."""

    ttft_s: float | None = None
    tpot_s: float | None = None

    def met(self, record: Record) -> bool:
        """Returns whether a finished request kept the limits; a single token has no TPOT."""
        if record.error is not None or not record.times_s:
            return False
        if self.ttft_s is not None and record.ttft_s > self.ttft_s:
            return False
        return self.tpot_s is None or (record.tpot_s or 0.0) <= self.tpot_s


@dataclass(frozen=True)
class Spread:
    """Mean, median and 99th percentile of some numbers."""

    mean: float
    p50: float
    p99: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        """Returns the spread, percentiles interpolated between neighbours; None of no values."""
        array = np.fromiter(values, float)
        if array.size == 0:
            return None
        p50, p99 = np.percentile(array, (50, 99))
        return cls(float(array.mean()), float(p50), float(p99))


@dataclass(frozen=True)
class Latencies:
    """Seconds, over all requests that got a token; for ITL over all their gaps."""

    ttft: Spread | None
    tpot: Spread | None
    itl: Spread | None
    e2e: Spread | None

    @classmethod
    def of(cls, records: Sequence[Record]) -> Latencies:
        """Returns the latencies of a replay."""
        answered = [record for record in records if record.times_s]
        tpots = (record.tpot_s for record in answered)
        return cls(
            ttft=Spread.of(record.ttft_s for record in answered),
            tpot=Spread.of(tpot for tpot in tpots if tpot is not None),
            itl=Spread.of(gap for record in answered for gap in record.itl_s),
            e2e=Spread.of(record.e2e_s for record in answered),
        )


@dataclass(frozen=True)
class Throughput:
    """Rates over the time from the first request's due time to the last token."""

    duration_s: float
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    good_requests_per_s: float
    good_fraction: float

    @classmethod
    def of(cls, records: Sequence[Record], slo: Slo) -> Throughput:
        """Returns the rates of a replay; a failed request adds its tokens and no request."""
        done = [r for r in records if r.error is None and r.times_s]
        ends = [record.times_s[-1] for record in records if record.times_s]
        duration = max(ends, default=0.0) - min((r.due_s for r in records), default=0.0)
        per_s = 1 / duration if duration > 0 else 0.0
        output = sum(record.output_tokens for record in records)
        prompt = sum(record.prompt_tokens for record in records if record.times_s)
        good = sum(slo.met(record) for record in records)
        return cls(
            duration_s=duration,
            requests_per_s=len(done) * per_s,
            output_tokens_per_s=output * per_s,
            total_tokens_per_s=(output + prompt) * per_s,
            good_requests_per_s=good * per_s,
            good_fraction=good / len(records) if records else 0.0,
        )


@dataclass(frozen=True)
class KvSample:
    """The KV cache after one step: places for a token, those of all layer groups added up.

    Attributes:
        time_s: when.
        running: sequences that hold places.
        allocated: places held by them; a shared page counts once.
        used: places of these that hold a token.
        reserved: places they would hold if each had its longest possible sequence reserved in one
            piece, as engines without pages do.
    """

    time_s: float
    running: int
    allocated: int
    used: int
    reserved: int


@dataclass(frozen=True)
class KvWaste:
    """Share of the places that hold nothing, the mean over samples.

    Attributes:
        paged: unused of the allocated places.
        contiguous: unused of the places that a reservation of the longest sequence would take.
    """

    paged: float
    contiguous: float

    @classmethod
    def of(cls, samples: Sequence[KvSample]) -> KvWaste | None:
        """Returns the means over samples in which something is held; None without such."""
        held = [s for s in samples if s.allocated > 0 and s.reserved > 0]
        if not held:
            return None
        return cls(
            paged=float(np.mean([1 - s.used / s.allocated for s in held])),
            contiguous=float(np.mean([1 - s.used / s.reserved for s in held])),
        )
