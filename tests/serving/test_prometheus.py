"""The metrics page, read by Prometheus' own parser."""

import asyncio
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from jaxserve.serving.answer import Answer
from jaxserve.serving.fake_service import fake_service
from jaxserve.serving.prometheus import exposition
from jaxserve.serving.request import SamplingParams

LABELS = {"model_name": "fake", "engine": "0"}


async def page_after_requests() -> bytes:
    async with fake_service() as service:
        for _ in range(2):
            params = SamplingParams(max_tokens=5, ignore_eos=True, temperature=0.0)
            request = service.intake.request("x" * 40, params)
            async with await Answer.open(service, request) as answer:
                await answer.completions()
        params = SamplingParams(max_tokens=400, ignore_eos=True)
        async with await Answer.open(service, service.intake.request("y", params)) as answer:
            async for _ in answer:
                break
        while service.engine.busy:
            await asyncio.sleep(0.005)
        return exposition(service)


@pytest.fixture(scope="module")
def samples() -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    page = asyncio.run(page_after_requests()).decode()
    return {
        (sample.name, tuple(sorted((sample.labels or {}).items()))): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }


def value(samples: Any, name: str, **labels: str) -> float:
    return samples[name, tuple(sorted({**LABELS, **labels}.items()))]


@pytest.mark.parametrize("prefix", ["jaxserve_", "vllm:"])
def test_dashboards_find_their_names(samples: Any, prefix: str) -> None:
    def get(name: str, **labels: str) -> float:
        return value(samples, prefix + name, **labels)

    assert get("num_requests_running") == get("num_requests_waiting") == 0
    assert get("kv_cache_usage_perc") == 0
    assert get("prompt_tokens_total") == 40 + 8 + 1
    assert get("generation_tokens_total") >= 10
    assert get("request_success_total", finished_reason="length") == 2
    assert get("request_success_total", finished_reason="abort") == 1
    assert get("num_preemptions_total") == 0
    assert get("prefix_cache_queries_total") == 81
    assert get("prefix_cache_hits_total") == 32
    for name in (
        "time_to_first_token_seconds",
        "e2e_request_latency_seconds",
        "request_queue_time_seconds",
        "request_prefill_time_seconds",
        "request_decode_time_seconds",
        "request_prompt_tokens",
        "request_generation_tokens",
    ):
        assert get(f"{name}_count") >= 2, name
        assert get(f"{name}_bucket", le="+Inf") == get(f"{name}_count")
    assert get("request_prompt_tokens_sum") == 81
    assert get("inter_token_latency_seconds_count") >= 8
    assert get("iteration_tokens_total_count") > 0


def test_our_own_names(samples: Any) -> None:
    assert value(samples, "jaxserve_ready") == 1
    assert value(samples, "jaxserve_compiles_after_ready_total") == 0
    assert value(samples, "jaxserve_engine_restarts_total") == 0
    assert value(samples, "jaxserve_host_gap_seconds_count") > 0
    steps = value(samples, "jaxserve_steps_total")
    assert value(samples, "jaxserve_step_seconds_count", phase="dispatch") == steps
    assert value(samples, "jaxserve_step_seconds_sum", phase="dispatch") > 0
