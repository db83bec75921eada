"""A request lives as long as its call: cancels, deadlines, slow readers, crowds, drains."""

import asyncio
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from jaxserve.client import AsyncClient, Client, Retries, Stream
from jaxserve.errors import DeadlineError, GenerationError, QueueFullError, UnavailableError
from jaxserve.serving.fake_runner import FakeRule
from jaxserve.serving.fake_service import VOCAB_SIZE
from jaxserve.serving.pages import GroupLimits
from jaxserve.serving.request import SamplingParams
from jaxserve.serving.rpc.fake_server import FakeServer, fake_server
from jaxserve.serving.rpc.protos import inference_pb2 as pb
from jaxserve.serving.server_options import ServerOptions

ONCE = Retries(1)
PATIENCE_S = 60.0


def until(holds: Callable[[], bool]) -> None:
    """Waits for something that must soon hold."""
    end = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < end, "it does not come to hold"
        time.sleep(0.001)


def begun(client: Client, **changes: object) -> tuple[Stream, object]:
    """Returns a long stream whose first chunk has come, and what keeps it open."""
    stream = client.stream("abc", max_tokens=500, ignore_eos=True, **changes)  # pyright: ignore
    chunks = iter(stream)
    next(chunks)
    return stream, chunks


def steps(server: FakeServer) -> int:
    """Returns how many steps the engine has taken."""
    return server.service.engine.metrics.steps


@pytest.mark.parametrize("leave", ["cancel", "forget", "close"])
def test_leaving_a_stream_gives_its_pages_back_by_the_next_step(leave: str):
    with fake_server(step_s=0.1) as server:
        total = server.free_pages
        client = Client(server.target, retries=ONCE)
        stream, chunks = begun(client)
        assert server.free_pages < total
        if leave == "cancel":
            stream.cancel()
        elif leave == "close":
            client.close()
        del chunks, stream
        asked = steps(server)
        until(lambda: server.free_pages == total)
        # One step may run, one may be on its way; each takes 100 ms, the way there a few.
        assert steps(server) - asked <= 3
        assert server.service.engine.busy is False
        client.close()


def test_a_unary_call_that_is_cancelled_gives_its_pages_back():
    with fake_server(step_s=0.005) as server, grpc.insecure_channel(server.target) as channel:
        total = server.free_pages
        call = channel.unary_unary("/jaxserve.v1.Inference/GenerateUnary")
        sampling = pb.SamplingParams(max_tokens=400, ignore_eos=True)
        request = pb.GenerateRequest(text="abc", sampling=sampling)
        future = call.future(request.SerializeToString())
        until(lambda: server.free_pages < total)
        future.cancel()
        until(lambda: server.free_pages == total)


def test_a_late_answer_is_aborted():
    with fake_server(step_s=0.01) as server, Client(server.target, retries=ONCE) as client:
        total = server.free_pages
        tokens = 0
        with pytest.raises(DeadlineError):
            for chunk in client.stream("abc", max_tokens=500, ignore_eos=True, timeout_s=0.3):
                tokens += len(chunk.token_ids)
        assert 0 < tokens < 100
        until(lambda: server.free_pages == total)


def test_what_would_wait_beyond_its_deadline_is_refused_at_once():
    with fake_server(step_s=0.01, num_slots=1) as server, Client(server.target) as client:
        crowd = [client.stream("abc", max_tokens=60, ignore_eos=True) for _ in range(12)]
        until(lambda: client.load().expected_wait_s > 0.5)
        asked = time.monotonic()
        with pytest.raises(DeadlineError, match="requests wait about"):
            client.generate("abc", max_tokens=1, timeout_s=0.4)
        assert time.monotonic() - asked < 0.4
        for stream in crowd:
            stream.cancel()


def test_the_server_has_a_deadline_of_its_own():
    options = ServerOptions(grpc_port=0, request_timeout_s=0.2)
    with fake_server(options, step_s=0.01) as server, Client(server.target) as client:
        total = server.free_pages
        with pytest.raises(DeadlineError, match=r"0\.2 s"):
            client.generate("abc", max_tokens=500, ignore_eos=True)
        until(lambda: server.free_pages == total)


def test_a_slow_reader_delays_nobody_and_loses_nothing():
    """Its answer is far larger than what the connection holds, so the server must wait for it."""
    with (
        fake_server(step_s=0.0005) as server,
        Client(server.target, retries=ONCE) as slow,
        Client(server.target, retries=ONCE) as fast,
    ):
        # 21 log-probabilities a token: about 500 KB, and the window has 64 KB.
        stream = slow.stream("abc", max_tokens=500, ignore_eos=True, logprobs=20, seed=1)
        until(lambda: steps(server) > 5)
        done = fast.generate("xyz", max_tokens=100, temperature=0.0, ignore_eos=True)
        assert len(done.completions[0].token_ids) == 100
        until(lambda: not server.service.engine.busy)  # the slow one too, though nobody reads
        chunks = list(stream)
        tokens = [token for chunk in chunks for token in chunk.token_ids]
        params = SamplingParams(temperature=1.0, seed=1)
        assert tokens == FakeRule(VOCAB_SIZE).continue_prompt(list(b"abc"), params, 500)
        assert len(chunks) < 500  # what waited was merged
        assert sum(len(chunk.logprobs) for chunk in chunks) == 500


def test_a_client_that_dies_gives_its_pages_back():
    with fake_server(step_s=0.01) as server:
        total = server.free_pages
        command = [sys.executable, "-m", "jaxserve.client", "abc", "--max-tokens", "500"]
        with subprocess.Popen([*command, "--target", server.target]) as client:
            until(lambda: server.free_pages < total)
            client.kill()
        until(lambda: server.free_pages == total)


def test_a_thousand_streams_run_side_by_side():
    pool = (GroupLimits(num_pages=4096),)

    async def read_all(target: str) -> list[list[int]]:
        async def read(index: int) -> list[int]:
            prompt = [index % 250, index // 250, 7]
            stream = client.stream(prompt, max_tokens=20, temperature=0.0, ignore_eos=True)
            return [token async for chunk in stream for token in chunk.token_ids]

        async with AsyncClient(target, retries=ONCE) as client:
            return await asyncio.gather(*map(read, range(1000)))

    with fake_server(num_slots=64, max_step_tokens=512, groups=pool) as server:
        total = server.free_pages
        answers = asyncio.run(read_all(server.target))
        rule, greedy = FakeRule(VOCAB_SIZE), SamplingParams(temperature=0.0)
        for index, tokens in enumerate(answers):
            assert tokens == rule.continue_prompt([index % 250, index // 250, 7], greedy, 20)
        assert server.free_pages == total


def test_what_is_too_much_is_refused_with_a_time_to_come_again():
    options = ServerOptions(grpc_port=0, max_requests=4)
    with (
        fake_server(options, step_s=0.01) as server,
        Client(server.target, retries=ONCE) as client,
        grpc.insecure_channel(server.target) as channel,
    ):
        streams = [begun(client) for _ in range(4)]
        call = channel.unary_unary("/jaxserve.v1.Inference/GetLoad")
        with pytest.raises(grpc.RpcError) as caught:
            call(b"")
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        failed: Any = caught.value
        assert int(dict(failed.trailing_metadata())["grpc-retry-pushback-ms"]) > 0
        with pytest.raises(QueueFullError, match="4 requests"):
            client.load()
        for stream, _ in streams:
            stream.cancel()
        until(lambda: server.service.engine.busy is False)
        with Client(server.target) as patient:
            assert patient.load().running == 0


def test_a_server_that_drains_ends_what_it_has_and_takes_no_more():
    with fake_server(step_s=0.005) as server, Client(server.target, retries=ONCE) as client:
        stream, chunks = begun(client)
        server.loop.call_soon_threadsafe(server.service.drain)
        until(lambda: client.server_info().state == "draining")
        with pytest.raises(UnavailableError, match="no new requests"):
            client.generate("abc")
        assert sum(len(chunk.token_ids) for chunk in chunks) > 400  # pyright: ignore
        assert stream.completes[0].finish_reason == pb.FINISH_REASON_LENGTH


def test_an_engine_that_ends_fails_its_streams():
    with fake_server(step_s=0.005) as server, Client(server.target, retries=ONCE) as client:
        _, chunks = begun(client)
        server.run(server.service.stop())
        with pytest.raises(UnavailableError, match="stopped"):
            list(chunks)  # pyright: ignore
        assert client.server_info().state == "dead"


def test_a_step_that_fails_is_told_and_the_next_request_is_served():
    with fake_server(step_s=0.002) as server, Client(server.target, retries=ONCE) as client:
        runner = server.service.engine._runner
        _, chunks = begun(client)
        runner.fail_collect(RuntimeError("the device is gone"))  # pyright: ignore
        with pytest.raises(GenerationError):
            list(chunks)  # pyright: ignore
        assert client.generate("abc", max_tokens=3).usage.output_tokens == 3
