"""An engine in its own process dies or hangs while gRPC stands before it."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

import grpc
import pytest
from grpc_health.v1 import health_pb2

from jaxserve.client import Client, Retries
from jaxserve.errors import UnavailableError
from jaxserve.serving.fake_runner import FakeRule
from jaxserve.serving.fake_service import VOCAB_SIZE
from jaxserve.serving.request import SamplingParams
from jaxserve.serving.rpc.fake_server import FakeServer, fake_server

GREEDY = {"temperature": 0.0, "ignore_eos": True}
ONCE = Retries(1)
SERVING, NOT_SERVING = 1, 2


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end, "it does not come to hold"
        time.sleep(0.001)


@pytest.fixture(scope="module")
def running() -> Iterator[FakeServer]:
    with fake_server(remote=True, step_s=0.005, num_slots=2) as made:
        yield made


@pytest.fixture
def server(running: FakeServer) -> FakeServer:
    until(lambda: running.service.state == "ready")
    return running


def expected(prompt: list[int], count: int) -> list[int]:
    params = SamplingParams(temperature=0.0)
    return FakeRule(VOCAB_SIZE).continue_prompt(prompt, params, count)


def kill(server: FakeServer) -> None:
    os.kill(server.service.engine_pid, signal.SIGKILL)


def test_a_remote_engine_gives_the_tokens_of_the_model(server: FakeServer):
    with Client(server.target, retries=ONCE, timeout_s=60) as client:
        stream = client.stream("abc", max_tokens=30, logprobs=1, **GREEDY)
        assert [t for chunk in stream for t in chunk.token_ids] == expected(list(b"abc"), 30)
        usage = stream.completes[0].usage
        assert usage.HasField("queue_ns") and usage.HasField("prefill_ns") and usage.decode_ns > 0


def test_streams_learn_of_the_death_of_the_engine_within_a_second(server: FakeServer):
    with (
        Client(server.target, retries=ONCE, timeout_s=60) as client,
        grpc.insecure_channel(server.target) as channel,
    ):
        watch = channel.unary_stream(
            "/grpc.health.v1.Health/Watch",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        told = watch(health_pb2.HealthCheckRequest(), timeout=60)
        assert next(told).status == SERVING
        chunks = iter(client.stream("abc", max_tokens=500, **GREEDY))
        next(chunks)
        kill(server)
        died = time.monotonic()
        with pytest.raises(UnavailableError):
            list(chunks)
        assert time.monotonic() - died < 1.0
        assert [next(told).status, next(told).status] == [NOT_SERVING, SERVING]
        told.cancel()
        answer = client.generate("abc", max_tokens=5, **GREEDY)
        assert list(answer.completions[0].token_ids) == expected(list(b"abc"), 5)


def test_what_had_not_begun_is_answered_by_the_next_engine(server: FakeServer):
    done: dict[int, list[int]] = {}
    failed: list[UnavailableError] = []

    def ask(index: int) -> None:
        try:
            answer = client.generate([index, 7], max_tokens=200, **GREEDY)
            done[index] = list(answer.completions[0].token_ids)
        except UnavailableError as error:
            failed.append(error)

    with Client(server.target, retries=ONCE, timeout_s=60) as client:
        asking = [threading.Thread(target=ask, args=(index,)) for index in range(6)]
        for thread in asking:
            thread.start()
        until(lambda: (client.load().running, client.load().waiting) == (2, 4))
        kill(server)
        for thread in asking:
            thread.join(60)
    assert len(failed) == 2  # those that were generating
    assert len(done) == 4
    assert all(tokens == expected([index, 7], 200) for index, tokens in done.items())
