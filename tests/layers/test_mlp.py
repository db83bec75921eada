"""The MLP against its formula in numpy."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.config import Activation, MlpSpec
from jaxserve.layers.mlp import Mlp
from jaxserve.layers.param import Axis, Declare

from .tiny_models import SERIAL, filled, runtime, sequences

X = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_an_mlp_is_its_formula(gated: bool, bias: bool) -> None:
    spec = MlpSpec(7, Activation.RELU, gated=gated, bias=bias)
    mlp, params = filled(Mlp(spec, Axis("embed", 4), Declare()))
    run = runtime(sequences([[1, 2, 3]]), replace(SERIAL, mlp=spec))

    def mapped(x: np.ndarray, weight: dict[str, np.ndarray]) -> np.ndarray:
        return x @ weight["values"] + weight.get("bias", 0)

    hidden = params["hidden"]["separate"]
    first = np.maximum(mapped(X, hidden["gate" if gated else "up"]), 0)
    h = first * mapped(X, hidden["up"]) if gated else first
    found = mlp.finish(*run.comm.distribute(mlp.project(jnp.asarray(X), run)), run=run)
    wanted = h @ params["down"]["values"]  # the block adds the bias
    np.testing.assert_allclose(found, wanted, atol=1e-5)
