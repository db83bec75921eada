"""The gated MLP of Llama and of most models since, as their configs describe it."""

from __future__ import annotations

from jaxserve.config import MlpSpec
from jaxserve.models.activations import ACTIVATIONS
from jaxserve.models.fields import Fields


def read_mlp(fields: Fields, size: str = "intermediate_size") -> MlpSpec:
    """Returns an MLP gated by silu, or by what the config says.

    Args:
        size: field with the number of hidden features.
    """
    activation = fields.choice("hidden_act", "silu", ACTIVATIONS)
    return MlpSpec(fields.integer(size), activation, gated=True)
