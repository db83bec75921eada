"""The synthetic trace: lengths, arrivals, and what its seed fixes."""

import dataclasses

import numpy as np
import pytest

from jaxserve.benchmark.trace import (
    FIRST_ID,
    MIN_PROMPT_TOKENS,
    SHAREGPT_OUTPUT,
    SHAREGPT_PROMPT,
    TraceSpec,
    make_trace,
)
from jaxserve.errors import UsageError

SPEC = TraceSpec(requests=50, seed=7, vocab_size=2048, context=2048, rate=4.0)


def test_spreads_are_those_of_the_published_quantiles():
    # ln(5696 / 1730) = 1.19167, ln(834 / 415) = 0.69798, over z90 = 1.28155
    assert SHAREGPT_PROMPT.sigma == pytest.approx(0.92986, abs=1e-4)
    assert SHAREGPT_OUTPUT.sigma == pytest.approx(0.54464, abs=1e-4)


@pytest.mark.parametrize("lengths", [SHAREGPT_PROMPT, SHAREGPT_OUTPUT])
def test_many_draws_have_the_published_mean_and_ratio_of_quantiles(lengths):
    drawn = lengths.draw(np.random.default_rng(0), 200_000, scale=1.0)
    assert drawn.mean() == pytest.approx(lengths.mean, rel=0.02)
    p50, p90 = np.percentile(drawn, (50, 90))
    assert p90 / p50 == pytest.approx(lengths.p90 / lengths.median, rel=0.02)


def test_scale_multiplies_every_length():
    whole = SHAREGPT_OUTPUT.draw(np.random.default_rng(0), 20, scale=1.0)
    half = SHAREGPT_OUTPUT.draw(np.random.default_rng(0), 20, scale=0.5)
    assert half == pytest.approx(whole / 2)


def test_the_seed_fixes_the_trace():
    assert make_trace(SPEC) == make_trace(SPEC)
    other = make_trace(dataclasses.replace(SPEC, seed=8))
    assert [r.prompt for r in other] != [r.prompt for r in make_trace(SPEC)]


def test_another_rate_changes_arrivals_alone():
    slow = make_trace(dataclasses.replace(SPEC, rate=1.0))
    fast = make_trace(SPEC)
    assert [(r.prompt, r.output_tokens) for r in slow] == [
        (r.prompt, r.output_tokens) for r in fast
    ]
    assert [r.due_s for r in slow] == pytest.approx([4 * r.due_s for r in fast])


def test_without_a_rate_all_requests_are_due_at_once():
    trace = make_trace(dataclasses.replace(SPEC, rate=None))
    assert {request.due_s for request in trace} == {0.0}


def test_arrivals_are_a_poisson_process():
    trace = make_trace(dataclasses.replace(SPEC, requests=4001, context=8))
    gaps = np.diff([request.due_s for request in trace])
    assert trace[0].due_s == 0.0
    assert gaps.min() >= 0
    assert gaps.mean() == pytest.approx(1 / 4, rel=0.05)
    assert gaps.std() == pytest.approx(1 / 4, rel=0.05)  # as the mean: exponential


def test_lengths_that_are_given_are_everybodys():
    spec = dataclasses.replace(SPEC, prompt_tokens=300, output_tokens=20)
    assert {(len(r.prompt), r.output_tokens) for r in make_trace(spec)} == {(300, 20)}
    # The others, and all tokens and times, are still drawn.
    spec = dataclasses.replace(SPEC, output_tokens=20)
    found, drawn = make_trace(spec), make_trace(SPEC)
    assert {r.output_tokens for r in found} == {20}
    assert [(r.prompt, r.due_s) for r in found] == [(r.prompt, r.due_s) for r in drawn]


def test_a_short_context_clips_prompt_and_output():
    trace = make_trace(dataclasses.replace(SPEC, requests=500, context=100))
    prompts = [len(request.prompt) for request in trace]
    assert min(prompts) >= MIN_PROMPT_TOKENS
    assert max(prompts) == 50
    assert all(len(r.prompt) + r.output_tokens <= 100 for r in trace)
    assert any(len(r.prompt) + r.output_tokens == 100 for r in trace)
    assert min(request.output_tokens for request in trace) >= 1


def test_no_two_prompts_share_a_page():
    trace = make_trace(dataclasses.replace(SPEC, requests=300))
    assert len({request.prompt[:MIN_PROMPT_TOKENS] for request in trace}) == 300


def test_another_variant_has_other_tokens_and_nothing_else_differs():
    first, second = (make_trace(dataclasses.replace(SPEC, variant=v)) for v in (0, 1))
    for one, other in zip(first, second, strict=True):
        assert one.prompt != other.prompt
        assert dataclasses.replace(one, prompt=()) == dataclasses.replace(other, prompt=())
        assert len(one.prompt) == len(other.prompt)


def test_ids_are_of_the_vocabulary_and_none_is_special():
    trace = make_trace(dataclasses.replace(SPEC, vocab_size=FIRST_ID + 2))
    assert {i for request in trace for i in request.prompt} == {FIRST_ID, FIRST_ID + 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"requests": 0}, "requests=0 .* >= 1"),
        ({"seed": -1}, "seed=-1 .* >= 0"),
        ({"variant": -1}, "variant=-1 .* >= 0"),
        ({"rate": 0.0}, "rate=0.0 .* above 0"),
        ({"rate": float("inf")}, "rate=inf .* left out"),
        ({"scale": 0.0}, "scale=0.0 .* above 0"),
        ({"vocab_size": 3}, "vocab_size=3 .* >= 4"),
        ({"context": 7}, "context=7 .* >= 8"),
        ({"prompt_tokens": 2000, "output_tokens": 49}, "together at most context=2048"),
        ({"prompt_tokens": 0}, "prompt_tokens=0 .* at least 1"),
    ],
)
def test_what_makes_no_trace_is_refused(change, message):
    with pytest.raises(UsageError, match=message):
        dataclasses.replace(SPEC, **change)
