"""Spans of requests, where OpenTelemetry is installed."""

import asyncio
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from jaxserve.errors import ConfigError
from jaxserve.serving import tracing
from jaxserve.serving.answer import Answer
from jaxserve.serving.fake_service import fake_service
from jaxserve.serving.request import SamplingParams

export = pytest.importorskip("opentelemetry.sdk.trace.export", reason="OpenTelemetry is missing")
memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def spans() -> Iterator[Any]:
    found = memory.InMemorySpanExporter()
    tracing.set_up("", "fake", export.SimpleSpanProcessor(found))
    yield found
    tracing.shut_down()


def test_a_request_is_a_span_of_its_caller_with_its_phases_inside(spans: Any) -> None:
    async def work() -> None:
        async with fake_service(step_s=0.01) as service:
            params = SamplingParams(max_tokens=5, ignore_eos=True, temperature=0.0)
            request = service.intake.request("a secret", params, id="r1")
            with tracing.parent(f"00-{TRACE}-{SPAN}-01"):
                answer = await Answer.open(service, request)
            async with answer:
                await answer.completions()

    asyncio.run(work())
    by_name = {span.name: span for span in spans.get_finished_spans()}
    assert set(by_name) == {"generate", "queue", "prefill", "decode"}
    whole = by_name["generate"]
    assert f"{whole.context.trace_id:032x}" == TRACE
    assert f"{whole.parent.span_id:016x}" == SPAN
    assert whole.attributes["gen_ai.usage.input_tokens"] == 8
    assert whole.attributes["gen_ai.usage.output_tokens"] == 5
    assert by_name["decode"].end_time - by_name["decode"].start_time > 3e7
    assert by_name["decode"].end_time <= whole.end_time
    assert all(by_name[n].parent.span_id == whole.context.span_id for n in ("queue", "decode"))
    assert "secret" not in str(whole.to_json())


def test_without_a_header_a_request_begins_a_trace(spans: Any) -> None:
    async def work() -> None:
        async with fake_service() as service:
            request = service.intake.request("abc", SamplingParams(max_tokens=500, seed=1))
            async with await Answer.open(service, request):
                pass  # leaves at once

    asyncio.run(work())
    (span,) = [span for span in spans.get_finished_spans() if span.name == "generate"]
    assert span.parent is None


def test_without_the_exporter_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http", None)
    with pytest.raises(ConfigError, match=r"install jaxserve\[otel\]"):
        tracing.set_up("http://localhost:4318/v1/traces", "fake")
