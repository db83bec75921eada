"""Which layers of a model see a window only, as Hugging Face configs describe it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from jaxserve.config import LayerSpec
from jaxserve.errors import ConfigError
from jaxserve.models.fields import Fields

SLIDING, FULL = "sliding_attention", "full_attention"


def layer_types(fields: Fields, default: Sequence[str]) -> list[str]:
    """Returns SLIDING or FULL for each layer.

    Args:
        default: of each layer where the config says nothing.
    """
    count = len(default)
    types = fields.words("layer_types", list(default))
    if len(types) != count or not set(types) <= {SLIDING, FULL}:
        raise ConfigError(
            f"layer_types={types!r} must have num_hidden_layers={count} entries, "
            f"each {SLIDING!r} or {FULL!r}"
        )
    return types


def windowed_layers(
    fields: Fields, layer: LayerSpec, window: int | None, default: Sequence[str]
) -> tuple[LayerSpec, ...]:
    """Returns one spec per layer, with a window where the layer slides.

    Args:
        default: see `layer_types`.
    """
    types = layer_types(fields, default)
    if SLIDING in types and window is None:
        raise ConfigError(f"layer_types has {SLIDING!r}, but sliding_window is null; set it")
    sliding = replace(layer, attention=replace(layer.attention, window=window))
    return tuple(sliding if kind == SLIDING else layer for kind in types)
