"""The notebook face, on the embedded model."""

from pathlib import Path

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pytest

import jaxserve as js
from jaxserve.layers.param import Declare
from jaxserve.serving.generation import logits
from jaxserve.serving.intake import DEFAULT_MAX_TOKENS

PROMPTS = ["def add(a, b):\n", "import os", "class Stack:\n    def __init__(self):\n        self."]


@pytest.fixture(scope="module")
def llm() -> js.LLM:
    return js.load("tiny", dtype="float32", show="silent")


def test_greedy_generation_is_the_argmax_of_the_whole_forward(llm: js.LLM) -> None:
    done = llm.generate(PROMPTS[0], max_tokens=12, temperature=0, ignore_eos=True)
    assert llm.tokenizer is not None
    ids = [*llm.tokenizer.encode(PROMPTS[0]), *done.token_ids]
    best = np.asarray(jnp.argmax(llm.logits(ids), axis=-1)).tolist()
    start = done.usage.prompt_tokens
    assert ids[start:] == best[start - 1 : -1]
    assert done.text == llm.tokenizer.decode(done.token_ids)


def test_a_list_gives_a_list_and_each_as_if_alone(llm: js.LLM) -> None:
    together = llm.generate(PROMPTS, max_tokens=10, temperature=0)
    alone = [llm.generate(prompt, max_tokens=10, temperature=0) for prompt in PROMPTS]
    assert together == alone
    assert llm.generate([PROMPTS[0]], max_tokens=10, temperature=0) == [alone[0]]
    assert llm.generate([], max_tokens=10) == []


def test_more_prompts_than_one_batch_holds_all_complete(llm: js.LLM) -> None:
    done = llm.generate(PROMPTS * 12, max_tokens=2, temperature=0)
    assert len(done) == 36
    assert done[:3] == done[33:]


def test_token_ids_are_a_prompt(llm: js.LLM) -> None:
    assert llm.tokenizer is not None
    ids = llm.tokenizer.encode(PROMPTS[1])
    by_text = llm.generate(PROMPTS[1], max_tokens=6, temperature=0)
    assert llm.generate(ids, max_tokens=6, temperature=0) == by_text
    assert llm.generate([ids, ids], max_tokens=6, temperature=0) == [by_text, by_text]


def test_a_stream_gives_the_text_of_generate(llm: js.LLM) -> None:
    stream = llm.stream(PROMPTS[2], max_tokens=20, temperature=0.8, seed=5)
    with pytest.raises(js.UsageError, match="still runs"):
        _ = stream.completion
    pieces = list(stream)
    assert len(pieces) > 3
    whole = llm.generate(PROMPTS[2], max_tokens=20, temperature=0.8, seed=5)
    assert "".join(pieces) == whole.text
    assert stream.completion == whole


def test_leaving_a_loop_over_a_stream_ends_its_request(llm: js.LLM) -> None:
    for _ in llm.stream(PROMPTS[1], max_tokens=200, temperature=0, ignore_eos=True):
        break
    check_idle(llm)
    llm.update(llm.params)  # refused while a request is under way


def test_dropping_a_stream_ends_its_request(llm: js.LLM) -> None:
    stream = llm.stream(PROMPTS[1], max_tokens=200, temperature=0, ignore_eos=True)
    for _ in stream:
        break
    assert llm.engine.busy
    del stream
    check_idle(llm)


def test_closing_a_stream_ends_its_request(llm: js.LLM) -> None:
    with llm.stream(PROMPTS[1], max_tokens=200, temperature=0, ignore_eos=True) as stream:
        read = [next(stream), next(stream)]
        assert llm.engine.busy
    check_idle(llm)
    assert list(stream) == []
    assert stream.completion.finish_reason == "abort"
    assert stream.completion.text.startswith("".join(read))
    stream.close()
    llm.stream(PROMPTS[1]).close()  # was never begun
    check_idle(llm)


def test_a_stream_that_is_closed_in_the_midst_of_a_step_ends_with_the_next(llm: js.LLM) -> None:
    stream = llm.stream(PROMPTS[1], max_tokens=200, temperature=0, ignore_eos=True)
    next(stream)
    llm.engine.after_events = stream.close  # as the garbage collector may
    try:
        llm.engine.step()
    finally:
        llm.engine.after_events = lambda: None
    llm.engine.step()
    check_idle(llm)


def check_idle(llm: js.LLM) -> None:
    """Checks that no request is under way, and none holds pages."""
    assert not llm.engine.busy
    assert not any(llm.engine.metrics.scheduler.pages_held)


def test_n_gives_different_completions_that_the_seed_brings_back(llm: js.LLM) -> None:
    many = llm.generate(PROMPTS[0], n=3, max_tokens=16, temperature=1.0, seed=11)
    assert len({done.text for done in many}) > 1
    assert many == llm.generate(PROMPTS[0], n=3, max_tokens=16, temperature=1.0, seed=11)
    assert many[0] == llm.generate(PROMPTS[0], max_tokens=16, temperature=1.0, seed=11)


def test_a_drawn_seed_is_returned_and_gives_the_completion_again(llm: js.LLM) -> None:
    first = llm.generate(PROMPTS[0], max_tokens=16, temperature=1.0)
    other = llm.generate(PROMPTS[0], max_tokens=16, temperature=1.0)
    assert first.seed != other.seed
    assert llm.generate(PROMPTS[0], max_tokens=16, temperature=1.0, seed=first.seed) == first


def test_one_sampling_per_prompt(llm: js.LLM) -> None:
    sampling = [js.SamplingParams(temperature=0, max_tokens=n) for n in (2, 5, 3)]
    assert [len(d.token_ids) for d in llm.generate(PROMPTS, sampling)] == [2, 5, 3]
    with pytest.raises(js.UsageError, match="3 sampling parameters for 2 prompts"):
        llm.generate(PROMPTS[:2], sampling)
    with pytest.raises(js.UsageError, match="both given"):
        llm.generate(PROMPTS, sampling, max_tokens=3)


def test_a_stop_string_ends_the_text(llm: js.LLM) -> None:
    free = llm.generate(PROMPTS[2], max_tokens=40, temperature=0)
    stop = free.text[5:9]
    done = llm.generate(PROMPTS[2], max_tokens=40, temperature=0, stop=(stop,))
    assert done.finish_reason == "stop"
    assert done.text == free.text[: free.text.index(stop)]


def test_logprobs_are_those_of_the_model(llm: js.LLM) -> None:
    done = llm.generate(PROMPTS[0], max_tokens=4, temperature=0.9, seed=1, logprobs=2)
    assert llm.tokenizer is not None
    assert done.logprobs is not None
    ids = [*llm.tokenizer.encode(PROMPTS[0]), *done.token_ids]
    expected = np.asarray(jax.nn.log_softmax(llm.logits(ids), axis=-1))
    for index, entry in enumerate(done.logprobs):
        row = expected[done.usage.prompt_tokens - 1 + index]
        assert entry.token_id == done.token_ids[index]
        assert entry.logprob == pytest.approx(row[entry.token_id], abs=1e-4)
        assert [t for t, _ in entry.top] == np.argsort(-row)[:2].tolist()


def test_chat_goes_through_the_template(llm: js.LLM) -> None:
    messages = [{"role": "user", "content": "What is a list?"}]
    assert llm.tokenizer is not None
    ids = llm.tokenizer.chat(messages)
    assert llm.chat(messages, max_tokens=6, temperature=0) == llm.generate(
        ids, max_tokens=6, temperature=0
    )


def test_logits_are_differentiable_and_keep_leading_dimensions(llm: js.LLM) -> None:
    ids = [[1, 2, 3], [4, 5, 6]]
    out = llm.logits(ids)
    assert out.shape == (2, 3, llm.config.vocab_size)
    np.testing.assert_allclose(out[1], llm.logits(ids[1]), rtol=1e-4, atol=1e-4)

    def score(params: dict) -> jax.Array:  # pyright: ignore[reportMissingTypeArgument]
        return jnp.sum(logits(llm.runner.program, params, jnp.asarray(ids))[..., 7])

    gradient = jax.grad(score)(llm.params)
    assert float(jnp.abs(gradient["embedding"]["values"]).max()) > 0


def test_programs_are_shared_by_all_prompt_lengths_of_a_bucket() -> None:
    compiled: list[str] = []
    tiny = js.load("tiny-draft", show="silent")
    own = js.LLM(
        tiny.config,
        tiny.params,
        declare=Declare.best("cpu", "bfloat16"),
        on_compile=lambda what, seconds: compiled.append(what),
    )
    own.generate([7] * 3, max_tokens=4, temperature=0)
    assert compiled
    compiled.clear()
    for length in range(1, 17):
        own.generate([length + 20] * length, max_tokens=3, temperature=0)
    assert compiled == []
    own.generate([7] * 17, max_tokens=3, temperature=0)
    assert compiled == ["step: 32 tokens of 2 rows"]


def test_completions_past_a_cache_bucket_go_on(llm: js.LLM) -> None:
    ids = [7, 8, 9]
    done = llm.generate(ids, max_tokens=140, temperature=0, ignore_eos=True)
    assert len(done.token_ids) == 140
    best = np.asarray(jnp.argmax(llm.logits([*ids, *done.token_ids]), axis=-1)).tolist()
    assert list(done.token_ids) == best[2:-1]


def test_bfloat16_mostly_agrees_with_float32(llm: js.LLM) -> None:
    half = js.load("tiny", show="silent")
    assert half.params["embedding"]["values"].dtype == jnp.bfloat16
    assert llm.tokenizer is not None
    text = (Path(js.__file__).parent / "errors.py").read_text()
    ids = llm.tokenizer.encode(text)[:256]
    same = jnp.argmax(llm.logits(ids), -1) == jnp.argmax(half.logits(ids), -1)
    assert float(jnp.mean(same)) >= 0.95


def test_model_defaults_stand_where_the_request_is_silent(llm: js.LLM) -> None:
    assert llm.defaults.temperature is not None
    free = llm.generate(PROMPTS[0], max_tokens=12, seed=3)
    spelt = llm.generate(
        PROMPTS[0],
        max_tokens=12,
        seed=3,
        temperature=llm.defaults.temperature,
        top_p=llm.defaults.top_p,
    )
    assert free == spelt
    assert len(llm.generate(PROMPTS[0], ignore_eos=True, seed=3).token_ids) == DEFAULT_MAX_TOKENS


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"prompts": ""}, js.UsageError, "prompt is empty"),
        ({"prompts": [[]]}, js.UsageError, "prompt is empty"),
        ({"prompts": [5, 99_999]}, js.UsageError, "99999 is outside the vocabulary of 2048"),
        ({"prompts": "a", "temprature": 1}, js.UsageError, "temprature: no such sampling"),
        ({"prompts": "a", "top_p": 0}, js.UsageError, "top_p=0 is out of range"),
        ({"prompts": "a", "n": 2, "temperature": 0}, js.UsageError, "n=2 with temperature 0"),
        ({"prompts": "a", "logit_bias": {5000: 1}}, js.UsageError, "5000 is outside"),
        ({"prompts": [7] * 2048}, js.ContextLengthError, "shorten it to at most 2047"),
        ({"prompts": "a", "min_tokens": 9, "max_tokens": 2}, js.UsageError, "min_tokens=9 exceeds"),
        (
            {"prompts": "a", "min_tokens": 200},
            js.UsageError,
            "min_tokens=200 exceeds max_tokens=128",
        ),
        ({"prompts": [[1.7, 2.9]]}, js.UsageError, "integers"),
        ({"prompts": 5}, js.UsageError, "prompts is text"),
        ({"prompts": "a", "sampling": {"temperature": 0}}, js.UsageError, "no SamplingParams"),
        ({"prompts": [7] * 40, "max_tokens": 2020}, js.ContextLengthError, "max_tokens up to 2008"),
    ],
)
def test_bad_requests_are_refused_with_value_and_limit(
    llm: js.LLM,
    call: dict,
    error: type[Exception],
    message: str,  # pyright: ignore[reportMissingTypeArgument]
) -> None:
    with pytest.raises(error, match=message):
        llm.generate(**call)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float16"}, "dtype='float16' is not supported"),
        ({"backend": "cuda"}, "backend='cuda'"),
        ({"model": "no-such-model"}, "'no-such-model' is not a model"),
    ],
)
def test_bad_load_options_are_refused(options: dict, message: str) -> None:  # pyright: ignore[reportMissingTypeArgument]
    with pytest.raises(js.JaxserveError, match=message):
        js.load(**{"model": "tiny", "show": "silent", **options})


@pytest.mark.parametrize("ids", [[], 3, [1.5], [[1], [1, 2]], ["a"], [2**40]])
def test_logits_of_what_is_no_token_ids_are_refused(llm: js.LLM, ids: object) -> None:
    with pytest.raises(js.UsageError, match="token id"):
        llm.logits(ids)


def test_params_of_another_storage_are_refused_at_construction(llm: js.LLM) -> None:
    with pytest.raises(js.UsageError, match="expected"):
        js.LLM(llm.config, llm.params, declare=Declare("float32", fuse=False))


def test_the_reference_backend_gives_the_same_tokens(llm: js.LLM) -> None:
    other = js.load("tiny", dtype="float32", backend="reference", show="silent")
    assert other.generate(PROMPTS[0], max_tokens=8, temperature=0) == llm.generate(
        PROMPTS[0], max_tokens=8, temperature=0
    )


def test_a_completion_round_trips_through_json(llm: js.LLM) -> None:
    done = llm.generate(PROMPTS[0], max_tokens=3, temperature=0, logprobs=1)
    assert msgspec.json.decode(msgspec.json.encode(done), type=js.Completion) == done
