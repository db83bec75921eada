"""Log-probabilities as JSON can hold them."""

import json
import math

import msgspec
import pytest

from jaxserve.serving.fake_service import byte_tokenizer
from jaxserve.serving.http.logprobs import (
    LOWEST,
    CompletionTokens,
    TokenNames,
    chat_logprobs,
    prompt_logprobs,
)
from jaxserve.serving.request import TokenLogprob

NAMES = TokenNames(byte_tokenizer())
ENDLESS = TokenLogprob(97, -math.inf, ((98, -0.5), (99, -math.inf), (100, math.nan)))


def encoded(value: object) -> str:
    return msgspec.json.encode(value).decode()


def test_minus_infinity_is_a_very_low_number_everywhere() -> None:
    for told in (
        chat_logprobs(NAMES, [ENDLESS]),
        CompletionTokens(NAMES).add([(97, ENDLESS)]),
        prompt_logprobs(NAMES, [ENDLESS]),
    ):
        text = encoded(told)
        assert "null" not in text
        assert "-9999.0" in text
    assert LOWEST == -9999.0


def test_the_chosen_token_joins_the_likeliest_of_a_completion_only() -> None:
    chosen = TokenLogprob(97, -3.0, ((98, -0.5), (99, -1.5)))
    told = CompletionTokens(NAMES).add([(97, chosen)])
    assert told.top_logprobs == [{"b": -0.5, "c": -1.5, "a": -3.0}]
    (entry,) = chat_logprobs(NAMES, [chosen]).content
    assert [top.token for top in entry.top_logprobs] == ["b", "c"]
    assert prompt_logprobs(NAMES, [None, chosen]) is not None
    told_of_prompt = json.loads(encoded(prompt_logprobs(NAMES, [None, chosen])))
    assert told_of_prompt[0] is None
    assert list(told_of_prompt[1]) == ["97", "98", "99"]


def test_offsets_count_characters_over_tokens_that_share_one() -> None:
    tokens = CompletionTokens(NAMES)
    ids = list("aé☕b".encode())
    first = tokens.add([(token, None) for token in ids[:3]])
    rest = tokens.add([(token, None) for token in ids[3:]])
    assert first.text_offset + rest.text_offset == [0, 1, 1, 2, 2, 2, 3]
    assert first.token_logprobs == [None] * 3


@pytest.mark.parametrize(("token", "name"), [(97, "a"), (200, "bytes:\\xc8"), (256, "<|end|>")])
def test_tokens_have_names(token: int, name: str) -> None:
    assert NAMES.name(token) == name


def test_without_a_tokenizer_ids_are_names() -> None:
    names = TokenNames(None)
    assert names.name(5) == "token_id:5"
    assert names.bytes(5) == b""
    assert CompletionTokens(names).add([(5, ENDLESS)]).tokens == ["token_id:5"]
