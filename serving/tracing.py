"""OpenTelemetry traces, an extra: one span a request, with its wait, prefill and decode.

    set_up("http://collector:4318/v1/traces", "tiny")    # needs jaxserve[otel]
    with parent(headers["traceparent"]): ...             # the caller's own span

Without `set_up` nothing of OpenTelemetry is imported and nothing costs anything. Spans hold counts
and times, never prompts or completions.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from jaxserve.errors import ConfigError
from jaxserve.serving.request import Request, RequestTimes

_traceparent: ContextVar[str | None] = ContextVar("traceparent", default=None)


class _State:
    """What `set_up` made; it alone writes it, before requests come."""

    tracer: Any = None
    provider: Any = None


def set_up(endpoint: str, model_name: str, processor: Any = None) -> None:
    """Sends a span of every request to an OTLP/HTTP address.

    Args:
        processor: takes the spans instead, for tests.

    Raises:
        ConfigError: OpenTelemetry is not installed.
    """
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider

        processor = processor or _exporter(endpoint)
    except ImportError as error:
        raise ConfigError("traces need OpenTelemetry; install jaxserve[otel]") from error
    resource = Resource.create({"service.name": "jaxserve", "gen_ai.request.model": model_name})
    _State.provider = TracerProvider(resource=resource)
    _State.provider.add_span_processor(processor)
    _State.tracer = _State.provider.get_tracer("jaxserve")


def _exporter(endpoint: str) -> Any:
    """Returns what sends spans to an address, in batches."""
    from opentelemetry.exporter.otlp.proto.http import (  # pyright: ignore[reportMissingImports]
        trace_exporter,
    )
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    return BatchSpanProcessor(trace_exporter.OTLPSpanExporter(endpoint=endpoint))


def shut_down() -> None:
    """Sends what is left."""
    if _State.provider is not None:
        _State.provider.shutdown()
    _State.tracer = _State.provider = None


@contextmanager
def parent(traceparent: str) -> Iterator[None]:
    """Makes requests of the block children of the span that a `traceparent` header names."""
    token = _traceparent.set(traceparent or None)
    try:
        yield
    finally:
        _traceparent.reset(token)


class RequestSpan:
    """The span of one request, from its admission to its end."""

    def __init__(self, request: Request) -> None:
        self._tracer = _State.tracer
        if self._tracer is None:
            return
        self._began_ns = time.time_ns()
        self._span = self._tracer.start_span(
            "generate",
            context=_context(),
            start_time=self._began_ns,
            attributes={
                "gen_ai.request.id": request.id,
                "gen_ai.request.max_tokens": request.params.max_tokens or 0,
                "gen_ai.request.temperature": request.params.temperature or 0.0,
                "gen_ai.usage.input_tokens": len(request.prompt),
                "jaxserve.samples": request.params.n,
            },
        )

    def end(
        self, num_tokens: int, times: RequestTimes | None, error: BaseException | None = None
    ) -> None:
        """Ends the span, with those of its phases inside."""
        if self._tracer is None:
            return
        from opentelemetry.trace import Status, StatusCode, set_span_in_context

        now_ns = time.time_ns()
        if times is not None:
            inside, at = set_span_in_context(self._span), self._began_ns
            for name in ("queue", "prefill", "decode"):
                until = min(now_ns, at + int(getattr(times, f"{name}_s") * 1e9))
                child = self._tracer.start_span(name, context=inside, start_time=at)
                child.end(end_time=until)
                at = until
        self._span.set_attribute("gen_ai.usage.output_tokens", num_tokens)
        if error is not None:
            self._span.set_status(Status(StatusCode.ERROR, type(error).__name__))
        self._span.end(end_time=now_ns)


def _context() -> Any:
    """Returns the caller's span, if a header names one."""
    header = _traceparent.get()
    if header is None:
        return None
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({"traceparent": header})
