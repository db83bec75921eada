"""The shipped model behind gRPC says what it says in the same process."""

import asyncio
import threading
from collections.abc import Iterator

import pytest

import jaxserve as js
from jaxserve.client import Client
from jaxserve.serving.intake import Intake
from jaxserve.serving.rpc.server import create_server, listen
from jaxserve.serving.server_options import ServerOptions
from jaxserve.serving.service import LocalService, ModelCard

OPTIONS = ServerOptions(model_name="tiny", grpc_port=0)
PROMPTS = ("def area(", "import ", "class Reader:\n    def __init__(self")


@pytest.fixture(scope="module")
def llm() -> js.LLM:
    # Few sizes of steps, each of which is compiled.
    sizes = js.EngineOptions(max_sequences=1, max_step_tokens=32, kv_bytes=1 << 24)
    return js.load("tiny", engine=sizes, show="silent")


@pytest.fixture(scope="module")
def expected(llm: js.LLM) -> list[js.Completion]:
    return llm.generate(list(PROMPTS), max_tokens=24, temperature=0.8, seed=7)


@pytest.fixture(scope="module")
def client(llm: js.LLM, expected: list[js.Completion]) -> Iterator[Client]:
    """The engine goes from this thread to that of the server, once it has said what it says."""
    intake = Intake.of(llm.config, llm.tokenizer, llm.defaults)
    card = ModelCard(
        name="tiny",
        created=0,
        architecture="llama",
        dtype="bfloat16",
        max_context_tokens=llm.config.max_context_tokens,
        vocab_size=llm.config.vocab_size,
        num_parameters=0,
    )
    ports: list[int] = []
    ready, over = threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        service = LocalService(llm.engine, intake, card)
        await service.start()
        server = create_server(service, OPTIONS)
        ports.append(listen(server, OPTIONS))
        await server.start()
        ready.set()
        await over.wait()
        await server.stop(None)
        await service.stop()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), daemon=True)
    thread.start()
    assert ready.wait(60)
    with Client(f"localhost:{ports[0]}", timeout_s=120) as made:
        yield made
    loop.call_soon_threadsafe(over.set)
    thread.join(60)
    loop.close()


def test_grpc_gives_what_the_same_process_gives(client: Client, expected: list[js.Completion]):
    streams = [client.stream(p, max_tokens=24, temperature=0.8, seed=7) for p in PROMPTS]
    for stream, known in zip(streams, expected, strict=True):
        chunks = list(stream)
        assert tuple(token for chunk in chunks for token in chunk.token_ids) == known.token_ids
        assert "".join(chunk.text for chunk in chunks) == known.text


def test_a_chat_goes_through_the_template(client: Client, llm: js.LLM):
    said = [{"role": "user", "content": "def f("}]
    assert llm.tokenizer is not None
    assert client.tokenize(said) == llm.tokenizer.chat(said)
    assert client.generate(said, max_tokens=4, seed=1).usage.prompt_tokens == len(
        llm.tokenizer.chat(said)
    )
