"""The measuring HTTP client against answers given byte for byte."""

import asyncio

import pytest

from jaxserve.benchmark.serve_http import HttpClient, HttpError, StatusError
from jaxserve.errors import UsageError

OK = b"HTTP/1.1 200 OK\r\n"


def talk(
    answers: list[bytes],
    ask,
    close_after: int = 1000,
    timeout_s: float = 10.0,
    peers: list[object] | None = None,
):
    """Returns what `ask` makes of a client whose server gives these answers; and the requests.

    The server goes on after an answer that says it will close: the client must not rely on that.
    """
    heard: list[bytes] = []
    left = list(answers)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if peers is not None:
            peers.append(writer.get_extra_info("peername"))
        try:
            for _ in range(close_after):
                heard.append(await reader.readuntil(b"\r\n\r\n"))
                writer.write(left.pop(0))
        except (asyncio.IncompleteReadError, ConnectionError, IndexError):
            pass
        finally:
            writer.close()

    async def go():
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            client = HttpClient(f"http://127.0.0.1:{port}/base", {"x-test": "1"}, timeout_s)
            try:
                return await ask(client)
            finally:
                await client.close()

    return asyncio.run(go()), heard


async def get(client: HttpClient) -> bytes:
    return await client.request("GET", "/path")


async def read_events(client: HttpClient) -> list[bytes]:
    async with client.stream("POST", "/path", b"") as events:
        return [event async for event in events]


def chunked(*pieces: bytes) -> bytes:
    body = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    return OK + b"Transfer-Encoding: chunked\r\n\r\n" + body + b"0\r\n\r\n"


def test_a_request_has_the_prefix_the_host_and_the_headers():
    body, (heard,) = talk([OK + b"Content-Length: 2\r\n\r\nhi"], get)
    assert body == b"hi"
    assert heard.startswith(b"GET /base/path HTTP/1.1\r\nhost: 127.0.0.1:")
    assert b"\r\nx-test: 1\r\n" in heard


@pytest.mark.parametrize(
    "answer",
    [
        chunked(b"data: one\n\ndata: two\n\n"),
        chunked(b"data: o", b"ne\n", b"\nda", b"ta: two\n\n"),
        chunked(b"data:one\r\n\r\ndata:two\r\n\r\n"),
        chunked(b": comment\n\nevent: x\nid: 3\ndata: one\n\ndata: two\n\n"),
        OK + b"content-length: 22\r\n\r\ndata: one\n\ndata: two\n\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" + chunked(b"data: one\n\ndata: two\n\n"),
    ],
)
def test_events_are_found_however_they_are_cut(answer: bytes):
    assert talk([answer], read_events)[0] == [b"one", b"two"]


def test_an_answer_may_last_until_the_connection_closes():
    body, _ = talk([OK + b"\r\nall of it"], get, close_after=1)
    assert body == b"all of it"


def test_a_kept_connection_that_was_closed_meanwhile_is_replaced():
    answer = OK + b"content-length: 2\r\n\r\nhi"

    async def twice(client: HttpClient) -> list[bytes]:
        return [await get(client), await get(client)]

    bodies, heard = talk([answer, answer], twice, close_after=1)
    assert bodies == [b"hi", b"hi"]
    assert len(heard) == 2


def test_a_server_that_wants_to_close_is_not_asked_again_on_that_connection():
    first = OK + b"connection: close\r\ncontent-length: 1\r\n\r\na"
    never = OK + b"content-length: 1\r\n\r\nb"

    async def twice(client: HttpClient) -> list[bytes]:
        return [await get(client), await get(client)]

    peers: list[object] = []
    bodies, _ = talk([first, never], twice, peers=peers)
    assert bodies == [b"a", b"b"]
    assert len(peers) == 2


def test_an_error_status_carries_its_body():
    refused = b"HTTP/1.1 429 Too Many\r\ncontent-length: 4\r\n\r\nfull"
    with pytest.raises(StatusError, match="HTTP 429: full") as caught:
        talk([refused], get)
    assert caught.value.status == 429


@pytest.mark.parametrize(
    "answer",
    [
        OK + b"content-length: 10\r\n\r\nshort",
        OK + b"transfer-encoding: chunked\r\n\r\n5\r\nda",
        OK + b"transfer-encoding: chunked\r\n\r\nzz\r\n",
        b"SSH-2.0-server\r\n\r\n",
    ],
)
def test_an_answer_that_breaks_off_or_is_no_http_is_an_error(answer: bytes):
    with pytest.raises(HttpError):
        talk([answer], get, close_after=1)


def test_a_server_that_does_not_answer_is_left_after_the_time():
    with pytest.raises(HttpError, match=r"no end after 0\.05 s"):
        talk([b""], get, timeout_s=0.05)


@pytest.mark.parametrize("url", ["ftp://host", "http://", "host:99999", "http://host:port"])
def test_an_address_that_is_not_of_http_is_refused(url: str):
    with pytest.raises(UsageError, match="no HTTP address"):
        HttpClient(url, {}, 1.0)
