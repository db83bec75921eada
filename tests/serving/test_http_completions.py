"""/v1/completions, frame by frame, over a model whose every token is known."""

import json
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import httpx
import pytest

from jaxserve.serving.fake_runner import FakeRule
from jaxserve.serving.fake_service import VOCAB_SIZE, byte_tokenizer, fake_service
from jaxserve.serving.http.background import serve_in_background
from jaxserve.serving.request import SamplingParams
from jaxserve.serving.server_options import ServerOptions

RULE = FakeRule(VOCAB_SIZE)
STEP_S = 0.004


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    options = ServerOptions(model_name="fake")
    with (
        serve_in_background(partial(fake_service, STEP_S), options) as server,
        httpx.Client(base_url=server.url, timeout=30) as client,
    ):
        yield client


def expected(prompt: str | Sequence[int], count: int, sample: int = 0, **fields: Any) -> list[int]:
    """Returns the tokens that the model without a model gives."""
    ids = list(prompt.encode()) if isinstance(prompt, str) else list(prompt)
    params = SamplingParams.create(**({"temperature": 0.0} | fields)).resolved({})
    return RULE.continue_prompt(ids, params, count, sample)


def text_of(ids: Sequence[int]) -> str:
    return byte_tokenizer().decode(ids)


def complete(client: httpx.Client, **body: Any) -> dict[str, Any]:
    response = client.post("/v1/completions", json={"temperature": 0} | body)
    assert response.status_code == 200, response.text
    return response.json()


def frames(client: httpx.Client, **body: Any) -> list[dict[str, Any]]:
    """Returns the events of a stream, after checking how they are framed."""
    response = client.post("/v1/completions", json={"temperature": 0, "stream": True} | body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.text.endswith("data: [DONE]\n\n")
    events = response.text.split("\n\n")[:-2]
    assert all(event.startswith("data: {") for event in events)
    return [json.loads(event.removeprefix("data: ")) for event in events]


def test_a_completion_has_the_fields_of_openai(client: httpx.Client) -> None:
    body = complete(client, prompt="hello", max_tokens=5)
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    assert body["model"] == "fake"
    (choice,) = body["choices"]
    assert choice == {
        "index": 0,
        "text": text_of(expected("hello", 5)),
        "logprobs": None,
        "finish_reason": "length",
        "seed": 0,
    }
    assert body["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 5,
        "total_tokens": 10,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_sixteen_tokens_are_the_default(client: httpx.Client) -> None:
    assert complete(client, prompt="hello")["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("ab", ["ab"]),
        (["ab", "cde"], ["ab", "cde"]),
        ([97, 98], ["ab"]),
        ([[97, 98], [99, 100, 101]], ["ab", "cde"]),
    ],
)
def test_prompts_come_as_text_or_tokens_one_or_several(
    client: httpx.Client, prompt: Any, prompts: list[str]
) -> None:
    body = complete(client, prompt=prompt, max_tokens=4, return_token_ids=True)
    assert [choice["index"] for choice in body["choices"]] == list(range(len(prompts)))
    for choice, one in zip(body["choices"], prompts, strict=True):
        assert choice["token_ids"] == expected(one, 4)
        assert choice["prompt_token_ids"] == list(one.encode())
    assert body["usage"]["prompt_tokens"] == sum(map(len, prompts))


def test_samples_are_numbered_within_prompts(client: httpx.Client) -> None:
    body = complete(
        client,
        prompt=["ab", "cde"],
        n=2,
        seed=5,
        temperature=1,
        max_tokens=3,
        return_token_ids=True,
    )
    wanted = [
        expected(prompt, 3, sample, temperature=1.0, seed=5)
        for prompt in ("ab", "cde")
        for sample in (0, 1)
    ]
    assert [choice["token_ids"] for choice in body["choices"]] == wanted
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]


def test_a_drawn_seed_is_told_and_gives_the_same_again(client: httpx.Client) -> None:
    first = complete(client, prompt="hello", temperature=1, max_tokens=6)["choices"][0]
    assert first["seed"] != 0
    again = complete(client, prompt="hello", temperature=1, max_tokens=6, seed=first["seed"])
    assert again["choices"][0]["text"] == first["text"]


def test_a_stop_string_ends_the_text_before_it(client: httpx.Client) -> None:
    whole = text_of(expected("hello", 24))
    stop = next(piece for piece in (whole[at : at + 2] for at in range(2, 20)) if piece.isascii())
    body = complete(client, prompt="hello", max_tokens=24, stop=[stop])
    (choice,) = body["choices"]
    assert choice["text"] == whole[: whole.index(stop)]
    assert choice["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] < 24
    streamed = frames(client, prompt="hello", max_tokens=24, stop=stop)
    assert "".join(event["choices"][0]["text"] for event in streamed) == choice["text"]
    assert streamed[-1]["choices"][0]["finish_reason"] == "stop"


def test_a_stream_gives_the_text_of_the_whole(client: httpx.Client) -> None:
    events = frames(client, prompt="hello", max_tokens=12)
    assert len({(event["id"], event["created"], event["model"]) for event in events}) == 1
    assert {event["object"] for event in events} == {"text_completion"}
    assert len(events) > 3, "the tokens came one step at a time"
    text = "".join(event["choices"][0]["text"] for event in events)
    assert text == text_of(expected("hello", 12))
    assert all("usage" not in event for event in events)


def test_the_end_of_a_stream_carries_no_text(client: httpx.Client) -> None:
    *others, last = frames(client, prompt="hello", max_tokens=6)
    assert [event["choices"][0]["finish_reason"] for event in others] == [None] * len(others)
    assert last["choices"][0]["finish_reason"] == "length"
    assert last["choices"][0]["text"] == ""


def test_usage_is_a_last_chunk_without_choices(client: httpx.Client) -> None:
    *others, last = frames(
        client, prompt="hello", max_tokens=6, stream_options={"include_usage": True}
    )
    assert all(event["usage"] is None for event in others)
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == 11


def test_streams_of_several_prompts_and_samples_give_each_its_text(client: httpx.Client) -> None:
    body = {"prompt": ["ab", "cde", "f"], "n": 2, "seed": 5, "temperature": 1, "max_tokens": 9}
    whole = [choice["text"] for choice in complete(client, **body)["choices"]]
    texts = [""] * len(whole)
    ends = [0] * len(whole)
    for event in frames(client, **body):
        (choice,) = event["choices"]
        assert not ends[choice["index"]], "nothing follows the end"
        texts[choice["index"]] += choice["text"]
        ends[choice["index"]] += choice["finish_reason"] is not None
    assert texts == whole
    assert ends == [1] * len(whole)


def test_log_probabilities_stand_beside_their_tokens(client: httpx.Client) -> None:
    body = complete(client, prompt="hello", max_tokens=3, logprobs=2, return_token_ids=True)
    (choice,) = body["choices"]
    told, ids = choice["logprobs"], choice["token_ids"]
    assert len(told["tokens"]) == 3
    sequence = list(b"hello")
    for at, token in enumerate(ids):
        entry = RULE.logprob(RULE.peak(sequence), token, 2)
        assert told["token_logprobs"][at] == pytest.approx(entry.logprob)
        assert list(told["top_logprobs"][at].values()) == pytest.approx(
            [logprob for _, logprob in entry.top]
        )
        sequence.append(token)


def test_the_chosen_token_is_among_the_likely_ones_in_any_case(client: httpx.Client) -> None:
    body = complete(client, prompt="hello", max_tokens=4, logprobs=0, temperature=1, seed=9)
    told = body["choices"][0]["logprobs"]
    for name, logprob, top in zip(
        told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True
    ):
        assert top == {name: logprob}


def test_names_of_tokens_are_distinct_though_their_texts_are_not(client: httpx.Client) -> None:
    body = complete(client, prompt=[200, 201], max_tokens=1, echo=True, logprobs=0)
    assert body["choices"][0]["logprobs"]["tokens"][:2] == ["bytes:\\xc8", "bytes:\\xc9"]


def test_an_echo_is_the_prompt_with_its_scores(client: httpx.Client) -> None:
    (choice,) = complete(client, prompt="héllo", max_tokens=2, echo=True, logprobs=1)["choices"]
    ids = list("héllo".encode())
    assert choice["text"] == "héllo" + text_of(expected("héllo", 2))
    told = choice["logprobs"]
    assert told["tokens"][:3] == ["h", "bytes:\\xc3", "bytes:\\xa9"]
    assert told["text_offset"][:5] == [0, 1, 1, 2, 3]
    assert told["token_logprobs"][0] is None
    assert told["top_logprobs"][0] is None
    for at in range(1, len(ids)):
        entry = RULE.logprob(RULE.peak(ids[:at]), ids[at], 1)
        assert told["token_logprobs"][at] == pytest.approx(entry.logprob)
    assert len(told["tokens"]) == len(ids) + 2


def test_an_echo_alone_generates_nothing_that_is_told(client: httpx.Client) -> None:
    body = complete(client, prompt=[[97, 98], [99]], max_tokens=0, echo=True, logprobs=1)
    assert [choice["text"] for choice in body["choices"]] == ["ab", "c"]
    assert [len(choice["logprobs"]["tokens"]) for choice in body["choices"]] == [2, 1]
    assert {choice["finish_reason"] for choice in body["choices"]} == {"length"}
    assert body["usage"]["completion_tokens"] == 0
    streamed = frames(client, prompt="ab", max_tokens=0, echo=True, logprobs=1)
    assert "".join(event["choices"][0]["text"] for event in streamed) == "ab"


def test_a_streamed_echo_comes_first_and_once(client: httpx.Client) -> None:
    events = frames(client, prompt="hello", max_tokens=5, echo=True, logprobs=1)
    text = "".join(event["choices"][0]["text"] for event in events)
    assert text == "hello" + text_of(expected("hello", 5))
    told = [event["choices"][0]["logprobs"] for event in events[:-1]]
    assert [name for lists in told for name in lists["tokens"]][:5] == list("hello")
    assert [offset for lists in told for offset in lists["text_offset"]][:6] == [0, 1, 2, 3, 4, 5]


def test_scores_of_the_prompt_come_by_token_id(client: httpx.Client) -> None:
    (choice,) = complete(client, prompt="abc", max_tokens=1, prompt_logprobs=1)["choices"]
    first, second, _ = choice["prompt_logprobs"]
    assert first is None
    entry = RULE.logprob(RULE.peak([97]), 98, 1)
    assert second["98"] == {"logprob": pytest.approx(entry.logprob), "decoded_token": "b"}


def test_a_prompt_is_cut_at_the_front(client: httpx.Client) -> None:
    body = complete(
        client, prompt="hello", truncate_prompt_tokens=2, max_tokens=3, return_token_ids=True
    )
    assert body["choices"][0]["prompt_token_ids"] == list(b"lo")
    assert body["choices"][0]["token_ids"] == expected("lo", 3)


def test_a_bias_keyed_by_token_id_is_understood(client: httpx.Client) -> None:
    assert complete(client, prompt="a", logit_bias={"98": 5}, max_tokens=1)["choices"]


def test_cached_tokens_are_told(client: httpx.Client) -> None:
    prompt = "a prompt that is long enough to fill two whole pages of the cache"
    complete(client, prompt=prompt, max_tokens=2)
    usage = complete(client, prompt=prompt, max_tokens=2)["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= 32
