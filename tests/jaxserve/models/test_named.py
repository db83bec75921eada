"""Published sizes against published numbers."""

import pytest

from jaxserve.errors import ConfigError, UnsupportedError, UsageError
from jaxserve.models.named import model_names, named_config, parse_config
from jaxserve.models.size import num_parameters

# As model cards count them; tables that serve as embedding and output head once, and of OPT's
# learned positions without the two rows that belong to none.
PARAMETERS = {
    "baichuan2-13b": 13_896_668_160,
    "baichuan2-7b": 7_505_973_248,
    "bloom": 176_247_271_424,
    "bloom-1b1": 1_065_314_304,
    "bloom-1b7": 1_722_408_960,
    "bloom-3b": 3_002_557_440,
    "bloom-560m": 559_214_592,
    "bloom-7b1": 7_069_016_064,
    "chatglm2-6b": 6_243_584_000,
    "falcon-180b": 178_557_088_768,
    "falcon-40b": 41_303_293_952,
    "falcon-7b": 6_921_720_704,
    "falcon-rw-1b": 1_311_625_216,
    "falcon-rw-7b": 7_516_020_736,
    "gemma-2-27b": 27_227_128_320,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2b": 2_506_172_416,
    "gemma-3-1b": 999_885_952,
    "gemma-3-270m": 268_098_176,
    "gemma-7b": 8_537_680_896,
    "gpt-neox-20b": 20_554_567_680,
    "gpt2": 124_439_808,
    "gpt2-large": 774_030_080,
    "gpt2-medium": 354_823_168,
    "gpt2-xl": 1_557_611_200,
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
    "mistral-7b-v0.1": 7_241_732_096,
    "mixtral-8x7b": 46_702_792_704,
    "mpt-7b": 6_649_286_656,
    "opt-1.3b": 1_315_753_984,
    "opt-125m": 125_237_760,
    "opt-13b": 12_853_463_040,
    "opt-2.7b": 2_651_591_680,
    "opt-30b": 29_974_525_952,
    "opt-350m": 331_194_368,
    "opt-6.7b": 6_658_465_792,
    "phi-3-medium-4k": 13_960_238_080,
    "phi-3-mini-4k": 3_821_079_552,
    "phi-4": 14_659_507_200,
    "pythia-1.4b": 1_414_647_808,
    "pythia-12b": 11_846_072_320,
    "pythia-160m": 162_322_944,
    "pythia-1b": 1_011_781_632,
    "pythia-2.8b": 2_775_208_960,
    "pythia-410m": 405_334_016,
    "pythia-6.9b": 6_857_302_016,
    "pythia-70m": 70_426_624,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-72b": 72_706_203_648,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-14b": 14_768_307_200,
    "qwen3-235b-a22b": 235_093_634_560,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-32b": 32_762_123_264,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
}
# As the model card and, of PaLM, table 1 of the paper give them.
ROUNDED = {"mpt-30b": 29.95e9, "palm-540b": 540.35e9, "palm-62b": 62.50e9, "palm-8b": 8.63e9}


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
        (HEAD.replace("palm", "mamba") + SIZES, UnsupportedError, "family='mamba'"),
    ],
)
def test_a_text_that_is_not_understood_is_refused(
    text: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        parse_config(text, "here")
