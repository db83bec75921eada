"""Published sizes against published numbers."""

import pytest

from jaxserve.errors import ConfigError, UnsupportedError, UsageError
from jaxserve.models.named import model_names, named_config, parse_config
from jaxserve.models.size import num_parameters

# As model cards count them; tables that serve as embedding and output head once.
PARAMETERS = {
    "falcon-180b": 178_557_088_768,
    "falcon-40b": 41_303_293_952,
    "falcon-7b": 6_921_720_704,
    "falcon-rw-1b": 1_311_625_216,
    "falcon-rw-7b": 7_516_020_736,
    "gemma-2-27b": 27_227_128_320,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-2-7b": 6_738_415_616,
    "llama-3-70b": 70_553_706_496,
    "llama-3-8b": 8_030_261_248,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
}
# As the paper gives them, table 1.
ROUNDED = {"palm-540b": 540.35e9, "palm-62b": 62.50e9, "palm-8b": 8.63e9}


def test_every_named_model_is_checked_here() -> None:
    assert set(model_names()) == PARAMETERS.keys() | ROUNDED.keys()


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_as_published(name: str) -> None:
    assert num_parameters(named_config(name)) == PARAMETERS[name]


@pytest.mark.parametrize("name", ROUNDED)
def test_parameters_are_as_published_in_round_numbers(name: str) -> None:
    assert num_parameters(named_config(name)) == pytest.approx(ROUNDED[name], rel=3e-4)


@pytest.mark.parametrize(
    ("name", "kib"),
    [("llama-2-7b", 512), ("llama-2-70b", 320), ("llama-3.1-8b", 128), ("palm-540b", 118)],
)
def test_cache_bytes_per_token_are_as_published(name: str, kib: int) -> None:
    assert named_config(name).cache_bytes_per_token("bfloat16") == kib * 1024


def test_gemma_2_has_two_cache_groups() -> None:
    groups = named_config("gemma-2-9b").cache_groups("bfloat16")
    assert [(group.spec.window, len(group.layers)) for group in groups] == [(4096, 21), (None, 21)]


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"'llama-9-1b' is not known.*falcon-180b.*palm-8b"):
        named_config("llama-9-1b")


@pytest.mark.parametrize("name", ["../models/palm-8b", "palm-8b.toml", ""])
def test_a_name_is_not_a_path(name: str) -> None:
    with pytest.raises(UsageError, match="is not known"):
        named_config(name)


HEAD = 'family = "palm"\nsource = "here"\n'
SIZES = """
[config]
vocab_size = 9
hidden_size = 8
num_hidden_layers = 1
num_attention_heads = 1
"""


def test_a_text_in_the_format_of_the_files_is_read() -> None:
    assert parse_config(HEAD + SIZES, "here").embed_dim == 8


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("family = ", ConfigError, "here is not TOML"),
        (SIZES, ConfigError, "here: family is missing"),
        (HEAD + "rings = 3\n" + SIZES, ConfigError, "rings=3 is not known"),
        (HEAD + SIZES + "rings = 3\n", ConfigError, "rings=3: not known to the palm family"),
        (HEAD.replace("palm", "opt") + SIZES, UnsupportedError, "family='opt'"),
    ],
)
def test_a_text_that_is_not_understood_is_refused(
    text: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        parse_config(text, "here")
