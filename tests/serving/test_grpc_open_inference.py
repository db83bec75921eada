"""The Open Inference Protocol, by messages and by the client that others wrote for it."""

import importlib.util
import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from jaxserve.serving.fake_runner import FakeRule
from jaxserve.serving.fake_service import VOCAB_SIZE, byte_tokenizer
from jaxserve.serving.request import MAX_PROMPTS, SamplingParams
from jaxserve.serving.rpc.fake_server import FakeServer, fake_server
from jaxserve.serving.rpc.protos import open_inference_grpc_pb2 as pb

Input = pb.ModelInferRequest.InferInputTensor
Output = pb.ModelInferRequest.InferRequestedOutputTensor


@pytest.fixture(scope="module")
def server() -> Iterator[FakeServer]:
    with fake_server() as running:
        yield running


@pytest.fixture(scope="module")
def channel(server: FakeServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.target) as made:
        yield made


def call(channel: grpc.Channel, method: str, request: Any = None) -> Any:
    """Returns the answer to a request."""
    request = getattr(pb, f"{method}Request")() if request is None else request
    answer = getattr(pb, f"{method}Response")
    stub = channel.unary_unary(
        f"/inference.GRPCInferenceService/{method}",
        request_serializer=type(request).SerializeToString,
        response_deserializer=answer.FromString,
    )
    return stub(request, timeout=60)


def expected(text: str, count: int) -> list[int]:
    """Returns the greedy tokens after a text."""
    params = SamplingParams(temperature=0.0)
    return FakeRule(VOCAB_SIZE).continue_prompt(list(text.encode()), params, count)


def asked(count: int) -> dict[str, pb.InferParameter]:
    """Returns the parameters of a greedy request."""
    return {
        "max_tokens": pb.InferParameter(int64_param=count),
        "temperature": pb.InferParameter(double_param=0.0),
    }


def texts(*values: str) -> Input:
    """Returns the input of texts."""
    contents = pb.InferTensorContents(bytes_contents=[value.encode() for value in values])
    return Input(name="text_input", datatype="BYTES", shape=[len(values)], contents=contents)


def test_server_and_model_tell_of_themselves(channel: grpc.Channel):
    assert call(channel, "ServerLive").live
    assert call(channel, "ServerReady").ready
    assert call(channel, "ModelReady", pb.ModelReadyRequest(name="fake")).ready
    assert call(channel, "ServerMetadata").name == "jaxserve"
    model = call(channel, "ModelMetadata", pb.ModelMetadataRequest(name="fake", version="1"))
    assert (model.name, list(model.versions)) == ("fake", ["1"])
    assert [tensor.name for tensor in model.inputs] == ["text_input", "input_ids"]


def test_a_server_that_drains_lives_and_is_not_ready():
    with fake_server() as server, grpc.insecure_channel(server.target) as channel:
        server.loop.call_soon_threadsafe(server.service.drain)
        assert not call(channel, "ModelReady", pb.ModelReadyRequest(name="fake")).ready
        assert not call(channel, "ServerReady").ready
        assert call(channel, "ServerLive").live


def test_texts_are_completed_together(channel: grpc.Channel):
    request = pb.ModelInferRequest(
        model_name="fake", id="mine", inputs=[texts("abc", "xyz")], parameters=asked(5)
    )
    answer = call(channel, "ModelInfer", request)
    assert (answer.model_name, answer.model_version, answer.id) == ("fake", "1", "mine")
    by_name = {tensor.name: tensor for tensor in answer.outputs}
    assert list(by_name) == ["text_output", "finish_reason"]
    assert list(by_name["text_output"].shape) == [2]
    assert list(by_name["text_output"].contents.bytes_contents) == [
        byte_tokenizer().decode(expected(text, 5)).encode() for text in ("abc", "xyz")
    ]
    assert list(by_name["finish_reason"].contents.bytes_contents) == [b"length"] * 2


@pytest.mark.parametrize(("datatype", "code"), [("INT64", "q"), ("INT32", "i")])
def test_raw_tokens_are_answered_raw(channel: grpc.Channel, datatype: str, code: str):
    request = pb.ModelInferRequest(
        model_name="fake",
        inputs=[Input(name="input_ids", datatype=datatype, shape=[1, 3])],
        raw_input_contents=[struct.pack(f"<3{code}", *b"abc")],
        outputs=[Output(name="output_ids")],
        parameters=asked(4),
    )
    answer = call(channel, "ModelInfer", request)
    (tensor,) = answer.outputs
    assert (tensor.name, tensor.datatype, list(tensor.shape)) == ("output_ids", "INT64", [4])
    assert list(struct.unpack("<4q", answer.raw_output_contents[0])) == expected("abc", 4)


def raw(*contents: bytes, shape: list[int], name: str = "text_input", datatype: str = "BYTES"):
    """Returns a request with raw contents."""
    inputs = [Input(name=name, datatype=datatype, shape=shape)]
    return pb.ModelInferRequest(inputs=inputs, raw_input_contents=contents)


@pytest.mark.parametrize(
    ("request_", "code", "says"),
    [
        (pb.ModelInferRequest(), "INVALID_ARGUMENT", "there must be one"),
        (pb.ModelInferRequest(model_name="gpt"), "NOT_FOUND", "gpt"),
        (pb.ModelInferRequest(model_version="7"), "NOT_FOUND", "7"),
        (pb.ModelInferRequest(inputs=[texts("a"), texts("b")]), "INVALID_ARGUMENT", "twice"),
        (pb.ModelInferRequest(inputs=[texts(*"a" * 129)]), "INVALID_ARGUMENT", "1 to 128"),
        (
            pb.ModelInferRequest(inputs=[texts("a")], outputs=[Output(name="logits")]),
            "INVALID_ARGUMENT",
            "logits",
        ),
        (
            pb.ModelInferRequest(
                inputs=[texts("a")], parameters={"top_q": pb.InferParameter(int64_param=1)}
            ),
            "INVALID_ARGUMENT",
            "top_q",
        ),
        (
            pb.ModelInferRequest(
                inputs=[texts("a")], parameters={"n": pb.InferParameter(int64_param=2)}
            ),
            "INVALID_ARGUMENT",
            "n:",
        ),
        (
            pb.ModelInferRequest(
                inputs=[texts("a")], parameters={"seed": pb.InferParameter(string_param="x")}
            ),
            "INVALID_ARGUMENT",
            "seed",
        ),
        (
            pb.ModelInferRequest(inputs=[texts("a")], parameters={"seed": pb.InferParameter()}),
            "INVALID_ARGUMENT",
            "no value",
        ),
        (raw(b"\x01\x00\x00\x00a", b"", shape=[1]), "INVALID_ARGUMENT", "2 raw contents"),
        (raw(b"\x05\x00\x00\x00a", shape=[1]), "INVALID_ARGUMENT", "cut off"),
        (raw(b"\x05\x00", shape=[1]), "INVALID_ARGUMENT", "cut off"),
        (raw(b"\x01\x00\x00\x00a", shape=[2]), "INVALID_ARGUMENT", "shape"),
        (raw(b"\x01\x00\x00\x00a", shape=[-1, -1]), "INVALID_ARGUMENT", "shape"),
        (raw(b"\x01\x00\x00\x00\xff", shape=[1]), "INVALID_ARGUMENT", "UTF-8"),
        (raw(b"abc", shape=[1], name="input_ids", datatype="INT64"), "INVALID_ARGUMENT", "bytes"),
        (raw(b"abcd", shape=[1], datatype="FP32"), "INVALID_ARGUMENT", "FP32"),
        (raw(b"abcd", shape=[1], datatype="INT32"), "INVALID_ARGUMENT", "BYTES"),
        (
            raw(struct.pack("<q", 999), shape=[1], name="input_ids", datatype="INT64"),
            "INVALID_ARGUMENT",
            "999",
        ),
        (pb.ModelInferRequest(inputs=[texts("a" * 600)]), "OUT_OF_RANGE", "512"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_request_is_refused_with_its_reason(
    channel: grpc.Channel, request_: pb.ModelInferRequest, code: str, says: str
):
    with pytest.raises(grpc.RpcError) as caught:
        call(channel, "ModelInfer", request_)
    assert caught.value.code().name == code
    assert says in str(caught.value.details())


def test_as_many_prompts_as_over_http_are_taken():
    with (
        fake_server(max_queued_requests=200) as server,
        grpc.insecure_channel(server.target) as channel,
    ):
        most = pb.ModelInferRequest(inputs=[texts(*"a" * MAX_PROMPTS)], parameters=asked(1))
        answer = call(channel, "ModelInfer", most)
        assert len(answer.outputs[0].contents.bytes_contents) == MAX_PROMPTS


def test_one_prompt_that_is_refused_ends_the_others():
    with (
        fake_server(step_s=0.01, num_slots=2, max_queued_requests=3) as server,
        grpc.insecure_channel(server.target) as channel,
        pytest.raises(grpc.RpcError) as caught,
    ):
        request = pb.ModelInferRequest(inputs=[texts(*"abcdefghij")], parameters=asked(400))
        call(channel, "ModelInfer", request)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert server.service.engine.metrics.output_tokens < 400


# In a process of its own: its messages have the names of ours.
TRITON = """
import json, sys, warnings
warnings.simplefilter("ignore")
import numpy as np
import tritonclient.grpc as triton

client = triton.InferenceServerClient(sys.argv[1])
states = [client.is_server_live(), client.is_server_ready(), client.is_model_ready("fake")]
metadata = client.get_model_metadata("fake", as_json=True)
asked = triton.InferInput("text_input", [1, 1], "BYTES")
asked.set_data_from_numpy(np.array([["abc"]], dtype=object))
parameters = {"max_tokens": 5, "temperature": 0.0}
answer = client.infer("fake", [asked], request_id="mine", parameters=parameters)
try:
    client.infer("fake", [asked], parameters={"top_p": 7})
except triton.InferenceServerException as error:
    refused = [error.status(), error.message()]
print(json.dumps({
    "states": states,
    "inputs": [tensor["name"] for tensor in metadata["inputs"]],
    "text": answer.as_numpy("text_output").tolist()[0][0].decode(),
    "tokens": answer.as_numpy("output_ids").tolist(),
    "id": answer.get_response().id,
    "refused": refused,
}))
"""


@pytest.mark.skipif(
    importlib.util.find_spec("tritonclient") is None,
    reason="tritonclient is not installed: it wants an older protobuf than grpcio-tools",
)
def test_the_client_of_triton_gets_its_answers(server: FakeServer):
    done = subprocess.run(
        [sys.executable, "-c", TRITON, server.target], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    tokens = expected("abc", 5)
    assert said["states"] == [True, True, True]
    assert said["inputs"] == ["text_input", "input_ids"]
    assert (said["text"], said["tokens"]) == (byte_tokenizer().decode(tokens), tokens)
    assert said["id"] == "mine"
    assert said["refused"][0].endswith("INVALID_ARGUMENT") and "top_p" in said["refused"][1]
