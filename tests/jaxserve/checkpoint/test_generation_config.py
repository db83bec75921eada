"""Sampling defaults of a model, read strictly."""

import json
from pathlib import Path

import pytest

from jaxserve.checkpoint.generation_config import (
    NAME,
    GenerationDefaults,
    parse_generation_config,
    read_generation_defaults,
)
from jaxserve.errors import CheckpointError, ConfigError, UnsupportedError


def parse(**fields: object) -> GenerationDefaults:
    return parse_generation_config(fields, "DIR/generation_config.json")


def test_every_supported_field_is_read():
    assert parse(
        do_sample=True,
        temperature=0.6,
        top_k=40,
        top_p=0.9,
        min_p=0.05,
        repetition_penalty=1.1,
        max_new_tokens=100,
        max_length=4096,
        min_new_tokens=3,
        eos_token_id=[7, 9],
        bos_token_id=1,
        pad_token_id=0,
    ) == GenerationDefaults(True, 0.6, 40, 0.9, 0.05, 1.1, 100, 4096, 3, (7, 9), 1, 0)


def test_what_is_left_out_stays_open():
    assert parse() == GenerationDefaults()
    assert parse(temperature=None, eos_token_id=None) == GenerationDefaults()


@pytest.mark.parametrize(
    ("fields", "greedy"),
    [
        ({}, False),
        ({"do_sample": True}, False),
        ({"do_sample": False, "temperature": 0.7}, True),
        ({"temperature": 0.0}, True),
    ],
)
def test_not_sampling_is_greedy(fields, greedy: bool):
    assert parse(**fields).greedy is greedy


def test_values_that_mean_none_are_none():
    found = parse(top_k=0, pad_token_id=-1, eos_token_id=5)
    assert (found.top_k, found.pad_token_id, found.eos_token_ids) == (None, None, (5,))


def test_fields_that_change_nothing_here_pass():
    parse(
        transformers_version="4.44.0",
        _from_model_config=True,
        cache_implementation="hybrid",
        num_beams=1,
        length_penalty=2.0,
        num_return_sequences=1,
        typical_p=1.0,
        penalty_alpha=None,
        no_repeat_ngram_size=0,
        bad_words_ids=[],
        suppress_tokens=None,
        of_a_later_version=None,
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_beams", 4),
        ("num_return_sequences", 2),
        ("penalty_alpha", 0.6),
        ("typical_p", 0.9),
        ("no_repeat_ngram_size", 2),
        ("min_length", 10),
        ("suppress_tokens", [1]),
        ("stop_strings", ["\n"]),
        ("of_a_later_version", "yes"),
    ],
)
def test_what_would_change_the_text_is_refused_by_name(name: str, value: object):
    with pytest.raises(UnsupportedError) as caught:
        parse(**{name: value})
    message = str(caught.value)
    assert message.startswith(f"DIR/generation_config.json: {name}={value!r} is not supported")
    assert f"remove {name}" in message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("do_sample", 1),
        ("temperature", -0.1),
        ("temperature", True),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("top_k", 1.5),
        ("top_k", -1),
        ("top_p", 0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("repetition_penalty", 0),
        ("max_new_tokens", 0),
        ("min_new_tokens", -1),
        ("eos_token_id", "</s>"),
        ("eos_token_id", [1, -2]),
        ("bos_token_id", 1.0),
    ],
)
def test_a_value_out_of_range_is_named(name: str, value: object):
    with pytest.raises(ConfigError, match=rf"generation_config\.json: {name}="):
        parse(**{name: value})


def test_special_tokens_fall_back_to_the_model_config(tmp_path: Path):
    config = {"eos_token_id": 2, "bos_token_id": 1}
    assert read_generation_defaults(tmp_path, config).eos_token_ids == (2,)
    (tmp_path / NAME).write_text(json.dumps({"eos_token_id": [3, 4], "top_k": 5}))
    found = read_generation_defaults(tmp_path, config)
    assert (found.eos_token_ids, found.bos_token_id, found.top_k) == ((3, 4), 1, 5)


def test_a_broken_file_is_named(tmp_path: Path):
    (tmp_path / NAME).write_text("{")
    with pytest.raises(CheckpointError, match="generation_config"):
        read_generation_defaults(tmp_path, {})
