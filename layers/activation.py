"""Non-linearities of the MLPs."""

from __future__ import annotations

import jax
from jax import Array

from jaxserve.config import Activation


def activate(x: Array, kind: Activation) -> Array:
    """Returns the non-linearity `kind` of every element of x."""
    match kind:
        case Activation.SILU:
            return jax.nn.silu(x)
        case Activation.GELU:
            return jax.nn.gelu(x, approximate=False)
        case Activation.GELU_TANH:
            return jax.nn.gelu(x, approximate=True)
        case Activation.RELU:
            return jax.nn.relu(x)
