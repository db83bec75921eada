"""Messages are valid by construction and say what is wrong with them."""

import re
from typing import Any

import msgspec
import pytest

from jaxserve.errors import UsageError
from jaxserve.serving.request import Completion, SamplingParams, TokenLogprob, Usage

LIMITS = {
    "n": ("a whole number from 1 to 128", [1, 128], [0, 129, 1.0, True, None, "2"]),
    "temperature": ("from 0 to 2", [0, 2.0, None], [-0.1, 2.1, float("nan"), "hot", True]),
    "top_k": ("0 (off) or a whole number >= 1", [0, 1, None], [-1, 1.5]),
    "top_p": ("above 0, at most 1", [1e-9, 1, None], [0, 1.01, float("nan")]),
    "min_p": ("from 0 to 1", [0, 1, None], [-0.1, 1.1]),
    "repetition_penalty": ("from 1e-6 to 1e6", [0.1, 3, None], [0, -1, 1e-7, float("inf")]),
    "presence_penalty": ("from -2 to 2", [-2, 2], [-2.1, 2.1, None]),
    "frequency_penalty": ("from -2 to 2", [-2, 2], [-2.1, 2.1, None]),
    "seed": ("an int64", [-(2**63), 2**63 - 1, None], [-(2**63) - 1, 2**63, 1.0]),
    "max_tokens": ("a whole number >= 1", [1, None], [0, 1.5]),
    "min_tokens": ("a whole number >= 0", [0, None], [-1]),
    "logprobs": ("a whole number from 0 to 20", [0, 20, None], [-1, 21, True]),
}


@pytest.mark.parametrize("name", LIMITS)
def test_values_within_the_limits_are_kept(name: str) -> None:
    for value in LIMITS[name][1]:
        assert getattr(SamplingParams.create(**{name: value}), name) == value


@pytest.mark.parametrize("name", LIMITS)
def test_values_outside_are_refused_with_value_and_limit(name: str) -> None:
    allowed, _, refused = LIMITS[name]
    for value in refused:
        message = f"{name}={value!r} is out of range; it must be {allowed}"
        with pytest.raises(UsageError, match=f"^{re.escape(message)}$"):
            SamplingParams.create(**{name: value})


@pytest.mark.parametrize(
    "name", ["ignore_eos", "include_stop_str_in_output", "skip_special_tokens"]
)
def test_a_switch_is_true_or_false(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name}='no' is not a switch; use True or False"):
        SamplingParams.create(**{name: "no"})


def test_an_unknown_keyword_is_named_beside_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"^top_l, sed: no such .*; use n, temperature, top_k,"):
        SamplingParams.create(top_l=3, seed=1, sed=2)


def test_create_takes_every_field() -> None:
    assert SamplingParams.create(top_k=3, stop="x") == SamplingParams(top_k=3, stop=("x",))


@pytest.mark.parametrize("stop", ["end", ["end"], ("end",)])
def test_stop_strings_become_a_tuple(stop: Any) -> None:
    assert SamplingParams(stop=stop).stop == ("end",)


def test_stop_token_ids_become_a_tuple() -> None:
    assert SamplingParams.create(stop_token_ids=[3, 0]).stop_token_ids == (3, 0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stop": ["a"] * 17}, "stop has 17 strings; at most 16 are allowed"),
        ({"stop": ["a", ""]}, r"stop=\['a', ''\] must hold strings of at least one character"),
        ({"stop": ""}, "stop='' must hold strings of at least one character"),
        ({"stop": [3]}, r"stop=\[3\] must hold strings"),
        ({"stop": 3}, "stop=3 must be a list"),
        ({"stop_token_ids": [1, -1]}, r"stop_token_ids=\[1, -1\] must hold token ids"),
        ({"stop_token_ids": 7}, "stop_token_ids=7 must be a list"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias holds -1: 1.0; it maps token ids"),
        ({"logit_bias": {"a": 1.0}}, "logit_bias holds 'a': 1.0; it maps token ids"),
        ({"logit_bias": {1: "a"}}, "logit_bias holds 1: 'a'; it maps token ids"),
        ({"logit_bias": {1: float("nan")}}, "logit_bias holds 1: nan; it maps token ids"),
        ({"logit_bias": [1]}, r"logit_bias=\[1\] must map token ids to numbers"),
    ],
)
def test_malformed_collections_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=f"^{message}"):
        SamplingParams(**fields)


def test_logit_bias_is_clamped() -> None:
    params = SamplingParams(logit_bias={1: 1000, 2: -1000, 3: 0.5, 4: float("inf")})
    assert params.logit_bias == {1: 100.0, 2: -100.0, 3: 0.5, 4: 100.0}


def test_several_greedy_completions_are_refused() -> None:
    with pytest.raises(UsageError, match=r"n=2 with temperature 0 gives 2 equal completions"):
        SamplingParams(n=2, temperature=0)
    undecided = SamplingParams(n=2)
    with pytest.raises(UsageError, match="n=2 with temperature 0"):
        undecided.resolved({"temperature": 0.0})


@pytest.mark.parametrize(
    ("temperature", "greedy"), [(None, False), (0, True), (0.9e-5, True), (1e-5, False), (1, False)]
)
def test_a_temperature_near_zero_is_greedy(temperature: float | None, greedy: bool) -> None:
    assert SamplingParams(temperature=temperature).greedy is greedy


def test_fields_resolve_to_the_request_then_the_model_then_neutral() -> None:
    asked = SamplingParams(temperature=0.3, top_k=0)
    resolved = asked.resolved({"temperature": 0.7, "top_k": 50, "top_p": 0.9, "max_tokens": 9})
    assert (resolved.temperature, resolved.top_k) == (0.3, 0)
    assert (resolved.top_p, resolved.max_tokens) == (0.9, 9)
    assert (resolved.min_p, resolved.repetition_penalty, resolved.min_tokens) == (0.0, 1.0, 0)
    assert asked.top_p is None


def test_without_defaults_sampling_is_neutral() -> None:
    resolved = SamplingParams().resolved({})
    assert (resolved.temperature, resolved.top_k, resolved.top_p) == (1.0, 0, 1.0)
    assert resolved.max_tokens is None
    assert resolved.seed is None


def test_the_defaults_of_a_model_are_checked_too() -> None:
    with pytest.raises(UsageError, match=r"top_p=1\.5 is out of range"):
        SamplingParams().resolved({"top_p": 1.5})


@pytest.mark.parametrize("message", [SamplingParams(seed=3), TokenLogprob(1, -0.5)])
def test_messages_are_frozen(message: Any) -> None:
    with pytest.raises(AttributeError, match="immutable"):
        message.seed = message.logprob = 4


def test_parameters_survive_the_wire() -> None:
    params = SamplingParams(
        temperature=0.5, logit_bias={3: -1.5}, stop=("a", "b"), stop_token_ids=(4,), logprobs=2
    )
    for coder in (msgspec.msgpack, msgspec.json):
        assert coder.decode(coder.encode(params), type=SamplingParams) == params


def test_the_wire_is_checked_like_a_call() -> None:
    with pytest.raises(UsageError, match=r"top_p=0\.0 is out of range"):
        msgspec.json.decode(b'{"top_p": 0.0}', type=SamplingParams)
    with pytest.raises(msgspec.ValidationError, match="unknown field `top_l`"):
        msgspec.json.decode(b'{"top_l": 1}', type=SamplingParams)


def test_a_completion_survives_the_wire() -> None:
    completion = Completion(
        text="ab",
        token_ids=(1, 2),
        finish_reason="stop",
        seed=-5,
        usage=Usage(3, 2),
        logprobs=(TokenLogprob(1, -0.5, ((1, -0.5), (7, -2.0))), TokenLogprob(2, -0.25)),
    )
    encoded = msgspec.msgpack.encode(completion)
    assert msgspec.msgpack.decode(encoded, type=Completion) == completion


def test_usage_adds_up() -> None:
    assert Usage(prompt_tokens=3, completion_tokens=4).total_tokens == 7
