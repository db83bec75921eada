from __future__ import annotations

import json
from pathlib import Path

import jinja2.sandbox
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from jaxserve.training.tokenizer import SPECIAL_TOKENS, train_tokenizer, write_tokenizer

TEXT = "def area(width, height):\n    if width:\n        return width * height\n    return 1234\n"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([TEXT] * 50, 320)


@settings(deadline=None)
@given(text=st.text())
def test_any_text_survives(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_special_tokens_come_first(tokenizer: Tokenizer) -> None:
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(6))


def test_a_line_break_and_its_indentation_are_one_token(tokenizer: Tokenizer) -> None:
    assert "Ċ" + "Ġ" * 8 in tokenizer.encode(TEXT).tokens


def test_digits_stand_alone(tokenizer: Tokenizer) -> None:
    assert [t for t in tokenizer.encode(TEXT).tokens if t.isdigit()] == ["1", "2", "3", "4"]


def test_written_files_hold_the_tokenizer_and_a_chat_template(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    write_tokenizer(tokenizer, tmp_path)
    again = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert again.encode(TEXT).ids == tokenizer.encode(TEXT).ids
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["eos_token"] == "<|endoftext|>" and config["pad_token"] == "<|pad|>"
    template = jinja2.sandbox.ImmutableSandboxedEnvironment().from_string(config["chat_template"])
    shown = template.render(
        messages=[{"role": "user", "content": "hi"}], add_generation_prompt=True
    )
    assert shown == "<|user|>\nhi<|end|>\n<|assistant|>\n"
