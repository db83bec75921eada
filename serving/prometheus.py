"""The metrics page, in Prometheus' text format.

    Response(exposition(service), media_type=CONTENT_TYPE)

Names begin with `jaxserve_`. Those that dashboards of vLLM read are there a second time under its
names, so that such a dashboard works as it is. `docs/serving.md` lists them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import NamedTuple

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from jaxserve.serving.metrics import HistogramSnapshot, MetricsSnapshot
from jaxserve.serving.service import Service, State

CONTENT_TYPE = CONTENT_TYPE_LATEST

OURS, THEIRS = "jaxserve", "vllm"
_LABELS = ("model_name", "engine")


class _Name(NamedTuple):
    """A metric's name without prefix and suffix, and what it says."""

    name: str
    text: str
    aliased: bool = True


_GAUGES = {
    "running": _Name("num_requests_running", "Sequences with a slot."),
    "waiting": _Name("num_requests_waiting", "Requests that wait for a slot."),
    "waiting_tokens": _Name("waiting_tokens", "Prompt tokens that wait.", False),
    "pages": _Name("kv_pages", "Pages of keys and values.", False),
    "pages_held": _Name("kv_pages_held", "Pages of running sequences.", False),
    "pages_cached": _Name("kv_pages_cached", "Pages of the prefix cache alone.", False),
    "tokens_per_s": _Name("tokens_per_second", "Tokens given out, over 5 seconds.", False),
    "expected_wait_s": _Name("expected_wait_seconds", "Wait of a request that comes now.", False),
}
_COUNTERS = {
    "prompt_tokens": _Name("prompt_tokens", "Prompt tokens read in."),
    "generated_tokens": _Name("generation_tokens", "Tokens given out."),
    "preemptions": _Name("num_preemptions", "Sequences that lost their slot for a while."),
    "prefix_query_tokens": _Name("prefix_cache_queries", "Tokens looked up in the prefix cache."),
    "prefix_hit_tokens": _Name("prefix_cache_hits", "Tokens found there."),
    "requests": _Name("requests", "Requests admitted.", False),
    "steps": _Name("steps", "Steps of the engine.", False),
    "failures": _Name("step_failures", "Steps that failed.", False),
    "compiles_after_ready": _Name("compiles_after_ready", "Programs compiled late.", False),
    "engine_restarts": _Name("engine_restarts", "Engines started in place of lost ones.", False),
}
_HISTOGRAMS = {
    "time_to_first_token": _Name("time_to_first_token_seconds", "Until the first token."),
    "inter_token_latency": _Name("inter_token_latency_seconds", "From token to token."),
    "e2e_latency": _Name("e2e_request_latency_seconds", "Until the last token."),
    "queue_time": _Name("request_queue_time_seconds", "Until a slot was free."),
    "prefill_time": _Name("request_prefill_time_seconds", "From the slot to the first token."),
    "decode_time": _Name("request_decode_time_seconds", "From the first token to the last."),
    "prompt_tokens": _Name("request_prompt_tokens", "Tokens of a prompt."),
    "generation_tokens": _Name("request_generation_tokens", "Tokens generated for a request."),
    "iteration_tokens": _Name("iteration_tokens_total", "Tokens of a step."),
    "host_gap": _Name("host_gap_seconds", "How long the device waited for the next step.", False),
}


def exposition(service: Service) -> bytes:
    """Returns the page of a service at this moment."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Page(service))
    return generate_latest(registry)


class _Page(Collector):
    """Turns a snapshot into metric families."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._labels = (service.card.name, "0")

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        """Yields the families."""
        found = self._service.metrics()
        ready = self._service.state is State.READY
        yield self._gauge(f"{OURS}_ready", "Whether requests are taken.", float(ready))
        yield from self._gauges(found)
        for key, name in _COUNTERS.items():
            for prefix in _prefixes(name):
                family = CounterMetricFamily(f"{prefix}{name.name}", name.text, labels=_LABELS)
                family.add_metric(self._labels, found.counters.get(key, 0.0))
                yield family
        yield from self._finished(found.finished)
        for key, name in _HISTOGRAMS.items():
            if key in found.histograms:
                for prefix in _prefixes(name):
                    yield self._histogram(f"{prefix}{name.name}", name, found.histograms[key])
        yield from self._phases(found)

    def _gauges(self, found: MetricsSnapshot) -> Iterator[Metric]:
        for key, name in _GAUGES.items():
            for prefix in _prefixes(name):
                yield self._gauge(f"{prefix}{name.name}", name.text, found.gauges.get(key, 0.0))
        usage = _Name("kv_cache_usage_perc", "Share of the pages that are held, 0 to 1.")
        pages, held = found.gauges.get("pages", 0.0), found.gauges.get("pages_held", 0.0)
        for prefix in _prefixes(usage):
            yield self._gauge(f"{prefix}{usage.name}", usage.text, held / pages if pages else 0.0)

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=_LABELS)
        family.add_metric(self._labels, value)
        return family

    def _finished(self, finished: Mapping[str, int]) -> Iterator[Metric]:
        name = _Name("request_success", "Completions by how they ended.")
        for prefix in _prefixes(name):
            labels = (*_LABELS, "finished_reason")
            family = CounterMetricFamily(f"{prefix}{name.name}", name.text, labels=labels)
            for reason in ("stop", "length", "abort", "error"):
                family.add_metric((*self._labels, reason), finished.get(reason, 0))
            yield family

    def _histogram(self, full_name: str, name: _Name, values: HistogramSnapshot) -> Metric:
        family = HistogramMetricFamily(full_name, name.text, labels=_LABELS)
        bounds = [*map(str, map(float, values.bounds)), "+Inf"]
        buckets = list(zip(bounds, map(float, accumulate(values.counts)), strict=True))
        family.add_metric(self._labels, buckets, values.total)
        return family

    def _phases(self, found: MetricsSnapshot) -> Iterator[Metric]:
        labels = (*_LABELS, "phase")
        steps = SummaryMetricFamily(
            f"{OURS}_step_seconds", "Time of the engine's loop by phase, per step.", labels=labels
        )
        for phase, seconds in found.phase_seconds.items():
            steps.add_metric((*self._labels, phase), int(found.counters.get("steps", 0)), seconds)
        yield steps
        start = GaugeMetricFamily(
            f"{OURS}_startup_seconds", "Time of the start by phase.", labels=labels
        )
        for phase, seconds in found.startup_seconds.items():
            start.add_metric((*self._labels, phase), seconds)
        yield start


def _prefixes(name: _Name) -> tuple[str, ...]:
    return (f"{OURS}_", f"{THEIRS}:") if name.aliased else (f"{OURS}_",)
