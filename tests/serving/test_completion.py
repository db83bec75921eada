"""From tokens to text, end and usage of one completion."""

from collections.abc import Sequence
from typing import Any

import pytest

from jaxserve.errors import GenerationError
from jaxserve.serving.completion import CompletionBuilder
from jaxserve.serving.fake_service import byte_tokenizer
from jaxserve.serving.request import Request, SamplingParams, TokenEvent, TokenLogprob, Usage
from jaxserve.tokenizer import Tokenizer

PROMPT = (9, 9, 9)
TEXT = "return a + b\nthe quick brown fox"


@pytest.fixture(scope="module")
def letters() -> Tokenizer:
    """Returns a tokenizer in which every byte is a token."""
    return byte_tokenizer()


def request(params: SamplingParams) -> Request:
    return Request(id="r", prompt=PROMPT, params=params)


class Run:
    """Pushes the tokens of a text until the builder ends the row, as a loop would."""

    def __init__(self, tokenizer: Tokenizer | None, ids: Sequence[int], **fields: Any) -> None:
        stop_token = fields.pop("stop_token", None)
        fields.setdefault("max_tokens", len(ids))
        params = SamplingParams(seed=11, **fields).resolved({})
        self.builder = CompletionBuilder(tokenizer, request(params))
        self.pieces: list[str] = []
        for count, token in enumerate(ids, 1):
            stopped = token == stop_token
            last = stopped or count == params.max_tokens
            logprob = None if params.logprobs is None else TokenLogprob(token, -count / 4)
            event = TokenEvent(
                "r",
                0,
                (token,),
                finish_reason="stop" if stopped else "length" if last else None,
                logprobs=None if logprob is None else (logprob,),
                stop_token=stopped,
            )
            self.pieces.append(self.builder.push(event))
            if self.builder.finish_reason is not None:
                break
        self.num_pushed = len(self.pieces)

    @property
    def text(self) -> str:
        return self.builder.completion().text


def single_characters(tokenizer: Tokenizer, text: str) -> list[int]:
    """Returns one token a byte, so that every string of two characters spans tokens."""
    return [tokenizer.encode(char, add_special_tokens=False)[0] for char in text]


def test_a_completion_is_the_text_of_its_tokens(letters: Tokenizer) -> None:
    ids = letters.encode(TEXT, add_special_tokens=False)
    run = Run(letters, ids)
    completion = run.builder.completion()
    assert completion.text == "".join(run.pieces) == TEXT
    assert completion.token_ids == tuple(ids)
    assert completion.finish_reason == "length"
    assert completion.seed == 11
    assert completion.usage == Usage(prompt_tokens=3, completion_tokens=len(ids))
    assert completion.logprobs is None


def test_text_comes_as_soon_as_it_is_certain(letters: Tokenizer) -> None:
    assert Run(letters, single_characters(letters, "abc")).pieces == ["a", "b", "c"]
    held = Run(letters, single_characters(letters, "a+bc"), stop="+b-")
    assert held.pieces == ["a", "", "", "+bc"]


def test_a_character_cut_off_by_the_end_is_replaced(letters: Tokenizer) -> None:
    ids = letters.encode("€", add_special_tokens=False)
    assert len(ids) > 1
    assert Run(letters, ids[:1]).text == "\ufffd"


@pytest.mark.parametrize(("include", "text"), [(False, "return a"), (True, "return a + b")])
def test_a_stop_string_that_spans_tokens_ends_the_row(
    letters: Tokenizer, include: bool, text: str
) -> None:
    ids = single_characters(letters, TEXT)
    run = Run(letters, ids, stop=[" + b", "fox"], include_stop_str_in_output=include)
    completion = run.builder.completion()
    assert completion.text == text
    assert completion.finish_reason == "stop"
    assert run.num_pushed == len("return a + b")
    # The tokens behind the stop string were drawn, and are listed and counted.
    assert completion.token_ids == tuple(ids[: run.num_pushed])
    assert completion.usage.completion_tokens == run.num_pushed


def test_text_that_only_began_a_stop_string_is_shown_at_the_end(letters: Tokenizer) -> None:
    run = Run(letters, single_characters(letters, "ab EN"), stop="END")
    assert run.pieces == ["a", "b", " ", "", "EN"]
    assert run.builder.completion().finish_reason == "length"


def test_a_stop_string_completed_by_the_last_token_counts(letters: Tokenizer) -> None:
    run = Run(letters, single_characters(letters, "ab END"), stop="END")
    assert run.text == "ab "
    assert run.builder.completion().finish_reason == "stop"


def test_no_stop_string_counts_before_the_minimum(letters: Tokenizer) -> None:
    ids = single_characters(letters, "a.b.c.d")
    assert Run(letters, ids, stop=".").text == "a"
    assert Run(letters, ids, stop=".", min_tokens=1).text == "a"
    assert Run(letters, ids, stop=".", min_tokens=2).text == "a.b"
    # Nor one that begins before it and ends after.
    assert Run(letters, ids, stop=["b.", "c."], min_tokens=3).text == "a.b."
    whole = Run(letters, ids, stop=".", min_tokens=7)
    assert whole.text == "a.b.c.d"
    assert whole.builder.completion().finish_reason == "length"


def test_a_stop_token_leaves_no_text_but_is_counted(letters: Tokenizer) -> None:
    ids = single_characters(letters, "abcd")
    run = Run(letters, ids, stop_token=ids[2], logprobs=0)
    completion = run.builder.completion()
    assert completion.text == "ab"
    assert completion.token_ids == tuple(ids[:2])
    assert completion.finish_reason == "stop"
    assert completion.usage == Usage(prompt_tokens=3, completion_tokens=3)
    assert completion.logprobs == (TokenLogprob(ids[0], -0.25), TokenLogprob(ids[1], -0.5))


def test_a_stop_token_releases_what_was_held_back(letters: Tokenizer) -> None:
    ids = single_characters(letters, "a+c")
    run = Run(letters, ids, stop="+b", stop_token=ids[2])
    assert run.pieces == ["a", "", "+"]


@pytest.mark.parametrize(("skip", "text"), [(True, "ab"), (False, "a<|end|>b")])
def test_special_tokens_leave_text_where_asked_for(
    letters: Tokenizer, skip: bool, text: str
) -> None:
    (special,) = letters.encode("<|end|>", add_special_tokens=False)
    first, last = single_characters(letters, "ab")
    run = Run(letters, [first, special, last], skip_special_tokens=skip)
    assert run.text == text
    assert run.builder.completion().token_ids == (first, special, last)


def test_without_a_tokenizer_there_are_tokens_and_no_text() -> None:
    completion = Run(None, [5, 6, 7], stop_token=7).builder.completion()
    assert (completion.text, completion.token_ids) == ("", (5, 6))
    assert completion.finish_reason == "stop"


def test_a_completion_that_runs_is_not_there_yet() -> None:
    builder = CompletionBuilder(None, request(SamplingParams(max_tokens=2, seed=0).resolved({})))
    builder.push(TokenEvent("r", 0, (1,)))
    assert builder.finish_reason is None
    with pytest.raises(AssertionError, match="still runs"):
        builder.completion()


def test_several_tokens_of_one_event_are_taken_in_turn(letters: Tokenizer) -> None:
    ids = tuple(single_characters(letters, "ab.cd"))
    params = SamplingParams(max_tokens=9, seed=0, stop=(".",), logprobs=0).resolved({})
    builder = CompletionBuilder(letters, request(params))
    logprobs = tuple(TokenLogprob(token, -1.0) for token in ids)
    assert builder.push(TokenEvent("r", 0, ids, logprobs=logprobs, cached_tokens=2)) == "ab"
    done = builder.completion()
    assert (done.finish_reason, done.token_ids) == ("stop", ids[:3])
    assert builder.num_drawn == 3
    assert done.usage == Usage(prompt_tokens=3, completion_tokens=3, cached_tokens=2)
    assert done.logprobs == logprobs[:3]


def test_a_failed_request_raises_its_cause() -> None:
    builder = CompletionBuilder(None, request(SamplingParams(max_tokens=2, seed=0).resolved({})))
    builder.push(TokenEvent("r", 0, (1,)))
    builder.push(TokenEvent("r", 0, finish_reason="error", error="the device is gone"))
    assert builder.finish_reason == "error"
    with pytest.raises(GenerationError, match="the device is gone"):
        builder.completion()


def test_prompt_logprobs_are_kept() -> None:
    params = SamplingParams(max_tokens=1, seed=0, prompt_logprobs=0).resolved({})
    builder = CompletionBuilder(None, request(params))
    scores = (None, TokenLogprob(9, -0.5), TokenLogprob(9, -0.25))
    builder.push(TokenEvent("r", 0, (1,), "length", prompt_logprobs=scores))
    assert builder.completion().prompt_logprobs == scores
