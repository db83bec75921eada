"""Rotary position embedding as Hugging Face configs describe it.

Two spellings stand for the same: `rope_theta` with `rope_scaling` until transformers 4, and one
`rope_parameters` since 5. Within either the kind is `rope_type`, before 2024 `type`.
"""

from __future__ import annotations

import math
from typing import Any

from jaxserve.config import RopeScaling, RopeSpec
from jaxserve.errors import ConfigError
from jaxserve.models.fields import Fields

DEFAULT_THETA = 10_000.0

SCALINGS = {
    "default": RopeScaling.NONE,
    "linear": RopeScaling.LINEAR,
    "dynamic": RopeScaling.DYNAMIC,
    "llama3": RopeScaling.LLAMA3,
    "yarn": RopeScaling.YARN,
    "longrope": RopeScaling.LONGROPE,
    "su": RopeScaling.LONGROPE,
}


def read_rope(
    fields: Fields,
    head_dim: int,
    max_positions: int,
    theta: float = DEFAULT_THETA,
    partial: float | None = None,
    original: int | None = None,
) -> tuple[RopeSpec, int]:
    """Returns (the rotary embedding, the context in tokens that it reaches).

    The context is `max_position_embeddings`, except where that is by definition the context
    before stretching: `dynamic` multiplies it, `yarn` multiplies the original one.

    Args:
        max_positions: the config's `max_position_embeddings`.
        theta: base of the frequencies where the config says nothing.
        partial: part of a head that turns where the config says nothing; None means that whole
            heads do, whatever it says.
        original: context before `longrope` where the object with its parameters does not say it.
    """
    table = _table(fields)
    rotary_dim = int(head_dim * _partial(fields, table, partial))
    if table is None:
        return RopeSpec(rotary_dim, fields.number("rope_theta", theta)), max_positions
    theta = _theta(fields, table, theta)
    found = rope_of_table(table, rotary_dim, theta, max_positions, original)
    table.finish()
    return found


def rope_of_table(
    table: Fields,
    rotary_dim: int,
    theta: float,
    max_positions: int,
    original: int | None = None,
) -> tuple[RopeSpec, int]:
    """Returns what `read_rope` does, of the object that holds the parameters.

    Args:
        original: see `read_rope`.
    """
    scaling = table.choice(_kind_field(table), "default", SCALINGS)
    context = max_positions
    match scaling:
        case RopeScaling.NONE:
            values: dict[str, Any] = {}
        case RopeScaling.LINEAR:
            values = {"factor": table.number("factor")}
        case RopeScaling.DYNAMIC:
            values = _dynamic(table, max_positions)
            context = int(max_positions * values["factor"])
        case RopeScaling.LLAMA3:
            values = _llama3(table, max_positions)
        case RopeScaling.YARN:
            values = _yarn(table, max_positions)
            context = max(max_positions, int(values["original_context_tokens"] * values["factor"]))
        case RopeScaling.LONGROPE:
            values = _longrope(table, max_positions, original)
    return RopeSpec(rotary_dim, theta, scaling=scaling, **values), context


def _table(fields: Fields) -> Fields | None:
    """Returns the object with the parameters, of whichever name."""
    if fields.has("rope_scaling") and fields.has("rope_parameters"):
        raise ConfigError(
            "rope_scaling and rope_parameters are both set; keep one, they mean the same"
        )
    old, new = fields.table("rope_scaling"), fields.table("rope_parameters")
    return old or new


def _theta(fields: Fields, table: Fields, default: float) -> float:
    outer = fields.number("rope_theta", default)
    inner = table.number("rope_theta", outer)
    if fields.has("rope_theta") and inner != outer:
        raise ConfigError(
            f"rope_theta={outer} contradicts the rope_theta={inner} of rope_parameters; keep one"
        )
    return inner


def _kind_field(table: Fields) -> str:
    """Returns the name of the field that tells the kind; the older one is checked if both are."""
    if not table.has("rope_type"):
        return "type"
    kind = table.choice("rope_type", "default", {name: name for name in SCALINGS})
    table.only("type", (kind,), "rope_type says otherwise")
    return "rope_type"


def _partial(fields: Fields, table: Fields | None, default: float | None) -> float:
    """Returns the part of a head that turns; both places are checked if both say it."""
    name = "partial_rotary_factor"
    if default is None:
        part, why = 1.0, "its models rotate whole heads"
    else:
        inner = default if table is None else table.number(name, default)
        part, why = fields.number(name, inner), "it contradicts rope_parameters"
    for place in (fields, table):
        if place is not None:
            place.only(name, (part,), why)
    return part


def _dynamic(table: Fields, max_positions: int) -> dict[str, Any]:
    original = "original_max_position_embeddings"
    table.only(original, (max_positions,), "dynamic scaling stretches max_position_embeddings")
    return {"factor": table.number("factor"), "original_context_tokens": max_positions}


def _llama3(table: Fields, max_positions: int) -> dict[str, Any]:
    return {
        "factor": table.number("factor"),
        "original_context_tokens": table.integer("original_max_position_embeddings", max_positions),
        "low_freq_factor": table.number("low_freq_factor"),
        "high_freq_factor": table.number("high_freq_factor"),
    }


def _yarn(table: Fields, max_positions: int) -> dict[str, Any]:
    table.irrelevant("finetuned")  # says how the weights were made
    original = table.integer("original_max_position_embeddings", max_positions)
    factor = table.number("factor", max_positions / original)
    attention_factor = _yarn_attention(table, factor)
    return {
        "factor": factor,
        "original_context_tokens": original,
        "beta_fast": table.number("beta_fast", 32.0),
        "beta_slow": table.number("beta_slow", 1.0),
        "truncate": table.flag("truncate", True),
        "attention_factor": attention_factor,
    }


def _longrope(table: Fields, max_positions: int, original: int | None) -> dict[str, Any]:
    """Source: Ding et al. 2024, section 3.3 and, for the factor of attention, its equation 7."""
    original = table.integer("original_max_position_embeddings", original)
    factor = table.number("factor", max_positions / original)
    implied = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return {
        "factor": max(factor, 1.0),
        "original_context_tokens": original,
        "attention_factor": table.number("attention_factor", implied),
        "short_factors": table.numbers("short_factor"),
        "long_factors": table.numbers("long_factor"),
    }


def _yarn_attention(table: Fields, factor: float) -> float:
    """Returns what cos and sin are multiplied by.

    Source: Peng et al. 2023, section 3.4; the quotient of two such terms as in DeepSeek V2.
    """

    def term(weight: float) -> float:
        return 1.0 + 0.1 * weight * math.log(factor)

    numerator = table.optional_number("mscale")
    denominator = table.optional_number("mscale_all_dim")
    implied = term(1.0)
    if numerator is not None and denominator is not None:
        implied = term(numerator) / term(denominator)
    return table.number("attention_factor", implied)
