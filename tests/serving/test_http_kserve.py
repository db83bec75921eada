"""The Open Inference Protocol, version 2, as its clients speak it."""

import json
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import httpx
import pytest

import jaxserve
from jaxserve.serving.fake_runner import FakeRule
from jaxserve.serving.fake_service import VOCAB_SIZE, byte_tokenizer, fake_service
from jaxserve.serving.http.background import serve_in_background
from jaxserve.serving.request import SamplingParams
from jaxserve.serving.server_options import ServerOptions

GREEDY = {"temperature": 0, "max_tokens": 5}


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    options = ServerOptions(model_name="fake")
    with (
        serve_in_background(partial(fake_service, 0.004), options) as server,
        httpx.Client(base_url=server.url + "/v2", timeout=30) as client,
    ):
        yield client


def wanted(prompt: str, count: int = 5) -> list[int]:
    params = SamplingParams(temperature=0.0).resolved({})
    return FakeRule(VOCAB_SIZE).continue_prompt(prompt.encode(), params, count)


def text_of(prompt: str) -> str:
    return byte_tokenizer().decode(wanted(prompt))


def tensor(name: str, datatype: str, shape: Sequence[int], data: Any) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape, "data": data}


def infer(client: httpx.Client, *inputs: Any, **others: Any) -> dict[str, Any]:
    body = {"inputs": inputs, "parameters": GREEDY} | others
    response = client.post("/models/fake/infer", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def test_the_server_and_its_model_are_described(client: httpx.Client) -> None:
    assert client.get("/health/live").json() == {"live": True}
    assert client.get("/health/ready").json() == {"ready": True}
    about = client.get(str(client.base_url).rstrip("/")).json()
    assert about == {
        "name": "jaxserve",
        "version": jaxserve.__version__,
        "extensions": ["generate"],
    }
    model = client.get("/models/fake").json()
    assert [one["name"] for one in model["inputs"]] == ["text_input", "input_ids"]
    assert [one["name"] for one in model["outputs"]] == [
        "text_output",
        "finish_reason",
        "output_ids",
    ]
    assert client.get("/models/fake/ready").json() == {"name": "fake", "ready": True}
    for path in ("/models/other", "/models/other/ready"):
        assert client.get(path).status_code == 404


def test_a_tensor_of_texts_becomes_one_of_completions(client: httpx.Client) -> None:
    body = infer(client, tensor("text_input", "BYTES", [2], ["ab", "cde"]), id="mine")
    assert (body["id"], body["model_name"], body["model_version"]) == ("mine", "fake", "1")
    assert body["outputs"] == [
        tensor("text_output", "BYTES", [2], [text_of("ab"), text_of("cde")]),
        tensor("finish_reason", "BYTES", [2], ["length", "length"]),
    ]


@pytest.mark.parametrize("shape", [[2, 1], [1, 2]])
def test_shapes_stay_and_nested_data_is_read_row_by_row(
    client: httpx.Client, shape: list[int]
) -> None:
    body = infer(client, tensor("text_input", "BYTES", shape, [["ab"], ["cde"]]))
    assert body["outputs"][0]["shape"] == shape
    assert body["outputs"][0]["data"] == [text_of("ab"), text_of("cde")]


@pytest.mark.parametrize("datatype", ["INT32", "INT64"])
def test_tokens_are_one_prompt(client: httpx.Client, datatype: str) -> None:
    body = infer(client, tensor("input_ids", datatype, [1, 2], [[97, 98]]))
    assert body["outputs"][2] == tensor("output_ids", "INT64", [5], wanted("ab"))


def test_only_outputs_that_are_wanted_come(client: httpx.Client) -> None:
    asked = tensor("text_input", "BYTES", [1], ["ab"])
    body = infer(client, asked, outputs=[{"name": "output_ids"}])
    assert [output["name"] for output in body["outputs"]] == ["output_ids"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"inputs": []}, "inputs"),
        ({"inputs": [tensor("image", "BYTES", [1], ["x"])]}, "inputs[0].name"),
        ({"inputs": [tensor("text_input", "BYTES", [1], ["x"])] * 2}, "inputs"),
        ({"inputs": [tensor("text_input", "BYTES", [3], ["x"])]}, "inputs[0].shape"),
        ({"inputs": [tensor("text_input", "BYTES", [0], [])]}, "inputs[0].data"),
        ({"inputs": [tensor("text_input", "FP32", [1], [1.5])]}, "inputs[0].datatype"),
        ({"inputs": [tensor("text_input", "BYTES", [1], [1])]}, "inputs[0].datatype"),
        ({"inputs": [tensor("input_ids", "INT64", [1], [True])]}, "inputs[0].datatype"),
        ({"inputs": [tensor("input_ids", "INT64", [1], [999])]}, None),
        ({"outputs": [{"name": "embedding"}]}, "outputs[0].name"),
        ({"parameters": {"n": 2}}, "parameters.n"),
        ({"parameters": {"temperature": 9}}, "temperature"),
        ({"parameters": {"unheard_of": 1}}, "unheard_of"),
        ({"parameters": {"max_tokens": 0}}, "max_tokens"),
    ],
)
def test_what_does_not_fit_is_refused(client: httpx.Client, change: Any, param: str | None) -> None:
    asked = {"inputs": [tensor("text_input", "BYTES", [1], ["ab"])]} | change
    response = client.post("/models/fake/infer", json=asked)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


def test_generate_gives_text_and_details(client: httpx.Client) -> None:
    asked = {"id": "mine", "text_input": "ab", "parameters": GREEDY}
    assert client.post("/models/fake/generate", json=asked).json() == {
        "id": "mine",
        "model_name": "fake",
        "model_version": "1",
        "text_output": text_of("ab"),
        "details": {
            "finish_reason": "length",
            "seed": 0,
            "prompt_tokens": 2,
            "completion_tokens": 5,
        },
    }


def test_a_stream_of_text_ends_with_details(client: httpx.Client) -> None:
    asked = {"text_input": "ab", "parameters": GREEDY}
    response = client.post("/models/fake/generate_stream", json=asked)
    assert response.headers["content-type"].startswith("text/event-stream")
    *lines, rest = response.text.split("\n\n")
    assert rest == ""
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert "".join(event["text_output"] for event in events) == text_of("ab")
    assert [event["details"] for event in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1]["details"]["finish_reason"] == "length"


@pytest.mark.parametrize("route", ["infer", "generate", "generate_stream"])
def test_another_model_is_not_found(client: httpx.Client, route: str) -> None:
    response = client.post(f"/models/other/{route}", json={"text_input": "a"})
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
