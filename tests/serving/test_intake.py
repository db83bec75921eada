"""From what users ask for to requests."""

import subprocess
import sys
from typing import Any

import pytest

from jaxserve.checkpoint.generation_config import GenerationDefaults
from jaxserve.errors import ContextLengthError, TokenizerError, UsageError
from jaxserve.serving.fake_service import CONTEXT, END_ID, byte_tokenizer, fake_intake
from jaxserve.serving.intake import DEFAULT_MAX_TOKENS, Intake
from jaxserve.serving.request import MAX_BAD_WORD_FORMS, MAX_BAD_WORDS, SamplingParams
from jaxserve.serving.slot_state import vocabulary_rows

INTAKE = fake_intake()


def test_a_request_has_everything_decided() -> None:
    request = INTAKE.request("ab", SamplingParams(bad_words=("xy",)), client="me", salt="s")
    assert request.prompt == (97, 98)
    assert request.params.max_tokens == DEFAULT_MAX_TOKENS
    assert request.params.temperature == 1.0
    assert request.params.seed is not None
    assert request.stop_ids == (END_ID,)
    assert set(request.bad_word_ids) == {(120, 121), (32, 120, 121)}
    assert (request.client, request.salt) == ("me", "s")
    assert request.id != INTAKE.request("ab", SamplingParams()).id


def test_without_a_length_the_context_is_the_limit() -> None:
    assert INTAKE.request("ab", SamplingParams(), None).params.max_tokens == CONTEXT - 2
    assert INTAKE.request("ab", SamplingParams(), 16).params.max_tokens == 16
    model = Intake(257, CONTEXT, byte_tokenizer(), GenerationDefaults(max_new_tokens=7))
    assert model.request("ab", SamplingParams(), None).params.max_tokens == 7


def test_ends_of_text_count_unless_they_are_ignored() -> None:
    request = INTAKE.request("a", SamplingParams(ignore_eos=True, stop_token_ids=(9,)))
    assert request.stop_ids == (9,)


@pytest.mark.parametrize(
    ("prompt", "fields", "error", "message"),
    [
        ("", {}, UsageError, "prompt is empty"),
        ([], {}, UsageError, "prompt is empty"),
        ([1.5], {}, UsageError, "integers"),
        ([257], {}, UsageError, "257 is outside the vocabulary of 257"),
        ("a", {"logit_bias": {300: 1}}, UsageError, "300 is outside"),
        ("a" * CONTEXT, {}, ContextLengthError, "shorten it to at most 511"),
        ("a", {"max_tokens": CONTEXT}, ContextLengthError, "max_tokens up to 511"),
        ("a", {"bad_words": ("123456789",)}, UsageError, "bad_words: .* has 9 tokens; at most 8"),
        ("a", {"allowed_token_ids": (97, 32), "bad_words": ("a", " ")}, UsageError, "all banned"),
        ("a", {"allowed_token_ids": (END_ID,), "min_tokens": 1}, UsageError, "only stop tokens"),
        (
            "a",
            {
                "allowed_token_ids": (97, 98, END_ID),
                "bad_words": ("b",),
                "stop_token_ids": (97,),
                "min_tokens": 1,
            },
            UsageError,
            "leave only stop tokens, which min_tokens=1 forbids",
        ),
    ],
)
def test_what_cannot_be_served_is_refused(
    prompt: Any, fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        INTAKE.request(prompt, SamplingParams(**fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"allowed_token_ids": (END_ID,)},
        {"allowed_token_ids": (END_ID,), "min_tokens": 1, "ignore_eos": True},
        {"allowed_token_ids": (END_ID, 97), "min_tokens": 1},
        {"allowed_token_ids": (97, 98), "bad_words": ("a", "bc")},
        {"bad_words": ("a",), "min_tokens": 1},
    ],
)
def test_constraints_that_leave_a_token_are_taken(fields: dict[str, Any]) -> None:
    assert INTAKE.request("a", SamplingParams(**fields)).params.n == 1


def test_thirty_two_bad_words_have_two_forms_each() -> None:
    words = tuple(f"w{number}" for number in range(MAX_BAD_WORDS))
    request = INTAKE.request("ab", SamplingParams(bad_words=words))
    forms = {tuple(form.encode()) for word in words for form in (word, f" {word}")}
    assert set(request.bad_word_ids) == forms
    assert len(request.bad_word_ids) == MAX_BAD_WORD_FORMS == 64
    rows = vocabulary_rows([request], [request.prompt], 4).bad_words[0]
    assert {tuple(row[row >= 0].tolist()) for row in rows} == forms


def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*_: Any) -> list[int]:
        raise AssertionError("it was tokenised")

    intake = fake_intake()
    limit = intake.max_text_chars
    monkeypatch.setattr(type(intake.tokenizer), "encode", never)
    with pytest.raises(ContextLengthError, match=f"at most {limit} characters"):
        intake.encode("a" * (limit + 1))
    with pytest.raises(ContextLengthError, match="messages of"):
        intake.chat([{"role": "user", "content": "a" * (limit + 1)}])


def test_a_chat_goes_through_the_template() -> None:
    ids = INTAKE.chat([{"role": "user", "content": "hi"}])
    assert bytes(ids) == b"[user]hi\n[assistant]"


def test_without_a_tokenizer_only_tokens_go_in() -> None:
    bare = Intake(10, 20)
    assert bare.request([1, 2], SamplingParams()).prompt == (1, 2)
    for call in (
        lambda: bare.encode("a"),
        lambda: bare.chat([{"role": "user", "content": "a"}]),
        lambda: bare.request([1], SamplingParams(bad_words=("a",))),
    ):
        with pytest.raises(TokenizerError, match=r"has no tokenizer|has none"):
            call()
    with pytest.raises(UsageError, match="stop strings need a tokenizer"):
        bare.request([1], SamplingParams(stop=("a",)))


def test_the_server_process_loads_no_jax() -> None:
    code = (
        "import sys, jaxserve.serving.server, jaxserve.serving.supervisor\n"
        "import jaxserve.serving.rpc.server\n"
        "from jaxserve.serving.model_files import ModelFiles\n"
        "files = ModelFiles.find('tiny')\n"
        "files.intake('tiny').request('a', __import__('jaxserve').SamplingParams())\n"
        "assert files.card('tiny').max_context_tokens == 2048\n"
        "print([name for name in ('jax', 'flax', 'torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
