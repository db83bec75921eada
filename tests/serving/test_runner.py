"""The runner under a real model: no compilation after ready, weights, failures, scores."""

import random
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from jaxserve.api import LLM
from jaxserve.benchmark.compiles import CompileCount
from jaxserve.errors import UsageError
from jaxserve.layers.decoder import Params
from jaxserve.serving.build import ModelEngine
from jaxserve.serving.generation import Program
from jaxserve.serving.options import EngineOptions
from jaxserve.serving.request import Request, SamplingParams, TokenEvent
from jaxserve.serving.runner import Ticket

from .conftest import VOCAB

pytestmark = pytest.mark.usefixtures("compile_fast")

STEPS = 10_000
SMALL = 16_000
"""Bytes of keys and values: one sequence of full context, or a few short ones."""

OPTIONS = EngineOptions(max_sequences=4, max_step_tokens=16, page_size=8, kv_bytes=SMALL)


@pytest.fixture(scope="module")
def llm(program: Program, params: Params) -> LLM:
    return LLM(program.model.config, params, declare=program.model.declare, engine=OPTIONS)


def random_request(number: int, rng: random.Random) -> Request:
    """Returns a request that may use any part of the engine."""
    start = (7,) * 24 if rng.random() < 0.4 else ()  # a beginning that some share
    prompt = start + tuple(rng.randrange(VOCAB) for _ in range(rng.randrange(1, 50)))
    fields: dict[str, Any] = {"max_tokens": rng.randrange(1, 50), "seed": number}
    fields["temperature"] = rng.choice([0.0, 1.0])
    for name, value in {
        "top_k": 5,
        "top_p": 0.8,
        "frequency_penalty": 0.5,
        "logit_bias": {3: 2.0},
        "min_tokens": 1,
        "logprobs": 3,
        "prompt_logprobs": 2,
        "n": 2,
    }.items():
        if rng.random() < 0.15:
            fields[name] = value
    if "n" in fields:
        fields["temperature"] = 1.0
    beams = rng.random() < 0.1
    if beams:
        fields = {"max_tokens": 8, "seed": number, "temperature": 0.0}
    return Request(
        id=str(number),
        prompt=prompt,
        params=SamplingParams(**fields).resolved({}),
        stop_ids=(rng.randrange(VOCAB),) if rng.random() < 0.2 else (),
        bad_word_ids=((1, 2), (5,)) if rng.random() < 0.1 else (),
        beam_width=2 if beams else 1,
    )


def serve(made: ModelEngine, steps: int, rng: random.Random) -> list[TokenEvent]:
    """Returns the events of random requests, some of them aborted, over so many steps."""
    events: list[TokenEvent] = []
    waiting: set[str] = set()
    number = 0

    def sink(event: TokenEvent) -> None:
        events.append(event)
        if event.finish_reason is not None:
            waiting.discard(event.request_id)

    until = made.engine.metrics.steps + steps
    while made.engine.metrics.steps < until:
        while len(waiting) < 7:
            request = random_request(number, rng)
            waiting.add(request.id)
            made.engine.submit(request, sink)
            number += 1
        for _ in range(50):
            made.engine.step()
        if rng.random() < 0.3 and waiting:
            made.engine.abort(rng.choice(sorted(waiting)))
    while made.engine.step():
        pass
    return events


def test_nothing_is_compiled_after_the_warm_up(program: Program, params: Params) -> None:
    options = EngineOptions(
        max_sequences=4, max_step_tokens=16, page_size=8, kv_bytes=SMALL, strict=True
    )
    made = ModelEngine.create(program, params, options)
    done: list[int] = []
    made.runner.warm_up(done.append)
    assert sum(done) == made.runner.num_executables == len(made.runner.executables())
    serve(made, 20, random.Random(1))  # conversions of the first arrays
    with CompileCount() as compiles:
        events = serve(made, STEPS, random.Random(0))
    assert compiles.total == 0
    assert made.runner.compiles_after_ready == 0
    metrics = made.engine.metrics
    assert metrics.steps >= STEPS
    assert metrics.failures == 0
    # Everything that could need a program of its own happened.
    assert metrics.scheduler.preemptions > 0
    assert metrics.scheduler.prefix_hit_tokens > 0
    assert metrics.finished["abort"] > 0
    assert any(event.logprobs for event in events)
    assert any(event.prompt_logprobs for event in events)
    assert any(event.sample_index > 0 for event in events)


def test_a_host_that_is_slower_than_the_device_shows_as_a_gap(
    program: Program, params: Params
) -> None:
    pause_s = 0.02
    made = ModelEngine.create(program, params, EngineOptions(max_sequences=2, kv_bytes=1 << 20))
    neutral = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "min_tokens": 0}
    asked = SamplingParams.create(seed=0, max_tokens=30, repetition_penalty=1.0, **neutral)

    def gap(sink: Callable[[TokenEvent], None]) -> float:
        count = made.engine.metrics.host_gap_seconds.count
        made.engine.submit(Request(id="r", prompt=(1, 2), params=asked, stop_ids=()), sink)
        while made.engine.step():
            pass
        assert made.engine.metrics.host_gap_seconds.count > count
        return made.engine.metrics.host_gap_seconds.p50

    gap(lambda event: None)  # compiles
    # Three of four steps come after a pause that one step's work cannot fill.
    found = [gap(lambda event: time.sleep(pause_s)) for _ in range(3)]
    assert pause_s / 2 < found[-1] < 10 * pause_s


def test_a_step_that_is_done_at_the_first_look_was_not_done_before_it_began(
    program: Program, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ticket, "look", lambda self: True)
    made = ModelEngine.create(program, params, OPTIONS)
    answers(made, plain_request(max_tokens=4))
    # A clock's whole time, which is that since the machine started, would show.
    assert made.engine.metrics.host_gap_seconds.count > 0
    assert made.engine.metrics.host_gap_seconds.p99 < 60


def test_a_late_compilation_is_counted_or_refused(program: Program, params: Params) -> None:
    for strict in (False, True):
        options = EngineOptions(
            max_sequences=4, max_step_tokens=16, page_size=8, kv_bytes=SMALL, strict=strict
        )
        made = ModelEngine.create(program, params, options)
        made.runner._ready = True
        events = answers(made, plain_request(max_tokens=1))
        assert made.runner.compiles_after_ready > 0
        assert (events[-1].finish_reason == "error") == strict
        assert not strict or "not compiled before" in str(events[-1].error)


def test_other_weights_are_taken_without_compiling(llm: LLM, params: Params) -> None:
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    first = llm.generate(prompt, max_tokens=8, temperature=0)
    other = jax.tree.map(lambda x: -x, params)
    with CompileCount() as compiles:
        llm.update(other)
        changed = llm.generate(prompt, max_tokens=8, temperature=0)
        llm.update(params)
        again = llm.generate(prompt, max_tokens=8, temperature=0)
    assert compiles.total == 0
    assert changed.token_ids != first.token_ids
    assert again == first  # also its cached tokens: those of the other weights were forgotten
    with pytest.raises(UsageError):
        llm.update(jax.tree.map(lambda x: x[:1], params))


def test_serving_goes_on_after_a_step_that_failed(
    program: Program, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = ModelEngine.create(program, params, OPTIONS)
    request = plain_request(max_tokens=9)
    before = answers(made, request)
    dispatch = made.runner.dispatch
    calls: list[int] = []

    def failing(plan: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            jax.tree.map(lambda x: x.delete(), made.runner._arrays)  # as when a donation is lost
            raise RuntimeError("device lost")
        return dispatch(plan)

    monkeypatch.setattr(made.runner, "dispatch", failing)
    failed = answers(made, request)
    assert failed[-1].finish_reason == "error"
    assert "device lost" in str(failed[-1].error)
    assert tokens_of(answers(made, request)) == tokens_of(before)


def plain_request(max_tokens: int) -> Request:
    params = SamplingParams(max_tokens=max_tokens, temperature=0, seed=0).resolved({})
    return Request(id="one", prompt=(5, 3, 8, 1), params=params)


def answers(made: ModelEngine, request: Request) -> list[TokenEvent]:
    """Returns all events of one request."""
    events: list[TokenEvent] = []
    made.engine.submit(request, events.append)
    while made.engine.step():
        pass
    return events


def tokens_of(events: list[TokenEvent]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for event in events:
        found.setdefault(event.sample_index, []).extend(event.token_ids)
    return found


@pytest.fixture(scope="module")
def expected(llm: LLM) -> Callable[[list[int]], np.ndarray]:
    """Returns a function from tokens to float64[T, V] log-probabilities after each."""

    def run(tokens: list[int]) -> np.ndarray:
        scores = np.asarray(llm.logits(tokens), np.float64)
        return scores - np.log(np.exp(scores).sum(-1, keepdims=True))

    return run


def test_logprobs_are_those_of_the_whole_forward(llm: LLM, expected: Any) -> None:
    # The prompt is longer than a step, so it comes in chunks, beside another request.
    prompt = [(7 * i * i + 3) % VOCAB for i in range(37)]
    fields: Any = {"max_tokens": 5, "temperature": 0.7, "seed": 1, "ignore_eos": True}
    sampling = [
        SamplingParams(**fields, logprobs=4, prompt_logprobs=3),
        SamplingParams(**fields),
    ]
    done, other = llm.generate([prompt, prompt[5:]], sampling)
    assert other.logprobs is None
    wanted = expected([*prompt, *done.token_ids])
    assert done.prompt_logprobs[0] is None
    pairs = zip(done.prompt_logprobs[1:], prompt[1:], wanted, strict=False)
    for found, token, scores in pairs:
        assert found.token_id == token
        check(found, scores, 3)
    for found, token, scores in zip(done.logprobs, done.token_ids, wanted[36:], strict=False):
        assert found.token_id == token
        check(found, scores, 4)


def check(found: Any, scores: np.ndarray, count: int) -> None:
    assert found.logprob == pytest.approx(scores[found.token_id], abs=2e-4)
    best = np.argsort(-scores)[:count]
    assert [token for token, _ in found.top] == best.tolist()
    np.testing.assert_allclose([value for _, value in found.top], scores[best], atol=2e-4)
