"""Messages are valid by construction and say what is wrong with them."""

import re
from typing import Any

import msgspec
import pytest

from jaxserve.errors import UsageError
from jaxserve.serving.request import (
    Completion,
    Request,
    SamplingParams,
    TokenEvent,
    TokenLogprob,
    Usage,
)

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
    "prompt_logprobs": ("a whole number from 0 to 20", [0, 20, None], [-1, 21, True]),
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


@pytest.mark.parametrize("name", ["stop_token_ids", "allowed_token_ids"])
def test_token_ids_become_a_tuple(name: str) -> None:
    assert getattr(SamplingParams.create(**{name: [3, 0]}), name) == (3, 0)


def test_bad_words_become_a_tuple() -> None:
    assert SamplingParams.create(bad_words="no").bad_words == ("no",)


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
        ({"stop_token_ids": range(65)}, "stop_token_ids=.* must be a list"),
        ({"stop_token_ids": [*range(65)]}, "stop_token_ids has 65 token ids; at most 64 are"),
        ({"allowed_token_ids": [*range(1025)]}, "allowed_token_ids has 1025 token ids; at most"),
        ({"allowed_token_ids": [True]}, r"allowed_token_ids=\[True\] must hold token ids"),
        ({"bad_words": ["a"] * 33}, "bad_words has 33 strings; at most 32 are allowed"),
        ({"bad_words": [""]}, r"bad_words=\[''\] must hold strings of at least one character"),
        ({"logit_bias": dict.fromkeys(range(1025), 1)}, "logit_bias has 1025 token ids; at most"),
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


DECIDED = SamplingParams(seed=1, max_tokens=4)


def test_a_request_survives_the_wire() -> None:
    request = Request(
        id="a", prompt=(1, 2), params=DECIDED, stop_ids=(0,), bad_word_ids=((3, 4),), client="c"
    )
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(request), type=Request) == request


def test_the_lists_of_a_request_may_be_full() -> None:
    words = (tuple(range(8)),) * 32
    request = Request(id="a", prompt=(2**31 - 1,), params=DECIDED, bad_word_ids=words)
    assert request.bad_word_ids == words


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": ()}, "prompt has no tokens; it must have at least 1"),
        ({"prompt": (1, True)}, "prompt must hold token ids"),
        ({"prompt": (1, 2.0)}, "prompt must hold token ids"),
        ({"prompt": (1, -1)}, "prompt holds -1; token ids are from 0 to 2147483647"),
        ({"prompt": (1, 2**31)}, "prompt holds 2147483648; token ids are"),
        ({"params": SamplingParams(max_tokens=4)}, "seed=None is undecided; a request needs seed"),
        ({"params": SamplingParams(seed=4)}, "max_tokens=None is undecided"),
        ({"stop_ids": (1,) * 129}, "stop_ids has 129 tokens; at most 128 are allowed"),
        ({"bad_word_ids": ((1,),) * 65}, r"bad_words are 65 token sequences .*; at most 64 are"),
        ({"bad_word_ids": ((),)}, "bad_words: .* 0 tokens; it must have 1 to 8"),
        (
            {"bad_word_ids": (tuple(range(9)),)},
            "bad_words: .* 9 tokens; it must have 1 to 8",
        ),
        ({"beam_width": 0}, "beam_width=0 is out of range; it must be a whole number from 1"),
        ({"beam_width": 129}, "beam_width=129 is out of range"),
        (
            {"beam_width": 2, "params": SamplingParams(seed=1, max_tokens=4, n=2)},
            "beam_width=2 with n=2: a beam search is one sample; use n=1",
        ),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=f"^{message}"):
        Request(**{"id": "a", "prompt": (1,), "params": DECIDED} | fields)


def test_a_token_event_survives_the_wire() -> None:
    event = TokenEvent("a", 1, (5,), "stop", (TokenLogprob(5, -0.5),), 3, None, True, (None,))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(event), type=TokenEvent) == event


def test_usage_counts_no_cached_tokens_unless_told() -> None:
    assert Usage(3, 4).cached_tokens == 0
