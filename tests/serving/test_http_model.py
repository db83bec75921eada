"""The shipped model over HTTP: the tokens and scores of `LLM`, whatever the way."""

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx
import openai
import pytest

import jaxserve as js
from jaxserve.serving.http.background import serve_in_background
from jaxserve.serving.options import EngineOptions
from jaxserve.serving.server_options import ServerOptions
from jaxserve.serving.service import LocalService, ModelCard

# Few sizes of a step, since each is compiled.
ENGINE = EngineOptions(max_sequences=2, max_step_tokens=32)

PROMPTS = ["def add(a, b):\n", "import os", "class Stack:\n    def __init__(self):\n        self."]
TEXT = "def mean(values):\n    return sum(values) / len(values)\n"


@pytest.fixture(scope="module")
def reference() -> js.LLM:
    return js.load("tiny", dtype="float32", engine=ENGINE, show="silent")


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    served = js.load("tiny", dtype="float32", engine=ENGINE, show="silent")
    card = ModelCard(
        name="tiny",
        created=0,
        architecture="llama",
        dtype="float32",
        max_context_tokens=served.config.max_context_tokens,
        vocab_size=served.config.vocab_size,
        num_parameters=0,
    )

    @asynccontextmanager
    async def local() -> AsyncIterator[LocalService]:
        service = LocalService(served.engine, served.intake, card)
        await service.start()
        try:
            yield service
        finally:
            await service.stop()

    with (
        serve_in_background(local, ServerOptions(model_name="tiny")) as server,
        httpx.Client(base_url=server.url + "/v1", timeout=120) as client,
    ):
        yield client


def complete(client: httpx.Client, **body: Any) -> dict[str, Any]:
    response = client.post("/completions", json={"return_token_ids": True} | body)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 0.9, "seed": 7, "n": 2}])
def test_http_gives_the_tokens_of_llm(
    client: httpx.Client, reference: js.LLM, sampling: dict[str, Any]
) -> None:
    wanted = reference.generate(PROMPTS, max_tokens=16, **sampling)
    flat = [one for done in wanted for one in (done if isinstance(done, list) else [done])]
    choices = complete(client, prompt=PROMPTS, max_tokens=16, **sampling)["choices"]
    assert [tuple(choice["token_ids"]) for choice in choices] == [one.token_ids for one in flat]
    assert [choice["text"] for choice in choices] == [one.text for one in flat]
    assert [choice["finish_reason"] for choice in choices] == [one.finish_reason for one in flat]
    with openai.OpenAI(base_url=str(client.base_url), api_key="-") as openai_client:
        texts = [""] * len(flat)
        stream = openai_client.completions.create(
            model="tiny", prompt=PROMPTS, max_tokens=16, stream=True, **sampling
        )
        for chunk in stream:
            texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [one.text for one in flat]


def test_a_chat_over_http_is_that_of_llm(client: httpx.Client, reference: js.LLM) -> None:
    assert reference.tokenizer is not None
    messages = [{"role": "user", "content": "Write a function."}]
    body = {"messages": messages, "max_tokens": 12, "temperature": 0, "return_token_ids": True}
    response = client.post("/chat/completions", json=body)
    if not reference.tokenizer.has_chat_template:
        assert response.status_code == 400
        error = response.json()["error"]
        assert error["param"] == "messages"
        assert reference.tokenizer.origin not in error["message"]
        return
    wanted = reference.chat(messages, max_tokens=12, temperature=0)
    assert response.json()["choices"][0]["message"]["content"] == wanted.text


def test_streamed_text_is_whole_characters(client: httpx.Client) -> None:
    body = {"prompt": "# naïve café ☕\n", "max_tokens": 24, "temperature": 1.2, "seed": 3}
    with client.stream("POST", "/completions", json=body | {"stream": True}) as response:
        raw = b"".join(response.iter_raw())
    raw.decode()
    assert complete(client, **body)["choices"][0]["text"]


def loglikelihood(
    client: httpx.Client, requests: Sequence[tuple[list[int], list[int]]]
) -> list[tuple[float, bool]]:
    """Returns (log-likelihood, whether greedy) of continuations, as evaluation harnesses ask.

    They send context and continuation as tokens, want them echoed with their log-probabilities,
    and leave out the one token that is generated.
    """
    prompts = [context + continuation for context, continuation in requests]
    asked = {"temperature": 0, "max_tokens": 1, "logprobs": 1, "echo": True, "seed": 1234}
    body = complete(client, model="tiny", prompt=prompts, **asked)
    scores: list[tuple[float, bool]] = []
    for choice, (context, _) in zip(
        sorted(body["choices"], key=lambda choice: choice["index"]), requests, strict=True
    ):
        told = choice["logprobs"]
        chosen = told["token_logprobs"][len(context) : -1]
        tops = told["top_logprobs"][len(context) : -1]
        greedy = all(
            logprob == max(top.values()) for logprob, top in zip(chosen, tops, strict=True)
        )
        scores.append((sum(chosen), greedy))
    return scores


def test_an_evaluation_harness_gets_the_scores_of_llm(
    client: httpx.Client, reference: js.LLM
) -> None:
    assert reference.tokenizer is not None
    ids = reference.tokenizer.encode(TEXT)
    requests = [(ids[:at], ids[at : at + 6]) for at in range(1, len(ids) - 6, 4)]
    likely = reference.generate(TEXT, max_tokens=5, temperature=0, ignore_eos=True)
    requests.append((ids, list(likely.token_ids)))
    scores = loglikelihood(client, requests)
    for (context, continuation), (score, greedy) in zip(requests, scores, strict=True):
        done = reference.generate(
            context + continuation, max_tokens=1, temperature=0, prompt_logprobs=1
        )
        assert done.prompt_logprobs is not None
        entries = [entry for entry in done.prompt_logprobs[len(context) :] if entry is not None]
        assert [entry.token_id for entry in entries] == continuation
        assert score == sum(entry.logprob for entry in entries)
        assert greedy == all(entry.top[0][0] == entry.token_id for entry in entries)
    assert scores[-1][1], "what the model itself would say is greedy"
    assert not all(greedy for _, greedy in scores)


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_perplexity_over_a_rolling_window_needs_nothing_generated(
    client: httpx.Client, reference: js.LLM, max_tokens: int
) -> None:
    done = reference.generate(TEXT, max_tokens=1, temperature=0, prompt_logprobs=0)
    assert done.prompt_logprobs is not None
    wanted = [None if entry is None else entry.logprob for entry in done.prompt_logprobs]
    body = complete(
        client, prompt=TEXT, max_tokens=max_tokens, temperature=0, logprobs=0, echo=True
    )
    told = body["choices"][0]["logprobs"]
    assert told["token_logprobs"][: len(wanted)] == wanted
    assert len(told["tokens"]) == len(wanted) + max_tokens
    assert "".join(told["tokens"][: len(wanted)]) == TEXT
