"""How large a model is."""

from __future__ import annotations

import math

import jax

from jaxserve.config import ModelConfig
from jaxserve.layers.decoder import Model
from jaxserve.layers.param import Declare


def num_parameters(config: ModelConfig) -> int:
    """Returns the number of parameters, tied tables counted once; nothing is allocated."""
    declared = jax.tree.leaves(Model(config, Declare()).abstract_params())
    return sum(math.prod(leaf.shape) for leaf in declared)
