"""The clients that people use: OpenAI's own package, and LangChain's model over it."""

import asyncio
from collections.abc import Iterator
from functools import partial
from typing import Any

import openai
import pytest

from jaxserve.serving.fake_runner import FakeRule
from jaxserve.serving.fake_service import VOCAB_SIZE, byte_tokenizer, fake_service
from jaxserve.serving.gate import Gate
from jaxserve.serving.http.app import create_app
from jaxserve.serving.http.background import BackgroundServer, serve_in_background
from jaxserve.serving.request import SamplingParams
from jaxserve.serving.server_options import ServerOptions

KEY = "sesame-0123456789abcdef"
MESSAGES: list[Any] = [{"role": "user", "content": "hi"}]
PROMPT = b"[user]hi\n[assistant]"
STEP_S = 0.004


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BackgroundServer]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"alice {KEY}\n")
    options = ServerOptions(model_name="fake", api_key_file=keys)
    with serve_in_background(partial(fake_service, STEP_S), options) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: BackgroundServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key=KEY, max_retries=0) as client:
        yield client


def tokens_of(prompt: bytes, count: int) -> list[int]:
    params = SamplingParams(temperature=0.0).resolved({})
    return FakeRule(VOCAB_SIZE).continue_prompt(prompt, params, count)


def text_of(prompt: bytes, count: int) -> str:
    return byte_tokenizer().decode(tokens_of(prompt, count))


def test_openai_completes(client: openai.OpenAI) -> None:
    done = client.completions.create(
        model="fake", prompt="hello", max_tokens=5, temperature=0, logprobs=2, echo=True
    )
    assert done.choices[0].text == "hello" + text_of(b"hello", 5)
    assert done.choices[0].logprobs is not None
    assert len(done.choices[0].logprobs.tokens or []) == 10
    assert done.usage is not None
    assert done.usage.total_tokens == 10


def test_openai_streams_a_completion(client: openai.OpenAI) -> None:
    chunks = list(
        client.completions.create(
            model="fake", prompt="hello", max_tokens=9, temperature=0, stream=True
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == text_of(b"hello", 9)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert len(chunks) > 2


def test_openai_chats(client: openai.OpenAI) -> None:
    done = client.chat.completions.create(
        model="fake",
        messages=MESSAGES,
        max_completion_tokens=5,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
    )
    choice = done.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content == text_of(PROMPT, 5)
    assert choice.logprobs is not None
    assert len((choice.logprobs.content or [])[0].top_logprobs) == 3
    assert client.with_options(timeout=5).models.retrieve("fake").id == "fake"
    assert [model.id for model in client.models.list()] == ["fake"]


def test_openai_streams_a_chat_with_usage(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="fake",
        messages=MESSAGES,
        max_tokens=8,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == text_of(PROMPT, 8)
    assert last.usage is not None
    assert last.usage.completion_tokens == 8


def test_openai_takes_what_it_gave_back(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(model="fake", messages=MESSAGES, max_tokens=3)
    turns = [*MESSAGES, first.choices[0].message, {"role": "user", "content": "and?"}]
    assert client.chat.completions.create(model="fake", messages=turns, max_tokens=3).choices


def test_openai_accumulates_a_stream_as_a_completion(client: openai.OpenAI) -> None:
    ids = tokens_of(PROMPT, 6)
    with client.chat.completions.stream(
        model="fake", messages=MESSAGES, temperature=0, extra_body={"stop_token_ids": ids[5:]}
    ) as stream:
        for _ in stream:
            pass
        done = stream.get_final_completion()
    assert done.choices[0].message.content == byte_tokenizer().decode(ids[: ids.index(ids[5])])
    assert done.choices[0].finish_reason == "stop"


async def _many(url: str) -> list[str]:
    async with openai.AsyncOpenAI(base_url=url + "/v1", api_key=KEY) as client:

        async def one(name: str) -> str:
            stream = await client.chat.completions.create(
                model="fake",
                messages=[{"role": "user", "content": name}],
                max_tokens=6,
                temperature=0,
                stream=True,
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        return await asyncio.gather(*(one(f"number {at}") for at in range(24)))


def test_openai_streams_to_many_at_once(server: BackgroundServer) -> None:
    texts = asyncio.run(_many(server.url))
    assert texts == [text_of(f"[user]number {at}\n[assistant]".encode(), 6) for at in range(24)]


@pytest.mark.parametrize(
    ("change", "kind", "param"),
    [
        ({"model": "other"}, openai.NotFoundError, None),
        ({"temperature": 3}, openai.BadRequestError, "temperature"),
        ({"extra_body": {"unheard_of": 1}}, openai.BadRequestError, "unheard_of"),
        ({"response_format": {"type": "json_object"}}, openai.BadRequestError, "response_format"),
    ],
)
def test_openai_raises_its_own_errors(
    client: openai.OpenAI, change: Any, kind: type[openai.APIStatusError], param: str | None
) -> None:
    for stream in (False, True):
        asked: dict[str, Any] = {"model": "fake", "messages": MESSAGES, "stream": stream} | change
        with pytest.raises(kind) as caught:
            client.chat.completions.create(**asked)
        assert caught.value.param == param
        assert caught.value.request_id
        assert caught.value.type == "invalid_request_error"


def test_openai_tells_of_a_wrong_key(server: BackgroundServer) -> None:
    with (
        openai.OpenAI(base_url=server.url + "/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError) as caught,
    ):
        client.models.list()
    assert caught.value.code == "invalid_api_key"


def test_openai_raises_what_fails_within_a_stream() -> None:
    with (
        serve_in_background(lambda: fake_service(0.02), ServerOptions(model_name="fake")) as server,
        openai.OpenAI(base_url=server.url + "/v1", api_key="-", max_retries=0) as client,
    ):
        stream = client.completions.create(
            model="fake", prompt="hi", max_tokens=300, stream=True, extra_body={"ignore_eos": True}
        )
        next(stream)
        server.service.engine._runner.fail_dispatch(ValueError("broken"))
        with pytest.raises(openai.APIError, match="the server failed on this request"):
            list(stream)


def test_openai_tries_again_when_the_server_is_full() -> None:
    gate = Gate(max_requests=1, max_bytes=1 << 20, max_body_bytes=1 << 20)
    options = ServerOptions(model_name="fake")
    with (
        serve_in_background(
            fake_service, options, lambda service, o: create_app(service, o, gate=gate)
        ) as server,
        openai.OpenAI(base_url=server.url + "/v1", api_key="-", max_retries=3) as client,
    ):
        asked: dict[str, Any] = {"model": "fake", "prompt": "hi", "max_tokens": 2}
        with gate.enter(), pytest.raises(openai.RateLimitError) as caught:
            client.with_options(max_retries=0).completions.create(**asked)
        assert int(caught.value.response.headers["retry-after"]) >= 1
        entered = gate.enter()
        entered.__enter__()
        server.loop.call_soon_threadsafe(_leave_when_refused, server, gate, entered, gate.refused)
        assert client.completions.create(**asked).choices
        assert gate.refused == 2


def _leave_when_refused(server: BackgroundServer, gate: Gate, entered: Any, before: int) -> None:
    """Opens the gate once it has turned somebody away."""
    if gate.refused > before:
        entered.__exit__(None, None, None)
    else:
        server.loop.call_later(0.001, _leave_when_refused, server, gate, entered, before)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_langchain_answers_streams_and_batches(server: BackgroundServer) -> None:
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(
        model="fake",
        base_url=server.url + "/v1",
        api_key=lambda: KEY,
        temperature=0,
        max_completion_tokens=6,
        max_retries=0,
    )
    wanted = text_of(PROMPT, 6)
    answer = model.invoke([("user", "hi")])
    assert answer.content == wanted
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] == 6
    assert "".join(str(chunk.content) for chunk in model.stream([("user", "hi")])) == wanted
    batch = model.batch([[("user", f"n{at}")] for at in range(4)])
    assert [one.content for one in batch] == [
        text_of(f"[user]n{at}\n[assistant]".encode(), 6) for at in range(4)
    ]
