"""The routes that tell of the server, tokenise, or operate it."""

import asyncio
import json
import logging
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

import jaxserve
from jaxserve.serving.fake_service import CONTEXT, byte_tokenizer, fake_service
from jaxserve.serving.http.app import create_admin_app
from jaxserve.serving.http.background import BackgroundServer, serve_in_background
from jaxserve.serving.server_options import ServerOptions
from jaxserve.serving.service import State

OPTIONS = ServerOptions(model_name="fake")


@pytest.fixture(scope="module")
def server() -> Iterator[BackgroundServer]:
    with serve_in_background(fake_service, OPTIONS) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: BackgroundServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=30) as client:
        yield client


def test_the_model_is_listed_and_described(client: httpx.Client) -> None:
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list"
    (model,) = listed["data"]
    assert model == client.get("/v1/models/fake").json()
    assert model["id"] == "fake"
    assert model["object"] == "model"
    assert model["owned_by"] == "jaxserve"
    assert model["created"] == 1_700_000_000
    assert model["max_model_len"] == CONTEXT
    assert client.get("/v1/models/org/other").json()["error"]["code"] == "model_not_found"


def test_the_version_is_that_of_the_package(client: httpx.Client) -> None:
    assert client.get("/version").json() == {"version": jaxserve.__version__}


@pytest.mark.parametrize(
    ("state", "live", "ready"),
    [
        (State.STARTING, 200, 503),
        (State.READY, 200, 200),
        (State.DRAINING, 200, 503),
        (State.DEAD, 503, 503),
    ],
)
def test_health_follows_the_state(
    server: BackgroundServer,
    client: httpx.Client,
    monkeypatch: pytest.MonkeyPatch,
    state: State,
    live: int,
    ready: int,
) -> None:
    monkeypatch.setattr(server.service, "_state", state)
    for path, status in (("/health", live), ("/health/ready", ready)):
        response = client.get(path)
        assert response.status_code == status
        assert response.json()["status"] == state
        assert bool(response.json()["reason"]) == (state is not State.READY)
        assert client.head(path).status_code == status
    assert client.get("/v2/health/live").status_code == live
    assert client.get("/v2/health/ready").json() == {"ready": ready == 200}
    assert client.get("/v2/models/fake/ready").status_code == ready


def test_the_load_is_that_of_the_engine(client: httpx.Client) -> None:
    before = client.get("/load").json()
    client.post("/v1/completions", json={"prompt": "hi", "max_tokens": 7, "ignore_eos": True})
    after = client.get("/load").json()
    assert after["generated_tokens"] == before["generated_tokens"] + 7
    assert after["running"] == 0
    assert after["total_pages"] == after["free_pages"] == 256


def test_metrics_are_prometheus_text(client: httpx.Client) -> None:
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    assert 'vllm:num_requests_running{engine="0",model_name="fake"}' in response.text
    assert "jaxserve_generation_tokens_total" in response.text


def test_text_becomes_tokens_and_text_again(client: httpx.Client) -> None:
    body = client.post("/tokenize", json={"prompt": "hé", "return_token_strs": True}).json()
    assert body == {
        "count": 3,
        "max_model_len": CONTEXT,
        "tokens": list("hé".encode()),
        "token_strs": ["h", "bytes:\\xc3", "bytes:\\xa9"],
    }
    back = client.post("/detokenize", json={"tokens": body["tokens"]}).json()
    assert back == {"prompt": "hé"}


def test_a_long_text_is_tokenised_like_a_short_one(client: httpx.Client) -> None:
    text = "ab " * 40_000
    tokens = client.post("/tokenize", json={"prompt": text}).json()["tokens"]
    assert tokens == byte_tokenizer().encode(text)
    assert client.post("/detokenize", json={"tokens": tokens}).json()["prompt"] == text


def test_a_conversation_becomes_tokens(client: httpx.Client) -> None:
    asked = {"messages": [{"role": "user", "content": "hi"}], "add_generation_prompt": False}
    assert bytes(client.post("/tokenize", json=asked).json()["tokens"]) == b"[user]hi\n"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}),
        ("/tokenize", {"prompt": 5}),
        ("/tokenize", {"prompt": "a", "other": 1}),
        ("/detokenize", {"tokens": [257]}),
        ("/detokenize", {"tokens": "abc"}),
        ("/detokenize", {}),
    ],
)
def test_what_cannot_be_tokenised_is_refused(client: httpx.Client, path: str, body: Any) -> None:
    response = client.post(path, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["message"]


def test_the_reference_tells_of_every_route_and_field(
    server: BackgroundServer, client: httpx.Client
) -> None:
    page = client.get("/docs").text
    schema = client.get("/openapi.json").json()
    for path in schema["paths"]:
        assert f"<code>{path}</code>" in page
    for field in schema["components"]["schemas"]["CompletionRequest"]["properties"]:
        assert f"<code>{field}</code>" in page
    assert "http" not in page.split("</style>")[1], "nothing is fetched from elsewhere"


def test_pages_run_only_what_they_hold(client: httpx.Client) -> None:
    for path in ("/", "/docs"):
        response = client.get(path)
        policy = response.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src ")
        assert "unsafe" not in policy
        assert response.headers["x-content-type-options"] == "nosniff"
        assert "https://" not in response.text


def test_requests_are_logged_without_what_they_say(
    client: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "jaxserve"):
        body = {"prompt": "a secret", "max_tokens": 1, "user": "team 7"}
        client.post("/v1/completions", json=body, headers={"x-request-id": "logged"})
        client.get("/health")
        client.get("/a%0Ab")
    assert not [r for r in caplog.records if "\n" in r.getMessage()]
    (record,) = [r for r in caplog.records if getattr(r, "request_id", "") == "logged"]
    assert (record.method, record.path, record.status) == ("POST", "/v1/completions", 200)  # pyright: ignore[reportAttributeAccessIssue]
    assert record.user == "team 7"  # pyright: ignore[reportAttributeAccessIssue]
    assert "secret" not in json.dumps([r.__dict__ for r in caplog.records], default=str)
    assert not [r for r in caplog.records if getattr(r, "path", "") == "/health"]


def test_prompts_are_logged_where_the_operator_asks(caplog: pytest.LogCaptureFixture) -> None:
    options = ServerOptions(model_name="fake", log_prompts=True)
    with (
        caplog.at_level(logging.INFO, "jaxserve"),
        serve_in_background(fake_service, options) as server,
    ):
        httpx.post(server.url + "/v1/completions", json={"prompt": "a secret", "max_tokens": 1})
    assert any("a secret" in getattr(record, "body", "") for record in caplog.records)


@pytest.fixture
def admin() -> Iterator[tuple[BackgroundServer, httpx.Client]]:
    with (
        serve_in_background(fake_service, OPTIONS, create_admin_app) as server,
        httpx.Client(base_url=server.url, timeout=30) as client,
    ):
        yield server, client


def test_the_admin_port_has_the_admin_routes_alone(
    admin: tuple[BackgroundServer, httpx.Client], client: httpx.Client
) -> None:
    body = admin[1].get("/admin/load").json()
    assert body["state"] == "ready"
    assert body["load"]["free_pages"] == 256
    assert admin[1].get("/v1/models").status_code == 404
    assert client.get("/admin/load").status_code == 404


def test_an_operator_drains_a_server(admin: tuple[BackgroundServer, httpx.Client]) -> None:
    server, client = admin
    assert client.post("/admin/drain").json()["state"] == "draining"
    assert server.service.state is State.DRAINING


def test_an_operator_takes_one_trace_at_a_time(
    admin: tuple[BackgroundServer, httpx.Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, client = admin
    assert client.post("/admin/profile", json={"seconds": 1}).status_code == 501
    begun, over = asyncio.Event(), asyncio.Event()

    async def profile(seconds: float) -> str:
        begun.set()
        await over.wait()
        return f"trace of {seconds}"

    async def twice() -> tuple[httpx.Response, httpx.Response]:
        async with httpx.AsyncClient(base_url=server.url) as client:
            first = asyncio.ensure_future(client.post("/admin/profile", json={"seconds": 2}))
            await begun.wait()
            second = await client.post("/admin/profile")
            over.set()
            return await first, second

    monkeypatch.setattr(server.service, "profile", profile)
    first, second = server.run(twice())
    assert first.json() == {"folder": "trace of 2.0"}
    assert second.status_code == 409
    assert client.post("/admin/profile", json={"seconds": 61}).status_code == 400
