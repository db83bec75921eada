"""Every call of jaxserve.v1.Inference, against what the fake model gives by hand."""

from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.client import Client, Retries, requests
from jaxserve.serving import answer
from jaxserve.serving.fake_runner import FakeRule
from jaxserve.serving.fake_service import CONTEXT, VOCAB_SIZE, byte_tokenizer
from jaxserve.serving.request import SamplingParams
from jaxserve.serving.rpc.convert import sampling_params
from jaxserve.serving.rpc.fake_server import FakeServer, fake_server
from jaxserve.serving.rpc.inference import SERVICE
from jaxserve.serving.rpc.protos import inference_pb2 as pb

RULE = FakeRule(VOCAB_SIZE)
GREEDY = SamplingParams(temperature=0.0)
PROMPT = list(b"abc")


@pytest.fixture(scope="module")
def server() -> Iterator[FakeServer]:
    with fake_server(step_s=0.001) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: FakeServer) -> Iterator[Client]:
    with Client(server.target, retries=Retries(1), timeout_s=60) as made:
        yield made


@pytest.fixture(scope="module")
def channel(server: FakeServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.target) as made:
        yield made


def refusal(channel: grpc.Channel, body: bytes, method: str = "GenerateUnary") -> Any:
    """Returns how a message is refused, given as the bytes of the wire."""
    call = channel.unary_unary(f"/jaxserve.v1.Inference/{method}")
    with pytest.raises(grpc.RpcError) as caught:
        call(body, timeout=60)
    return caught.value


def test_a_stream_gives_the_tokens_of_the_model(client: Client):
    stream = client.stream("abc", max_tokens=20, temperature=0.0)
    chunks = list(stream)
    tokens = [token for chunk in chunks for token in chunk.token_ids]
    assert tokens == RULE.continue_prompt(PROMPT, GREEDY, 20)
    assert "".join(chunk.text for chunk in chunks) == byte_tokenizer().decode(tokens)
    (end,) = stream.completes
    assert end.finish_reason == pb.FINISH_REASON_LENGTH
    assert (end.usage.prompt_tokens, end.usage.output_tokens) == (3, 20)
    assert end.usage.decode_ns > 0
    assert end.usage.HasField("queue_ns") and end.usage.HasField("prefill_ns")


def test_a_stream_has_a_message_a_step(client: Client):
    chunks = list(client.stream("abc", max_tokens=20, temperature=0.0))
    # Messages may be merged where this process is slow, and never be more than steps.
    assert 1 < len(chunks) <= 20


def test_the_unary_call_gives_what_the_stream_gives(client: Client):
    answer = client.generate("abc", max_tokens=20, temperature=0.0, request_id="mine")
    (done,) = answer.completions
    assert list(done.token_ids) == RULE.continue_prompt(PROMPT, GREEDY, 20)
    assert done.text == byte_tokenizer().decode(list(done.token_ids))
    assert done.finish_reason == pb.FINISH_REASON_LENGTH
    assert (answer.request_id, answer.model) == ("mine", "fake")
    assert answer.usage.output_tokens == 20


def test_samples_come_apart_and_their_seed_gives_them_again(client: Client):
    stream = client.stream("abc", n=3, max_tokens=9, temperature=1.0, ignore_eos=True)
    tokens: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for chunk in stream:
        tokens[chunk.sample_index] += chunk.token_ids
    assert sorted(end.sample_index for end in stream.completes) == [0, 1, 2]
    assert max(end.usage.output_tokens for end in stream.completes) == 27
    seed = stream.completes[0].seed
    for index, sample in tokens.items():
        params = SamplingParams(temperature=1.0, seed=seed)
        assert sample == RULE.continue_prompt(PROMPT, params, 9, index)
    again = client.generate("abc", n=3, max_tokens=9, temperature=1.0, seed=seed, ignore_eos=True)
    assert [list(done.token_ids) for done in again.completions] == list(tokens.values())


def test_tokens_and_chats_are_prompts_too(client: Client):
    from_text = client.generate("[user]hi\n[assistant]", max_tokens=4, temperature=0.0)
    from_chat = client.generate([{"role": "user", "content": "hi"}], max_tokens=4, temperature=0.0)
    from_tokens = client.generate(list(b"[user]hi\n[assistant]"), max_tokens=4, temperature=0.0)
    assert from_text.completions == from_chat.completions == from_tokens.completions


def test_a_stop_string_ends_the_text_before_it(client: Client):
    whole = client.generate("abc", max_tokens=20, temperature=0.0).completions[0].text
    stop = whole[5:7]
    stream = client.stream("abc", max_tokens=20, temperature=0.0, stop=stop)
    text = "".join(chunk.text for chunk in stream)
    assert text == whole[: whole.index(stop)]
    assert stream.completes[0].finish_reason == pb.FINISH_REASON_STOP


def test_log_probabilities_come_with_bytes_of_tokens(client: Client):
    answer = client.generate("abc", max_tokens=3, temperature=0.0, logprobs=2, prompt_logprobs=1)
    tokens = list(PROMPT)
    for entry in answer.completions[0].logprobs:
        peak = RULE.peak(tokens)
        expected = RULE.logprob(peak, entry.token_id, 2)
        assert entry.logprob == expected.logprob
        assert [(top.token_id, top.logprob) for top in entry.top] == list(expected.top)
        assert entry.token == bytes([entry.token_id])
        tokens.append(entry.token_id)
    assert [entry.token for entry in answer.prompt_logprobs] == [b"a", b"b", b"c"]
    streamed = list(
        client.stream("abc", max_tokens=3, temperature=0.0, logprobs=2, prompt_logprobs=1)
    )
    assert list(streamed[0].prompt_logprobs) == list(answer.prompt_logprobs)
    assert not any(chunk.prompt_logprobs for chunk in streamed[1:])
    assert [entry for chunk in streamed for entry in chunk.logprobs] == list(
        answer.completions[0].logprobs
    )


def test_scores_are_those_of_the_given_tokens(client: Client):
    first, *others = client.score("abcd", num_top=3).logprobs
    assert first.token_id == ord("a") and not first.HasField("logprob")
    for place, entry in enumerate(others, 1):
        peak = RULE.peak(list(b"abcd"[:place]))
        expected = RULE.logprob(peak, b"abcd"[place], 3)
        assert (entry.token_id, entry.logprob) == (expected.token_id, expected.logprob)
        assert [(top.token_id, top.logprob) for top in entry.top] == list(expected.top)


def test_tokens_go_to_and_fro(client: Client):
    text = "naïve 🚀 text" * 1100  # long enough for a thread
    assert client.tokenize(text) == list(text.encode())
    assert client.detokenize(list(text.encode())) == text
    assert client.tokenize("") == []
    assert client.tokenize([{"role": "user", "content": "x"}]) == list(b"[user]x\n[assistant]")
    assert client.detokenize([104, 256]) == "h"
    assert client.detokenize([104, 256], skip_special_tokens=False) == "h<|end|>"


def test_an_aborted_request_says_so(client: Client):
    stream = client.stream("abc", max_tokens=400, ignore_eos=True, request_id="to-be-aborted")
    for _ in stream:
        client.abort("to-be-aborted", "unknown")
    (end,) = stream.completes
    assert end.finish_reason == pb.FINISH_REASON_ABORT
    assert 0 < end.usage.output_tokens < 400


def test_the_model_and_the_server_tell_of_themselves(client: Client):
    model = client.model_info()
    assert (model.name, model.vocab_size, model.max_context_tokens) == ("fake", 257, CONTEXT)
    info = client.server_info()
    assert (info.state, info.reason) == ("ready", "")
    load = client.load()
    assert (load.free_pages, load.total_pages, load.running) == (256, 256, 0)
    assert load.generated_tokens > 0


def test_sampling_has_every_parameter_under_its_name():
    assert set(pb.SamplingParams.DESCRIPTOR.fields_by_name) == set(SamplingParams.__struct_fields__)


SAMPLING = pb.SamplingParams


@pytest.mark.parametrize(
    ("request_", "code", "says"),
    [
        (pb.GenerateRequest(), "INVALID_ARGUMENT", "text or tokens or messages"),
        (pb.GenerateRequest(text=""), "INVALID_ARGUMENT", "empty"),
        (pb.GenerateRequest(tokens=pb.Tokens()), "INVALID_ARGUMENT", "empty"),
        (pb.GenerateRequest(tokens=pb.Tokens(ids=[999])), "INVALID_ARGUMENT", "999"),
        (pb.GenerateRequest(messages=pb.Messages()), "INVALID_ARGUMENT", "message"),
        (pb.GenerateRequest(text="a", model="gpt"), "NOT_FOUND", "'gpt'"),
        (pb.GenerateRequest(text="a", request_id="a b"), "INVALID_ARGUMENT", "ASCII"),
        (pb.GenerateRequest(text="a", request_id="a" * 129), "INVALID_ARGUMENT", "129"),
        (pb.GenerateRequest(text="a", sampling=SAMPLING(n=0)), "INVALID_ARGUMENT", "n=0"),
        (pb.GenerateRequest(text="a", sampling=SAMPLING(n=17)), "INVALID_ARGUMENT", "up to 16"),
        (pb.GenerateRequest(text="a", sampling=SAMPLING(top_p=0)), "INVALID_ARGUMENT", "top_p"),
        (
            pb.GenerateRequest(text="a", sampling=SAMPLING(temperature=float("nan"))),
            "INVALID_ARGUMENT",
            "temperature",
        ),
        (
            pb.GenerateRequest(text="a", sampling=SAMPLING(stop=["x"] * 17)),
            "INVALID_ARGUMENT",
            "17",
        ),
        (pb.GenerateRequest(text="a" * CONTEXT), "OUT_OF_RANGE", "512"),
        (pb.GenerateRequest(text="a" * 100_000), "OUT_OF_RANGE", "100000"),
        (
            pb.GenerateRequest(text="a", sampling=SAMPLING(max_tokens=CONTEXT)),
            "OUT_OF_RANGE",
            "max_tokens",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_request_is_refused_with_its_reason_and_id(
    channel: grpc.Channel, request_: pb.GenerateRequest, code: str, says: str
):
    refused = refusal(channel, request_.SerializeToString())
    assert refused.code().name == code
    assert says in refused.details()
    metadata = dict(refused.trailing_metadata())
    assert metadata["x-request-id"] and metadata["x-error-type"]


def test_log_probabilities_that_could_fill_the_memory_are_refused(
    channel: grpc.Channel, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(answer, "MAX_LOGPROB_ENTRIES", 1000)
    sampling = SAMPLING(n=2, temperature=1.0, max_tokens=100, logprobs=5)
    refused = refusal(channel, pb.GenerateRequest(text="a", sampling=sampling).SerializeToString())
    assert refused.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "could give 1,200 log-probabilities" in refused.details()


def test_another_model_is_called_the_same_as_over_http(channel: grpc.Channel):
    body = pb.GenerateRequest(text="a", model="gpt").SerializeToString()
    assert dict(refusal(channel, body).trailing_metadata())["x-error-type"] == "model_not_found"


def test_bytes_that_are_no_message_are_refused(channel: grpc.Channel):
    for body in (b"\xff\xff", b"\x1a\x05abc", b"\x1a\x02\xff\xfe"):  # the last is no UTF-8
        refused = refusal(channel, body)
        assert refused.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "GenerateRequest" in refused.details()


def test_fields_that_are_not_known_are_refused_wherever_they_are(channel: grpc.Channel):
    later = b"\xa0\x06\x01"  # field 100, which a later version may have
    message = pb.GenerateRequest(text="a").SerializeToString()
    assert "GenerateRequest has no field 100" in refusal(channel, message + later).details()
    nested = message + b"\x32\x03" + later  # in `sampling`
    assert "SamplingParams has no field 100" in refusal(channel, nested).details()


def test_a_long_value_does_not_burst_the_headers(channel: grpc.Channel):
    request = pb.GenerateRequest(text="a", sampling=SAMPLING(stop=["é" * 50_000, ""]))
    refused = refusal(channel, request.SerializeToString())
    assert refused.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert len(refused.details().encode()) <= 1500


def test_a_message_above_the_limit_is_refused(channel: grpc.Channel):
    refused = refusal(channel, pb.TokenizeRequest(text="a" * (5 << 20)).SerializeToString())
    assert refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert dict(refused.trailing_metadata())["grpc-retry-pushback-ms"] == "-1"


def test_a_message_above_what_the_transport_carries_is_refused_unread(server: FakeServer):
    options = [("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(server.target, options=options) as channel:
        refused = refusal(channel, bytes((64 << 20) + 1))
    assert refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_request_id_is_open_once(client: Client, channel: grpc.Channel):
    stream = client.stream("abc", max_tokens=400, ignore_eos=True, request_id="twice")
    next(iter_ := iter(stream))
    refused = refusal(channel, pb.GenerateRequest(text="a", request_id="twice").SerializeToString())
    assert refused.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "twice" in refused.details()
    stream.cancel()
    del iter_


def test_the_id_of_the_metadata_names_calls_in_the_log(channel: grpc.Channel):
    """Several may have it at once: a proxy gives it to all that one page asks for."""
    call = channel.unary_stream("/jaxserve.v1.Inference/Generate")
    sampling = SAMPLING(max_tokens=50, ignore_eos=True)
    body = pb.GenerateRequest(text="a", sampling=sampling).SerializeToString()
    metadata = (("x-request-id", "from-a-proxy"),)
    both = [call(body, metadata=metadata, timeout=60) for _ in range(2)]
    for stream in both:
        assert len(list(stream)) > 1
        assert dict(stream.trailing_metadata())["x-request-id"] == "from-a-proxy"
    unsound = call(body, metadata=(("x-request-id", "a b"),), timeout=60)
    assert len(list(unsound)) > 1
    assert dict(unsound.trailing_metadata())["x-request-id"] not in ("", "a b")


def test_an_unknown_method_is_unimplemented(channel: grpc.Channel):
    assert refusal(channel, b"", "Train").code() is grpc.StatusCode.UNIMPLEMENTED


WELL_FORMED = (
    pb.GenerateRequest(text="a", sampling=SAMPLING(max_tokens=2, stop=["x"], logit_bias={3: 1.0})),
    pb.GenerateRequest(messages=pb.Messages(messages=[pb.Message(role="user", content="a")])),
    pb.ScoreRequest(tokens=pb.Tokens(ids=[1, 2, 3]), num_top=2),
    pb.AbortRequest(request_ids=["a", "b"]),
)
METHODS = [method.name for method in SERVICE.methods]
CALLERS_FAULT = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """Draws a message with some of its bytes changed, taken out or doubled."""
    body = bytearray(draw(st.sampled_from(WELL_FORMED)).SerializeToString())
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, max(0, len(body) - 1)))
        body[place : place + draw(st.integers(0, 2))] = draw(st.binary(max_size=3))
    return bytes(body)


@settings(max_examples=400, deadline=None)
@given(method=st.sampled_from(METHODS), body=st.one_of(damaged(), st.binary(max_size=40)))
def test_whatever_bytes_come_are_answered_or_refused(
    channel: grpc.Channel, method: str, body: bytes
):
    call = channel.unary_stream(f"/jaxserve.v1.Inference/{method}")
    try:
        list(call(body, timeout=60))
    except grpc.RpcError as refused:
        assert refused.code() in CALLERS_FAULT, refused.details()  # pyright: ignore


def test_every_parameter_arrives_as_it_was_sent():
    asked: dict[str, Any] = {
        "n": 2,
        "temperature": 0.1 + 0.2,  # a double, to the last bit
        "top_k": 0,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": -0.1,
        "frequency_penalty": 0.1,
        "logit_bias": {5: 1.5},
        "allowed_token_ids": (1, 2),
        "bad_words": ("x",),
        "seed": -(2**63),
        "max_tokens": 6,
        "min_tokens": 0,
        "stop": ("é", "b"),
        "stop_token_ids": (3,),
        "ignore_eos": True,
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "logprobs": 0,
        "prompt_logprobs": 1,
    }
    assert asked.keys() == set(SamplingParams.__struct_fields__)
    sent = requests.generate("a", asked, "", 0).SerializeToString()
    arrived = pb.GenerateRequest.FromString(sent).sampling
    assert sampling_params(arrived) == SamplingParams(**asked)
    assert sampling_params(pb.SamplingParams()) == SamplingParams()
