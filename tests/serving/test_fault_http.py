"""What clients do wrong, by accident or on purpose, and that nobody else notices."""

import asyncio
import json
import random
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import httpx
import pytest

from jaxserve.serving import streams
from jaxserve.serving.fake_service import fake_service, remote_fake
from jaxserve.serving.http.app import create_app
from jaxserve.serving.http.background import BackgroundServer, serve_in_background
from jaxserve.serving.http.limits import ConnectionLimits, RequestLimits
from jaxserve.serving.server_options import ServerOptions
from jaxserve.serving.service import Service

OPTIONS = ServerOptions(model_name="fake")
STEP_S = 0.02
LONG = {"prompt": "hello", "max_tokens": 400, "ignore_eos": True, "stream": True}
SHORT = {"prompt": "hello", "max_tokens": 2}
SHORT_LIMITS = ConnectionLimits(head_timeout_s=0.3, keep_alive_s=1)
PATIENCE_S = 20.0


def make_app(service: Service, options: ServerOptions) -> Any:
    return create_app(
        service, options, limits=RequestLimits(body_timeout_s=0.3, write_timeout_s=0.5)
    )


@pytest.fixture
def server() -> Iterator[BackgroundServer]:
    with serve_in_background(lambda: fake_service(STEP_S), OPTIONS) as server:
        yield server


@pytest.fixture(scope="module")
def quick() -> Iterator[BackgroundServer]:
    with serve_in_background(fake_service, OPTIONS, make_app, SHORT_LIMITS) as server:
        yield server


def until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, f"{what} within {PATIENCE_S} s"
        time.sleep(0.0005)


def request_bytes(body: Any, path: str = "/v1/completions", **headers: str) -> bytes:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "host: x", "content-type: application/json"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    if "content_length" not in headers and "transfer_encoding" not in headers:
        lines.append(f"content-length: {len(content)}")
    return "\r\n".join([*lines, "", ""]).encode() + content


@contextmanager
def connected(server: BackgroundServer) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as connection:
        yield connection


def read_all(connection: socket.socket) -> bytes:
    """Returns what the server sends until it closes."""
    pieces = []
    try:
        while piece := connection.recv(1 << 16):
            pieces.append(piece)
    except ConnectionResetError:
        pass
    return b"".join(pieces)


def exchange(server: BackgroundServer, data: bytes) -> tuple[int, dict[str, Any]]:
    """Returns status and body of the answer to bytes after which the connection is of no use."""
    with connected(server) as connection:
        connection.sendall(data)
        head, _, body = read_all(connection).partition(b"\r\n\r\n")
        return int(head.split()[1]), json.loads(body)


def is_well(server: BackgroundServer) -> None:
    """Checks that the server still answers others, and that nothing is left of the past."""
    response = httpx.post(server.url + "/v1/completions", json=SHORT, timeout=PATIENCE_S)
    assert response.status_code == 200, response.text
    until(lambda: idle(server), "all pages come back")


def idle(server: BackgroundServer) -> bool:
    metrics = server.service.metrics().gauges
    return metrics["running"] == metrics["waiting"] == metrics["pages_held"] == 0


def steps(server: BackgroundServer) -> int:
    return int(server.service.metrics().counters["steps"])


# How a client may go, once its request is under way.


def close(connection: socket.socket) -> None:
    connection.close()


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def half_close(connection: socket.socket) -> None:
    connection.shutdown(socket.SHUT_WR)


def pipeline_and_reset(connection: socket.socket) -> None:
    connection.sendall(request_bytes(LONG))
    reset(connection)


@pytest.mark.parametrize("go", [close, reset, half_close, pipeline_and_reset])
@pytest.mark.parametrize(
    "body",
    [
        LONG,
        LONG | {"n": 4, "temperature": 1},
        LONG | {"prompt": ["a", "b", "c"]},
        LONG | {"stream": False},
    ],
    ids=["stream", "samples", "prompts", "unary"],
)
def test_pages_are_back_two_steps_after_a_client_goes(
    server: BackgroundServer,
    monkeypatch: pytest.MonkeyPatch,
    go: Callable[[socket.socket], None],
    body: dict[str, Any],
) -> None:
    num = len(body["prompt"]) if isinstance(body["prompt"], list) else body.get("n", 1)
    engine = server.service.engine
    aborted: list[int] = []
    abort = engine.abort

    def note(request_id: str) -> None:
        aborted.append(steps(server))
        abort(request_id)

    monkeypatch.setattr(server.service._streams, "send_abort", note)
    with ExitStack() as stack:
        # Somebody else goes on, so that steps are counted.
        other = stack.enter_context(httpx.Client(timeout=PATIENCE_S))
        asked = LONG | {"max_tokens": 480}
        going = stack.enter_context(
            other.stream("POST", server.url + "/v1/completions", json=asked)
        )
        lines = going.iter_lines()
        next(lines)
        connection = stack.enter_context(connected(server))
        connection.sendall(request_bytes(body))
        running = server.service.metrics
        until(lambda: running().gauges["running"] == 1 + num, "the request runs")
        go(connection)
        until(lambda: bool(aborted), "the server notices")
        until(lambda: running().gauges["running"] == 1, "the request ends")
        assert steps(server) - aborted[0] <= 2
        assert next(line for line in lines if line).startswith("data: {")
    is_well(server)


def test_a_client_that_goes_while_its_request_waits_is_forgotten() -> None:
    with serve_in_background(lambda: fake_service(STEP_S, num_slots=1), OPTIONS) as server:
        with connected(server) as first, connected(server) as second:
            first.sendall(request_bytes(LONG))
            until(lambda: server.service.metrics().gauges["running"] == 1, "the first runs")
            second.sendall(request_bytes(LONG | {"stream": False}))
            until(lambda: server.service.metrics().gauges["waiting"] == 1, "the second waits")
            reset(second)
            until(lambda: server.service.metrics().gauges["waiting"] == 0, "it is forgotten")
            assert server.service.metrics().gauges["running"] == 1
        is_well(server)


@pytest.mark.parametrize("part", [1, 20, 100, -1])
def test_a_client_may_go_in_the_middle_of_its_request(quick: BackgroundServer, part: int) -> None:
    for go in (close, reset):
        with connected(quick) as connection:
            connection.sendall(request_bytes(SHORT)[:part])
            go(connection)
    is_well(quick)


def test_an_aborted_request_is_told_so(server: BackgroundServer) -> None:
    with (
        httpx.Client(timeout=PATIENCE_S) as client,
        client.stream("POST", server.url + "/v1/completions", json=LONG) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        (request_id,) = server.service._streams._open
        server.loop.call_soon_threadsafe(server.service.abort, request_id)
        rest = [line for line in lines if line]
    assert '"code":"aborted"' in rest[-2]
    assert rest[-1] == "data: [DONE]"


def test_a_slow_reader_delays_nobody_and_loses_nothing() -> None:
    with (
        serve_in_background(fake_service, OPTIONS) as server,
        slow_socket(server) as connection,
    ):
        asked = LONG | {"n": 4, "temperature": 1, "logprobs": 10, "max_tokens": 450}
        connection.sendall(request_bytes(asked))
        until(lambda: steps(server) >= 450, "the engine is done with it")
        began = time.monotonic()
        is_well(server)
        assert time.monotonic() - began < 5
        text = dechunked(connection)
    assert text.endswith(b"data: [DONE]\n\n")
    frames = [json.loads(line[6:]) for line in text.split(b"\n\n")[:-2]]
    tokens = [0] * 4
    for frame in frames:
        (choice,) = frame["choices"]
        tokens[choice["index"]] += len((choice["logprobs"] or {"tokens": ()})["tokens"])
    assert tokens == [450] * 4


def test_a_reader_too_slow_for_what_it_asked_for_is_told_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(streams, "MAX_PENDING", 5000)
    with (
        serve_in_background(fake_service, OPTIONS) as server,
        slow_socket(server) as connection,
    ):
        connection.sendall(
            request_bytes(
                LONG | {"n": 16, "temperature": 1, "logprobs": 20, "max_tokens": 490, "seed": 1}
            )
        )
        until(lambda: steps(server) > 5 and idle(server), "it is dropped, or done")
        text = dechunked(connection)
    assert text.endswith(b"data: [DONE]\n\n")
    error = json.loads(text.split(b"\n\n")[-3][6:])["error"]
    assert error["code"] == "queue_full"
    assert "read faster" in error["message"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_reader_that_takes_nothing_is_dropped(quick: BackgroundServer, stream: bool) -> None:
    assert quick.http is not None
    connections = quick.http.server_state.connections
    until(lambda: not connections, "the others go")
    with slow_socket(quick) as connection:
        asked = LONG | {"n": 16, "temperature": 1, "logprobs": 20, "max_tokens": 490}
        connection.sendall(request_bytes(asked | {"stream": stream}))
        until(lambda: bool(connections), "it is under way")
        until(lambda: not connections, "it is dropped")
        assert not read_all(connection).endswith((b"data: [DONE]\n\n\r\n0\r\n\r\n", b"}}}"))
    is_well(quick)


def test_endless_headers_are_cut_off(quick: BackgroundServer) -> None:
    with connected(quick) as connection, suppress(ConnectionError):
        sent = connection.send(b"GET / HTTP/1.1\r\nhost: x\r\nbig: ")
        while sent < 50 << 20:
            sent += connection.send(b"x" * (1 << 16))
        pytest.fail("50 MB of headers were read")
    is_well(quick)


@contextmanager
def slow_socket(server: BackgroundServer) -> Iterator[socket.socket]:
    """Yields a connection whose client has hardly any room for what it has not read."""
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(PATIENCE_S)
        connection.connect(("127.0.0.1", server.port))
        yield connection


def dechunked(connection: socket.socket) -> bytes:
    """Returns the body of a response in chunks, read to its end."""
    stream = connection.makefile("rb")
    while stream.readline() != b"\r\n":
        pass
    pieces = []
    while size := int(stream.readline(), 16):
        pieces.append(stream.read(size))
        stream.readline()
    return b"".join(pieces)


def test_ten_megabytes_are_refused_unread(quick: BackgroundServer) -> None:
    body = b'{"prompt": "' + b"x" * (10 << 20) + b'"}'
    for headers in ({}, {"transfer-encoding": "chunked"}):
        response = httpx.post(
            quick.url + "/v1/completions",
            content=body if not headers else iter([body[:1000], *[body[1000:]] * 1]),
            headers=headers,
            timeout=PATIENCE_S,
        )
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "too_large"
    with connected(quick) as connection:
        # Who waits to be told to go on is refused at once.
        head = request_bytes(b"", content_length=str(10 << 20), expect="100-continue")
        connection.sendall(head)
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 413 ")
    is_well(quick)


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"prompt":' * 100_000,
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "\\ud83d"}',
        b'{"pro\xc3',
        b'{"prompt": "a\x00b',
        b"{" * 63 + b"}" * 63,
        b"\xef\xbb\xbf{}",
        b'{"prompt": "x", "temperature": 1e9999}',
        b'{"prompt": "x", "seed": ' + b"1" * 100_000 + b"}",
        b"",
        b"null",
    ],
    ids=lambda body: repr(body[:16]),
)
def test_bodies_that_are_no_json_are_refused(quick: BackgroundServer, body: bytes) -> None:
    began = time.monotonic()
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/v2/models/fake/infer"):
        response = httpx.post(quick.url + path, content=body, timeout=PATIENCE_S)
        assert response.status_code == 400, response.text
        assert response.json()["error"]["type"] == "invalid_request_error"
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET / HTTP/1.1\r\nhost: x\r\nbig: " + b"x" * 40_000 + b"\r\n\r\n", 431),
        (b"GET /" + b"x" * 40_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n", 431),
        (b"nonsense\r\n\r\n", 400),
        (b"GET /\xff HTTP/1.1\r\nhost: x\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        (b"GET / HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nhost: x\r\nbad header: 1\r\n\r\n", 400),
        (
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nz\r\n",
            400,
        ),
        (b"GET / HTTP/1.1\r\nhost: x\r\n", 408),
        (b"", 408),
    ],
    ids=lambda value: repr(value[:12]) if isinstance(value, bytes) else None,
)
def test_what_is_no_request_is_refused_and_closed(
    quick: BackgroundServer, data: bytes, status: int
) -> None:
    found, body = exchange(quick, data)
    assert found == status
    assert list(body["error"]) == ["message", "type", "param", "code"]
    is_well(quick)


def test_a_body_that_never_comes_is_not_waited_for(quick: BackgroundServer) -> None:
    found, body = exchange(quick, request_bytes(b'{"prompt"', content_length="5000"))
    assert found == 408
    assert body["error"]["code"] == "body_timeout"


def test_headers_that_trickle_are_not_waited_for(quick: BackgroundServer) -> None:
    with connected(quick) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nhost: x\r\nslow: ")
        connection.settimeout(0.02)
        received = b""
        deadline = time.monotonic() + PATIENCE_S
        while not received:
            assert time.monotonic() < deadline
            connection.sendall(b"a")
            with suppress(TimeoutError):
                received = connection.recv(1 << 16)
    assert received.startswith(b"HTTP/1.1 408 ")


def test_an_idle_connection_is_closed(quick: BackgroundServer) -> None:
    with connected(quick) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert b'"ready"' in read_all(connection)


def test_requests_on_one_connection_are_answered_in_order(quick: BackgroundServer) -> None:
    with connected(quick) as connection:
        prompts = [f"number {at}" for at in range(5)]
        bodies = [{"prompt": one, "max_tokens": 1, "echo": True} for one in prompts]
        connection.sendall(b"".join(request_bytes(body) for body in bodies[:-1]))
        connection.sendall(request_bytes(bodies[-1], connection="close"))
        text = read_all(connection).decode("utf-8", "replace")
    assert [text.index(prompt) for prompt in prompts] == sorted(map(text.index, prompts))
    assert text.count("HTTP/1.1 200 OK") == 5


def test_random_bytes_hurt_nobody(quick: BackgroundServer) -> None:
    rng = random.Random(0)
    whole = request_bytes(LONG)
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 6)):
            at = rng.randrange(len(data))
            data[at : at + rng.randint(0, 4)] = rng.randbytes(rng.randint(0, 4))
        with connected(quick) as connection:
            connection.sendall(data)
            rng.choice((close, reset, half_close))(connection)
    is_well(quick)


async def _at_once(url: str, count: int) -> list[int]:
    limits = httpx.Limits(max_connections=count, max_keepalive_connections=0)
    async with httpx.AsyncClient(limits=limits, timeout=120) as client:
        body = {"prompt": "hi", "max_tokens": 1}
        asked = (client.post(url + "/v1/completions", json=body) for _ in range(count))
        answers = await asyncio.gather(*asked)
        return [answer.status_code for answer in answers]


def test_two_thousand_at_once_are_all_answered_or_refused() -> None:
    count = 2000
    with serve_in_background(fake_service, OPTIONS) as server:
        statuses = asyncio.run(_at_once(server.url, count))
        assert len(statuses) == count
        assert set(statuses) <= {200, 429}
        assert statuses.count(200) >= OPTIONS.max_requests // 2
        is_well(server)


def test_many_open_connections_leave_room_for_another(quick: BackgroundServer) -> None:
    with ExitStack() as stack:
        for _ in range(500):
            stack.enter_context(connected(quick))
        is_well(quick)


def test_a_request_larger_than_the_pool_is_refused() -> None:
    from jaxserve.serving.pages import GroupLimits

    small = (GroupLimits(num_pages=4),)
    with serve_in_background(lambda: fake_service(groups=small), OPTIONS) as server:
        body = {"prompt": "x" * 100, "max_tokens": 100}
        response = httpx.post(server.url + "/v1/completions", json=body)
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "capacity_exceeded"
        is_well(server)


def test_the_death_of_the_engine_is_an_event_and_then_it_is_back() -> None:
    @contextmanager
    def started() -> Iterator[BackgroundServer]:
        with serve_in_background(_Remote, OPTIONS) as server:
            yield server

    with started() as server, httpx.Client(base_url=server.url, timeout=PATIENCE_S) as client:
        with client.stream("POST", "/v1/completions", json=LONG) as response:
            assert response.status_code == 200
            lines = response.iter_lines()
            next(lines)
            deadly = client.post("/v1/completions", json=SHORT | {"prompt": [250]})
            assert deadly.status_code == 503
            assert deadly.json()["error"]["code"] == "unavailable"
            rest = [line for line in lines if line]
        assert '"code":"unavailable"' in rest[-2]
        assert rest[-1] == "data: [DONE]"
        until(lambda: client.get("/health/ready").status_code == 200, "the engine is back")
        assert client.post("/v1/completions", json=SHORT).status_code == 200


class _Remote:
    """A service whose engine is in another process, and dies of the token 250."""

    async def __aenter__(self) -> Service:
        self._service = remote_fake(step_s=STEP_S, die_id=250)
        await self._service.start()
        return self._service

    async def __aexit__(self, *exc: object) -> None:
        await self._service.stop()
