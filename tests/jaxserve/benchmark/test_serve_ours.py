"""The load generator against our own servers, over both interfaces, without a model."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

pytest.importorskip("grpc", reason="grpcio is not installed")
uvicorn = pytest.importorskip("uvicorn", reason="uvicorn is not installed")

from jaxserve.benchmark.serve import ServeJob, measure  # noqa: E402
from jaxserve.benchmark.serve_grpc import GrpcTarget  # noqa: E402
from jaxserve.benchmark.serve_openai import Api, OpenAITarget  # noqa: E402
from jaxserve.benchmark.serve_report import ServeResult  # noqa: E402
from jaxserve.benchmark.serve_target import CallError, Target  # noqa: E402
from jaxserve.serving.fake_service import fake_service  # noqa: E402
from jaxserve.serving.http.app import create_app  # noqa: E402
from jaxserve.serving.rpc.server import create_server, listen  # noqa: E402
from jaxserve.serving.server_options import ServerOptions  # noqa: E402

JOB = ServeJob(requests=6, seed=2, scale=0.05)
KEY = "a-key-long-enough"


@asynccontextmanager
async def http_server(options: ServerOptions, **service) -> AsyncIterator[str]:
    async with fake_service(**service) as made:
        config = uvicorn.Config(
            create_app(made, options), host="127.0.0.1", port=0, lifespan="off", log_level="error"
        )
        server = uvicorn.Server(config)
        task = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.001)
        try:
            yield f"127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        finally:
            server.should_exit = True
            await task


@asynccontextmanager
async def grpc_server(options: ServerOptions, **service) -> AsyncIterator[str]:
    async with fake_service(**service) as made:
        server = create_server(made, options)
        port = listen(server, options)
        await server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            await server.stop(0)


def http_target(address: str, **settings) -> Target:
    return OpenAITarget(f"http://{address}", **settings)


def asked(serving, target, job: ServeJob = JOB, key: str | None = None, **service) -> ServeResult:
    """Returns the result of a job; `serving` runs the server and `target` reaches it."""
    options = ServerOptions(grpc_port=0)

    async def go() -> ServeResult:
        async with serving(options, **service) as address:
            return await measure(target(address, api_key=key), job)

    return asyncio.run(go())


WAYS = [
    pytest.param(http_server, http_target, id="http"),
    pytest.param(grpc_server, GrpcTarget, id="grpc"),
]


@pytest.mark.parametrize(("serving", "target"), WAYS)
def test_both_interfaces_give_every_token(serving, target):
    result = asked(serving, target)
    assert result.errors == []
    facts = result.facts
    assert (facts.model, facts.context, facts.vocab_size) == ("fake", 512, 257)
    assert (facts.prompts, facts.ignore_eos, facts.counted) == ("token ids", True, "usage")


def test_both_interfaces_count_alike():
    over_http = asked(http_server, http_target).runs[0].records
    over_grpc = asked(grpc_server, GrpcTarget).runs[0].records
    for one, other in zip(over_http, over_grpc, strict=True):
        assert one.output_tokens == other.output_tokens > 0
        assert one.prompt_tokens == other.prompt_tokens > 0


def test_chats_are_answered():
    job = ServeJob(requests=3, seed=2, scale=0.02, context=64)
    result = asked(http_server, lambda at, api_key: http_target(at, api=Api.CHAT), job)
    assert result.errors == []
    assert result.facts.prompts == "words"


@pytest.mark.parametrize(("serving", "target"), WAYS)
def test_a_full_server_refuses(serving, target):
    """Each request takes a second's steps, and no more than two may be under way."""
    job = ServeJob(requests=8, seed=2, scale=0.05)
    crowded = {"step_s": 0.02, "num_slots": 1, "max_queued_requests": 1, "max_step_tokens": 32}
    fields = asked(serving, target, job, **crowded).fields()["rates"][0]
    assert fields["refused"] > 0
    assert fields["failed"] == 0
    assert fields["completed"] + fields["refused"] == 8


@pytest.mark.parametrize(("serving", "target"), WAYS)
def test_a_key_is_sent(serving, target, tmp_path: Path):
    keys = tmp_path / "keys"
    keys.write_text(f"bench {KEY}\n")

    async def go(key: str | None) -> ServeResult:
        options = ServerOptions(grpc_port=0, api_key_file=keys)
        async with serving(options) as address:
            return await measure(target(address, api_key=key), JOB)

    assert asyncio.run(go(KEY)).errors == []
    with pytest.raises(CallError, match=r"401|UNAUTHENTICATED"):
        asyncio.run(go(None))


def test_a_grpc_server_that_is_not_there_is_an_error():
    async def go() -> None:
        await measure(GrpcTarget("127.0.0.1:1", timeout_s=5.0), JOB)

    with pytest.raises(CallError, match=r"UNAVAILABLE|DEADLINE_EXCEEDED"):
        asyncio.run(go())
