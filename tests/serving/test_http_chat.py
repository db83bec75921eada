"""/v1/chat/completions, frame by frame, over a model whose every token is known."""

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import httpx
import pytest

from jaxserve.serving.fake_runner import FakeRule
from jaxserve.serving.fake_service import CONTEXT, VOCAB_SIZE, byte_tokenizer, fake_service
from jaxserve.serving.http.background import serve_in_background
from jaxserve.serving.request import SamplingParams
from jaxserve.serving.server_options import ServerOptions

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
PROMPT = b"[system]Be brief.\n[user]hi\n[assistant]"
GREEDY = SamplingParams(temperature=0.0).resolved({})


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    options = ServerOptions(model_name="fake")
    with (
        serve_in_background(partial(fake_service, 0.004), options) as server,
        httpx.Client(base_url=server.url, timeout=30) as client,
    ):
        yield client


def wanted(count: int) -> list[int]:
    return FakeRule(VOCAB_SIZE).continue_prompt(PROMPT, GREEDY, count)


def chat(client: httpx.Client, **body: Any) -> dict[str, Any]:
    asked = {"temperature": 0, "messages": MESSAGES} | body
    response = client.post("/v1/chat/completions", json=asked)
    assert response.status_code == 200, response.text
    return response.json()


def frames(client: httpx.Client, **body: Any) -> list[dict[str, Any]]:
    asked = {"temperature": 0, "stream": True, "messages": MESSAGES} | body
    response = client.post("/v1/chat/completions", json=asked)
    assert response.status_code == 200, response.text
    *events, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def test_an_answer_has_the_fields_of_openai(client: httpx.Client) -> None:
    body = chat(client, max_tokens=6)
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    (choice,) = body["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": byte_tokenizer().decode(wanted(6)),
        "refusal": None,
        "tool_calls": [],
    }
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"] is None
    assert body["usage"]["prompt_tokens"] == len(PROMPT)
    assert body["usage"]["total_tokens"] == len(PROMPT) + 6


def test_the_template_makes_the_prompt(client: httpx.Client) -> None:
    body = chat(client, max_tokens=1, return_token_ids=True)
    assert bytes(body["prompt_token_ids"]) == PROMPT


def test_parts_of_a_message_are_joined_by_line_breaks(client: httpx.Client) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [{"role": "user", "content": parts}]
    body = chat(client, messages=messages, max_tokens=1, return_token_ids=True)
    assert bytes(body["prompt_token_ids"]) == b"[user]one\ntwo\n[assistant]"


def test_without_a_length_an_answer_may_fill_the_context(client: httpx.Client) -> None:
    body = chat(client, ignore_eos=True)
    assert body["usage"]["total_tokens"] == CONTEXT
    assert chat(client, max_completion_tokens=3)["usage"]["completion_tokens"] == 3


def test_a_stream_begins_with_the_role_and_ends_with_an_empty_delta(client: httpx.Client) -> None:
    first, *middle, last = frames(client, max_tokens=8)
    assert first["choices"] == [
        {
            "index": 0,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
    ]
    assert all(set(event["choices"][0]["delta"]) == {"content"} for event in middle)
    text = "".join(event["choices"][0]["delta"]["content"] for event in middle)
    assert text == byte_tokenizer().decode(wanted(8))
    assert last["choices"][0]["delta"] == {}
    assert last["choices"][0]["finish_reason"] == "length"
    events = [first, *middle, last]
    assert len({(event["id"], event["created"], event["model"]) for event in events}) == 1
    assert {event["object"] for event in events} == {"chat.completion.chunk"}


def test_every_sample_of_a_stream_has_its_role_text_and_end(client: httpx.Client) -> None:
    asked = {"n": 3, "temperature": 1, "seed": 4, "max_tokens": 5}
    whole = [choice["message"]["content"] for choice in chat(client, **asked)["choices"]]
    told: dict[int, list[Any]] = {0: [], 1: [], 2: []}
    for event in frames(client, **asked):
        (choice,) = event["choices"]
        told[choice["index"]].append((choice["delta"], choice["finish_reason"]))
    for index, pieces in told.items():
        assert pieces[0] == ({"role": "assistant", "content": ""}, None)
        assert pieces[-1] == ({}, "length")
        assert "".join(delta["content"] for delta, _ in pieces[1:-1]) == whole[index]


def test_usage_comes_last_in_a_stream(client: httpx.Client) -> None:
    *others, last = frames(client, max_tokens=4, stream_options={"include_usage": True})
    assert all(event["usage"] is None for event in others)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 4


def test_log_probabilities_have_bytes_that_make_the_text(client: httpx.Client) -> None:
    body = chat(client, max_tokens=7, logprobs=True, top_logprobs=2)
    content = body["choices"][0]["logprobs"]["content"]
    raw = bytes(byte for entry in content for byte in entry["bytes"])
    assert list(raw) == wanted(7)
    for entry in content:
        assert [len(entry["top_logprobs"]), entry["top_logprobs"][0]["token"]] == [
            2,
            entry["token"],
        ]
        assert entry["logprob"] <= 0
    streamed = frames(client, max_tokens=7, logprobs=True, top_logprobs=2)
    pieces = [e["choices"][0]["logprobs"] for e in streamed if e["choices"][0]["logprobs"]]
    assert [entry for piece in pieces for entry in piece["content"]] == content


def test_fields_that_newer_interfaces_leave_null_are_taken(client: httpx.Client) -> None:
    past = {"role": "assistant", "content": "yes", "refusal": None, "tool_calls": None}
    messages = [*MESSAGES, past | {"annotations": [], "audio": None, "function_call": None}]
    messages.append({"role": "user", "content": "again"})
    assert chat(client, messages=messages, max_tokens=1, tools=[], response_format={"type": "text"})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "auto"),
        ("response_format", {"type": "json_object"}),
        ("functions", [{"name": "f"}]),
        ("structured_outputs", {"regex": "a+"}),
        ("guided_regex", "a+"),
        ("modalities", ["audio"]),
        ("reasoning_effort", "high"),
        ("store", True),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    client: httpx.Client, field: str, value: Any
) -> None:
    response = client.post("/v1/chat/completions", json={"messages": MESSAGES, field: value})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == field
    assert error["code"] == "unsupported_parameter"
    assert "not supported yet" in error["message"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": "x", "weight": 1}]}, "messages[0]"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "text": "x"}]}]},
            "messages[0].content[0].type",
        ),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"chunk": 1}}, "stream_options"),
        ({"logprobs": 1}, "logprobs"),
        ({"n": 2, "temperature": 0}, "n"),
        ({"n": 17, "temperature": 1}, "n"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, None),
    ],
)
def test_what_is_malformed_is_named(client: httpx.Client, change: Any, param: str | None) -> None:
    response = client.post("/v1/chat/completions", json={"messages": MESSAGES} | change)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
