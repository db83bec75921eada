"""Non-linearities against their definitions."""

import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.config import Activation
from jaxserve.layers.activation import activate

DEFINITIONS: dict[Activation, Callable[[float], float]] = {
    Activation.SILU: lambda x: x / (1 + math.exp(-x)),
    Activation.GELU: lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
    Activation.GELU_TANH: lambda x: (
        x * 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    ),
    Activation.RELU: lambda x: max(x, 0.0),
}


@pytest.mark.parametrize("kind", Activation)
def test_an_activation_is_its_definition(kind: Activation) -> None:
    x = np.linspace(-4, 4, 17, dtype=np.float32)
    wanted = [DEFINITIONS[kind](float(value)) for value in x]
    # Tight enough to tell the two forms of GELU apart: they differ by 5e-4.
    np.testing.assert_allclose(activate(jnp.asarray(x), kind), wanted, atol=2e-6)
