"""The spellings of rotary embeddings, and what each means."""

import math
from typing import Any

import pytest

from jaxserve.config import RopeScaling, RopeSpec
from jaxserve.errors import ConfigError, UnsupportedError
from jaxserve.models.fields import Fields
from jaxserve.models.rope import read_rope


def read(values: dict[str, Any], max_positions: int = 64) -> tuple[RopeSpec, int]:
    fields = Fields("llama", values)
    result = read_rope(fields, 8, max_positions)
    fields.finish()
    return result


def test_nothing_said_means_plain_rope_with_base_10000() -> None:
    assert read({}) == (RopeSpec(8, 10_000.0), 64)
    assert read({"rope_scaling": None, "rope_theta": 500.0}) == (RopeSpec(8, 500.0), 64)


@pytest.mark.parametrize(
    "old",
    [
        {"type": "linear", "factor": 2.0},
        {"rope_type": "linear", "factor": 2},
        {"rope_type": "linear", "type": "linear", "factor": 2.0},
    ],
)
def test_old_and_new_spelling_mean_the_same(old: dict[str, Any]) -> None:
    new = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
    assert read({"rope_theta": 500.0, "rope_scaling": old}) == read({"rope_parameters": new})


def test_the_context_is_stretched_where_the_config_counts_before_stretching() -> None:
    assert read({"rope_scaling": {"type": "linear", "factor": 4.0}})[1] == 64
    assert read({"rope_scaling": {"type": "dynamic", "factor": 4.0}})[1] == 256
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    assert read({"rope_scaling": yarn})[1] == 128
    assert read({"rope_scaling": yarn}, max_positions=1024)[1] == 1024


def test_dynamic_is_relative_to_the_trained_context() -> None:
    spec, _ = read({"rope_scaling": {"type": "dynamic", "factor": 4.0}})
    assert (spec.scaling, spec.original_context_tokens) == (RopeScaling.DYNAMIC, 64)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, 1 + 0.1 * math.log(4)),
        ({"attention_factor": 0.8}, 0.8),
        (
            {"mscale": 0.7, "mscale_all_dim": 1.4},
            (1 + 0.07 * math.log(4)) / (1 + 0.14 * math.log(4)),
        ),
        ({"mscale": 0.7}, 1 + 0.1 * math.log(4)),
    ],
)
def test_yarn_scales_cos_and_sin(given: dict[str, float], wanted: float) -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    spec, _ = read({"rope_scaling": scaling | given})
    assert spec.attention_factor == pytest.approx(wanted)


def test_yarn_finds_its_factor_from_the_contexts() -> None:
    scaling = {"rope_type": "yarn", "original_max_position_embeddings": 16}
    assert read({"rope_scaling": scaling})[0].factor == 4.0


def test_dynamic_needs_more_than_one_frequency() -> None:
    with pytest.raises(ConfigError, match="rotary_dim=2 must be at least 4"):
        read_rope(Fields("llama", {"rope_scaling": {"type": "dynamic", "factor": 4.0}}), 2, 64)


@pytest.mark.parametrize("kind", ["mrope", "proportional"])
def test_an_unsupported_kind_is_refused_with_the_supported_ones(kind: str) -> None:
    message = f"rope_scaling.(rope_)?type='{kind}' is not supported.*llama3, yarn"
    for field in ("type", "rope_type"):
        with pytest.raises(UnsupportedError, match=message):
            read({"rope_scaling": {field: kind, "factor": 2.0}})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"rope_scaling": {"type": "linear"}},
            "rope_scaling.factor is missing",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0, "low_freq_factor": 1.0}},
            "rope_scaling.low_freq_factor=1.0: not known",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 0.5}},
            "factor=0.5 must be at least 1",
        ),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 4.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 32,
                }
            },
            "high_freq_factor=4.0 must be above low_freq_factor=4.0",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "rope_parameters.full_attention=.*not known",
        ),
        (
            {
                "rope_scaling": {"type": "linear", "factor": 2.0},
                "rope_parameters": {"rope_type": "linear", "factor": 3.0},
            },
            "both set",
        ),
        (
            {"rope_theta": 10.0, "rope_parameters": {"rope_theta": 20.0}},
            "rope_theta=10.0 contradicts",
        ),
    ],
)
def test_an_unclear_description_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"rope_scaling": {"rope_type": "linear", "type": "dynamic", "factor": 2.0}},
            "rope_scaling.type='dynamic'",
        ),
        (
            {
                "rope_scaling": {
                    "type": "dynamic",
                    "factor": 2.0,
                    "original_max_position_embeddings": 32,
                }
            },
            "original_max_position_embeddings=32",
        ),
    ],
)
def test_contradicting_values_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        read(values)
