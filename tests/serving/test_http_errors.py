"""Every refusal: its status, its body, and that nothing of it reaches the engine."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from jaxserve.serving.fake_service import byte_tokenizer, fake_service
from jaxserve.serving.gate import Gate
from jaxserve.serving.http.app import create_app
from jaxserve.serving.http.background import BackgroundServer, serve_in_background
from jaxserve.serving.http.guard import OPEN_PATHS
from jaxserve.serving.server_options import ServerOptions

KEY, OTHER = "sesame-0123456789abcdef", "mellon-0123456789abcdef"
MAX_BODY = 30_000
POST = {"prompt": "hi", "max_tokens": 2}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BackgroundServer]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"# who may\nalice {KEY}\nbob {OTHER}\n")
    options = ServerOptions(
        model_name="fake",
        api_key_file=keys,
        max_body_bytes=MAX_BODY,
        max_prompt_tokens=200,
        cors_origins=("https://chat.example",),
    )
    with serve_in_background(fake_service, options) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: BackgroundServer) -> Iterator[httpx.Client]:
    headers = {"authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=server.url, timeout=30, headers=headers) as client:
        yield client


def refused(response: httpx.Response, status: int) -> dict[str, Any]:
    """Returns the error of a refusal, after checking its form."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert len(response.headers["x-request-id"]) == 32
    body = response.json()
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    return body["error"]


def test_unknown_routes_and_methods_are_errors_of_the_same_form(client: httpx.Client) -> None:
    assert refused(client.get("/v1/nothing"), 404)["code"] == "route_not_found"
    assert refused(client.post("/v1/completions/", json=POST), 404)["code"] == "route_not_found"
    wrong = client.get("/v1/completions")
    assert refused(wrong, 405)["code"] == "method_not_allowed"
    assert wrong.headers["allow"] == "POST"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize"])
def test_another_model_is_not_found(client: httpx.Client, path: str) -> None:
    body = {"model": "other", "prompt": "x", "messages": [{"role": "user", "content": "x"}]}
    body.pop("messages" if path != "/v1/chat/completions" else "prompt")
    error = refused(client.post(path, json=body), 404)
    assert error["code"] == "model_not_found"
    assert "use 'fake'" in error["message"]


def test_every_route_but_health_needs_a_key(server: BackgroundServer) -> None:
    with httpx.Client(base_url=server.url) as stranger:
        routes = [
            (method.upper(), path.replace("{name}", "fake"))
            for path, methods in server.app.openapi()["paths"].items()
            for method in methods
        ]
        assert len(routes) > 15
        for method, path in [*routes, ("GET", "/"), ("GET", "/docs"), ("GET", "/openapi.json")]:
            response = stranger.request(method, path)
            if path in OPEN_PATHS:
                assert response.status_code == 200
            else:
                error = refused(response, 401)
                assert error["type"] == "authentication_error"
                assert "www-authenticate" in response.headers


def test_metrics_may_be_open_and_nothing_else(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"one {KEY}\n")
    options = ServerOptions(model_name="fake", api_key_file=keys, open_metrics=True)
    with serve_in_background(fake_service, options) as server:
        answer = httpx.get(server.url + "/metrics")
        assert answer.status_code == 200 and "jaxserve_ready" in answer.text
        for path in ("/v1/models", "/metrics/", "/metricsx"):
            refused(httpx.get(server.url + path), 401)


@pytest.mark.parametrize(
    "authorization",
    ["", "Bearer", "Bearer wrong", f"Token {KEY}", f"Bearer {KEY}x", "Basic !!!", "Bearer \xe9"],
)
def test_a_wrong_key_is_refused(server: BackgroundServer, authorization: str) -> None:
    headers = [(b"authorization", authorization.encode("latin-1"))]
    error = refused(httpx.get(server.url + "/v1/models", headers=headers), 401)
    assert KEY not in error["message"]


def test_a_browser_may_send_the_key_as_password(server: BackgroundServer) -> None:
    assert httpx.get(server.url + "/", auth=("", KEY)).status_code == 200
    assert httpx.get(server.url + "/load", auth=("anyone", OTHER)).status_code == 200
    page = httpx.get(server.url + "/")
    assert page.headers["www-authenticate"].startswith("Basic ")


def test_keys_do_not_share_cached_prompts(server: BackgroundServer) -> None:
    def cached(key: str) -> int:
        response = httpx.post(
            server.url + "/v1/completions",
            headers={"authorization": f"Bearer {key}"},
            json={"prompt": "a secret that fills more than one page of the cache", "max_tokens": 1},
        )
        return response.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert cached(KEY) == 0
    assert cached(KEY) > 0
    assert cached(OTHER) == 0


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, None),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": ["a", []]}, "prompt"),
        ({"prompt": [[]]}, None),
        ({"prompt": [300]}, None),
        ({"prompt": [-1]}, None),
        ({"prompt": ["x"] * 129}, "prompt"),
        ({"prompt": "x" * 201}, None),
        ({"prompt": "x", "max_tokens": 512}, None),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "x", "max_tokens": -1}, "max_tokens"),
        ({"prompt": "x", "max_tokens": True}, "max_tokens"),
        ({"prompt": "x", "temperature": 2.5}, "temperature"),
        ({"prompt": "x", "top_p": 0}, "top_p"),
        ({"prompt": "x", "n": 0}, "n"),
        ({"prompt": "x", "n": 17}, "n"),
        ({"prompt": "x", "n": 2, "temperature": 0}, "n"),
        ({"prompt": "x", "logprobs": 21}, "logprobs"),
        ({"prompt": "x", "seed": 2**63}, "seed"),
        ({"prompt": "x", "stop": ["a"] * 17}, "stop"),
        ({"prompt": "x", "stop": [""]}, "stop"),
        ({"prompt": "x", "stop": "y" * 10_000}, None),
        ({"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias"),
        ({"prompt": "x", "logit_bias": {"999": 1}}, None),
        ({"prompt": "x", "min_tokens": 20}, "min_tokens"),
        ({"prompt": "x", "suffix": "y"}, "suffix"),
        ({"prompt": "x", "best_of": 2}, "best_of"),
        ({"prompt": "x", "stream_options": {}}, "stream_options"),
        ({"prompt": "x", "unheard_of": 1}, "unheard_of"),
        ({"prompt": "x", "user": 5}, "user"),
    ],
)
def test_a_wrong_field_of_a_completion_is_named(
    client: httpx.Client, body: Any, param: str | None
) -> None:
    response = client.post("/v1/completions", json=body)
    if body.get("stop") == "y" * 10_000:
        assert response.status_code == 200  # long, and never found
        return
    error = refused(response, 400)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param, error


def test_log_probabilities_that_could_fill_the_memory_are_refused(client: httpx.Client) -> None:
    body = {"prompt": ["x"] * 128, "n": 16, "max_tokens": 100, "logprobs": 20}
    error = refused(client.post("/v1/completions", json=body), 400)
    assert error["param"] == "logprobs"
    assert "could give 4,300,800 log-probabilities" in error["message"]
    echoed = {"prompt": ["x" * 150] * 128, "max_tokens": 1, "echo": True, "logprobs": 5}
    assert client.post("/v1/completions", json=echoed).status_code in (200, 429)


def test_a_body_that_is_too_large_is_refused_unread(client: httpx.Client) -> None:
    error = refused(client.post("/v1/completions", content=b" " * (MAX_BODY + 1)), 413)
    assert error["code"] == "too_large"
    assert f"{MAX_BODY:,}" in error["message"]
    chunks = (b" " * 1000 for _ in range(MAX_BODY // 1000 + 1))
    refused(client.post("/v1/completions", content=chunks), 413)
    assert client.post("/v1/completions", json=POST).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/json; charset=latin-1"}, 415),
        ({"content-encoding": "gzip"}, 415),
        ({"content-type": "application/json; charset=UTF-8"}, 200),
        ({"content-type": "application/vnd.api+json"}, 200),
        ({"sec-fetch-site": "cross-site", "origin": "https://evil.example"}, 403),
        ({"sec-fetch-site": "cross-site", "origin": "https://chat.example"}, 200),
        ({"sec-fetch-site": "same-origin"}, 200),
    ],
)
def test_only_json_of_our_own_pages_is_read(
    client: httpx.Client, headers: dict[str, str], status: int
) -> None:
    content = b'{"prompt": "hi", "max_tokens": 1}'
    response = client.post("/v1/completions", content=content, headers=headers)
    assert response.status_code == status, response.text
    if status != 200:
        refused(response, status)


def test_other_origins_are_let_in_by_name_only(client: httpx.Client) -> None:
    asks = {"access-control-request-method": "POST", "origin": "https://chat.example"}
    allowed = client.options("/v1/completions", headers=asks)
    assert allowed.headers["access-control-allow-origin"] == "https://chat.example"
    other = client.options("/v1/completions", headers=asks | {"origin": "https://evil.example"})
    assert "access-control-allow-origin" not in other.headers


def test_cors_is_off_unless_asked_for() -> None:
    with serve_in_background(fake_service, ServerOptions(model_name="fake")) as server:
        asks = {"access-control-request-method": "POST", "origin": "https://chat.example"}
        response = httpx.options(server.url + "/v1/completions", headers=asks)
        refused(response, 405)
        assert not [name for name in response.headers if name.startswith("access-control")]


def test_a_sound_request_id_is_kept_and_another_replaced(client: httpx.Client) -> None:
    kept = client.get("/version", headers={"x-request-id": "trace-1.a:b"})
    assert kept.headers["x-request-id"] == "trace-1.a:b"
    body = client.post("/v1/completions", json=POST, headers={"x-request-id": "mine"}).json()
    assert body["id"] == "cmpl-mine"
    for bad in ("x" * 129, "a b", "<script>"):
        replaced = client.get("/version", headers={"x-request-id": bad})
        assert len(replaced.headers["x-request-id"]) == 32


def test_one_request_id_may_be_used_twice_at_once(client: httpx.Client) -> None:
    body = {"prompt": ["a", "b", "c"], "max_tokens": 4, "n": 2}
    headers = {"x-request-id": "same"}
    assert client.post("/v1/completions", json=body, headers=headers).status_code == 200


def test_a_full_gate_is_a_429_that_says_when_to_come_back() -> None:
    gate = Gate(max_requests=1, max_bytes=1 << 20, max_body_bytes=1 << 20)
    options = ServerOptions(model_name="fake")
    with (
        serve_in_background(
            fake_service, options, lambda service, o: create_app(service, o, gate=gate)
        ) as server,
        gate.enter(),
    ):
        for body in (POST, POST | {"stream": True}):
            response = httpx.post(server.url + "/v1/completions", json=body)
            assert refused(response, 429)["code"] == "queue_full"
            assert int(response.headers["retry-after"]) >= 1
        assert httpx.get(server.url + "/health").status_code == 200


def test_a_full_queue_is_a_429_before_any_of_a_stream() -> None:
    def crowded() -> Any:
        return fake_service(0.02, num_slots=1, max_queued_requests=1)

    with (
        serve_in_background(crowded, ServerOptions(model_name="fake")) as server,
        httpx.Client(base_url=server.url, timeout=30) as client,
    ):
        body = {"prompt": ["a", "b", "c", "d"], "max_tokens": 8, "stream": True}
        response = client.post("/v1/completions", json=body)
        assert refused(response, 429)["type"] == "rate_limit_error"
        assert int(response.headers["retry-after"]) >= 1
        # What was admitted before the refusal is gone again.
        assert client.post("/v1/completions", json=POST).status_code == 200


def test_a_draining_server_refuses_with_503() -> None:
    with serve_in_background(fake_service, ServerOptions(model_name="fake")) as server:

        async def drain() -> None:
            server.service.drain()

        server.run(drain())
        response = httpx.post(server.url + "/v1/completions", json=POST)
        assert refused(response, 503)["code"] == "unavailable"
        unread = httpx.post(server.url + "/v1/completions", content=b"no json")
        assert refused(unread, 503)["code"] == "unavailable"
        assert int(response.headers["retry-after"]) >= 1
        assert httpx.get(server.url + "/health").json()["status"] == "draining"
        assert httpx.get(server.url + "/health/ready").status_code == 503


def test_a_request_that_takes_too_long_is_a_504() -> None:
    options = ServerOptions(model_name="fake", request_timeout_s=0.3)
    with serve_in_background(lambda: fake_service(0.05), options) as server:
        body = {"prompt": "hi", "max_tokens": 400, "ignore_eos": True}
        response = httpx.post(server.url + "/v1/completions", json=body, timeout=30)
        assert refused(response, 504)["code"] == "deadline_exceeded"
        streamed = httpx.post(
            server.url + "/v1/completions", json=body | {"stream": True}, timeout=30
        )
        assert streamed.status_code == 200
        assert '"code":"deadline_exceeded"' in streamed.text
        assert streamed.text.endswith("data: [DONE]\n\n")


def test_a_failed_step_is_a_500_and_an_event_after_the_status_line() -> None:
    with (
        serve_in_background(lambda: fake_service(0.02), ServerOptions(model_name="fake")) as server,
        httpx.Client(base_url=server.url, timeout=30) as client,
    ):
        runner = server.service.engine._runner
        runner.fail_collect(ValueError("at 0x7f00 in /srv/secret.py"))
        error = refused(client.post("/v1/completions", json=POST), 500)
        assert error["type"] == "server_error"
        assert "secret" not in error["message"], "no paths, no addresses"
        assert "0x" not in error["message"]
        long = POST | {"max_tokens": 300, "stream": True, "ignore_eos": True}
        with client.stream("POST", "/v1/completions", json=long) as response:
            assert response.status_code == 200
            lines = response.iter_lines()
            next(lines)
            runner.fail_dispatch(ValueError("again"))
            rest = [line for line in lines if line]
        assert rest[-2].startswith('data: {"error":{"message":')
        assert rest[-1] == "data: [DONE]"
        assert client.post("/v1/completions", json=POST).status_code == 200


def test_where_the_model_lies_is_not_told() -> None:
    tokenizer = byte_tokenizer()
    bare = replace(
        tokenizer,
        origin="/srv/models/secret",
        config=replace(tokenizer.config, chat_templates=None),
    )

    def app(service: Any, options: ServerOptions) -> Any:
        service.intake = replace(service.intake, tokenizer=bare)
        return create_app(service, options)

    with serve_in_background(fake_service, ServerOptions(model_name="fake"), app) as server:
        body = {"messages": [{"role": "user", "content": "hi"}]}
        for path in ("/v1/chat/completions", "/tokenize"):
            error = refused(httpx.post(server.url + path, json=body), 400)
            assert error["param"] == "messages"
            assert "this model has no chat template" in error["message"]
            assert "/srv" not in error["message"]
        model = httpx.get(server.url + "/v1/models/fake").json()
        assert model["has_chat_template"] is False
