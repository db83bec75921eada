"""The client in its two forms, against a server of the fake model."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from jaxserve.client import AsyncClient, Client, Retries, Sampling, Tls
from jaxserve.client.__main__ import main
from jaxserve.errors import (
    ContextLengthError,
    DeadlineError,
    NotFoundError,
    QueueFullError,
    TooLargeError,
    UnavailableError,
    UsageError,
)
from jaxserve.serving.request import SamplingParams
from jaxserve.serving.rpc.fake_server import FakeServer, fake_server
from jaxserve.serving.rpc.protos import inference_pb2 as pb
from jaxserve.serving.server_options import ServerOptions


@pytest.fixture(scope="module")
def server() -> Iterator[FakeServer]:
    with fake_server(step_s=0.001) as running:
        yield running


@pytest.fixture
def client(server: FakeServer) -> Iterator[Client]:
    with Client(server.target, timeout_s=60) as made:
        yield made


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end, "it does not come to hold"
        time.sleep(0.001)


def test_sampling_names_every_parameter():
    assert set(Sampling.__annotations__) == set(SamplingParams.__struct_fields__)


def test_both_forms_give_the_same(server: FakeServer, client: Client):
    async def answers() -> tuple[object, ...]:
        async with AsyncClient(server.target, timeout_s=60) as aio:
            stream = aio.stream("abc", max_tokens=9, temperature=0.0)
            tokens = [token async for chunk in stream for token in chunk.token_ids]
            return (
                tokens,
                stream.completes[0].finish_reason,
                (await aio.generate("abc", max_tokens=9, temperature=0.0)).completions,
                (await aio.score("abc", 2)).logprobs,
                await aio.tokenize("abc"),
                await aio.detokenize([97, 98]),
                await aio.model_info(),
                (await aio.server_info()).state,
                (await aio.load()).total_pages,
                await aio.abort("unknown"),
            )

    stream = client.stream("abc", max_tokens=9, temperature=0.0)
    tokens = [token for chunk in stream for token in chunk.token_ids]
    assert asyncio.run(answers()) == (
        tokens,
        stream.completes[0].finish_reason,
        client.generate("abc", max_tokens=9, temperature=0.0).completions,
        client.score("abc", 2).logprobs,
        client.tokenize("abc"),
        client.detokenize([97, 98]),
        client.model_info(),
        client.server_info().state,
        client.load().total_pages,
        client.abort("unknown"),
    )
    assert len(tokens) == 9


def test_every_parameter_travels(client: Client):
    answer = client.generate(
        "abc",
        n=1,
        temperature=0.5,
        top_k=5,
        top_p=0.9,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=0.1,
        frequency_penalty=0.1,
        logit_bias={5: 1.0},
        allowed_token_ids=range(200),
        bad_words="x",
        seed=3,
        max_tokens=6,
        min_tokens=2,
        stop=("qq",),
        stop_token_ids=[256],
        ignore_eos=True,
        include_stop_str_in_output=True,
        skip_special_tokens=False,
        logprobs=1,
        prompt_logprobs=1,
        priority=3,
    )
    assert answer.seed == 3
    assert len(answer.prompt_logprobs) == 3


@pytest.mark.parametrize(
    ("prompt", "sampling", "error", "says"),
    [
        ("a", {"temperature": -1}, UsageError, "temperature"),
        ("a", {"temprature": 1}, UsageError, "temprature"),
        ("a", {"max_tokens": "many"}, UsageError, "cannot be sent"),
        ("a" * 600, {}, ContextLengthError, "512"),
        ("a" * (5 << 20), {}, TooLargeError, "limit"),
        ([], {}, UsageError, "empty"),
        ([-1], {}, UsageError, "cannot be sent"),
        ([{"role": "user", "content": "x", "name": "y"}], {}, UsageError, "name"),
        ([{"role": "user"}], {}, UsageError, "content"),
    ],
    ids=["range", "name", "type", "context", "size", "empty", "negative", "extra", "missing"],
)
def test_errors_are_those_of_the_library(
    client: Client, prompt: object, sampling: dict[str, object], error: type, says: str
):
    with pytest.raises(error, match=says):
        client.generate(prompt, **sampling)  # pyright: ignore


def test_an_error_notes_the_id_of_its_request(client: Client):
    with pytest.raises(UsageError) as caught:
        client.generate("a", n=0, request_id="noted")
    assert caught.value.__notes__ == ["request noted"]


def test_a_stream_ends_with_its_error(server: FakeServer, client: Client):
    async def read() -> None:
        async with AsyncClient(server.target) as aio:
            async for _ in aio.stream("abc", max_tokens=500, ignore_eos=True, timeout_s=0.1):
                pass

    with pytest.raises(DeadlineError):
        list(client.stream("abc", max_tokens=500, ignore_eos=True, timeout_s=0.1))
    with pytest.raises(DeadlineError):
        asyncio.run(read())


def test_leaving_a_stream_ends_its_request(server: FakeServer, client: Client):
    for _ in client.stream("abc", max_tokens=500, ignore_eos=True):
        break
    until(lambda: not server.service.engine.busy)

    async def leave() -> None:
        async with AsyncClient(server.target) as aio:
            async with aio.stream("abc", max_tokens=500, ignore_eos=True) as stream:
                async for _ in stream:
                    break
            await asyncio.to_thread(until, lambda: not server.service.engine.busy)

    asyncio.run(leave())


def test_what_has_not_begun_is_tried_again():
    """The server comes up while the client already calls."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
    retries = Retries(attempts=5, first_s=0.3, longest_s=2.0)
    done: list[int] = []

    def ask() -> None:
        with Client(f"127.0.0.1:{port}", retries=retries, timeout_s=60) as client:
            done.append(client.generate("abc", max_tokens=2).usage.output_tokens)

    asking = threading.Thread(target=ask)
    asking.start()
    time.sleep(0.2)  # so that the first attempt has failed; without it the test only proves less
    with fake_server(ServerOptions(grpc_port=port)):
        asking.join(60)
    assert done == [2]


class Flaky(grpc.GenericRpcHandler):
    """Fails as told, and counts how often it is asked."""

    def __init__(self, code: grpc.StatusCode, failures: int, after_chunks: int = 0) -> None:
        self.code, self.failures, self.after_chunks = code, failures, after_chunks
        self.asked = 0

    def service(self, handler_call_details: grpc.HandlerCallDetails):
        return grpc.unary_stream_rpc_method_handler(
            self._handle, response_serializer=pb.GenerateResponse.SerializeToString
        )

    def _handle(self, _: bytes, context: grpc.ServicerContext) -> Iterator[pb.GenerateResponse]:
        self.asked += 1
        for _chunk in range(self.after_chunks):
            yield pb.GenerateResponse(chunk=pb.Chunk(text="a"))
        if self.asked <= self.failures:
            context.abort(self.code, "not now")
        yield pb.GenerateResponse(chunk=pb.Chunk(text="b"))


@pytest.mark.parametrize(
    ("flaky", "error", "asked"),
    [
        (Flaky(grpc.StatusCode.UNAVAILABLE, 2), None, 3),
        (Flaky(grpc.StatusCode.RESOURCE_EXHAUSTED, 2), None, 3),
        (Flaky(grpc.StatusCode.UNAVAILABLE, 9), UnavailableError, 4),
        (Flaky(grpc.StatusCode.RESOURCE_EXHAUSTED, 9), QueueFullError, 4),
        (Flaky(grpc.StatusCode.NOT_FOUND, 2), NotFoundError, 1),
        (Flaky(grpc.StatusCode.UNAVAILABLE, 2, after_chunks=1), UnavailableError, 1),
    ],
    ids=["unavailable", "full", "always", "always full", "other code", "after a chunk"],
)
def test_only_what_may_be_tried_again_is(flaky: Flaky, error: type | None, asked: int):
    with ThreadPoolExecutor(4) as pool:
        server = grpc.server(pool, handlers=[flaky])
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        retries = Retries(attempts=4, first_s=0.01, longest_s=0.05)
        try:
            with Client(f"127.0.0.1:{port}", retries=retries, timeout_s=60) as client:
                if error is None:
                    assert [chunk.text for chunk in client.stream("x")] == ["b"]
                else:
                    with pytest.raises(error, match="not now"):
                        list(client.stream("x"))
        finally:
            server.stop(None).wait()
    assert flaky.asked == asked


def test_a_key_does_not_travel_unencrypted():
    with pytest.raises(UsageError, match="tls"):
        Client("models.example.com:8001", api_key="secret-key-0123456789")


def test_settings_that_mean_nothing_are_refused():
    with pytest.raises(UsageError, match="attempts"):
        Retries(6)
    with pytest.raises(UsageError, match="first_s"):
        Retries(first_s=0)
    with pytest.raises(UsageError, match="both or neither"):
        Client(tls=Tls(cert=Path("cert.pem")))


def test_the_command_prints_the_text_as_it_comes(
    server: FakeServer, client: Client, capsys: pytest.CaptureFixture[str]
):
    command = ["abc", "--target", server.target, "--max-tokens", "5", "--temperature", "0"]
    assert main(command) == 0
    text = client.generate("abc", max_tokens=5, temperature=0.0).completions[0].text
    assert capsys.readouterr().out == text + "\n"
    assert main([*command, "--chat"]) == 0
    assert main(["abc", "--target", server.target, "--top-p", "7"]) == 2
    assert "top_p" in capsys.readouterr().err
