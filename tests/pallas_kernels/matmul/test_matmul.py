"""Every matmul against numpy in float64."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxserve.pallas_kernels import BACKENDS, resolve

# (inputs, outputs): plain, many outputs, many inputs, many of both, and a single feature.
SHAPES = [((7,), (5,)), ((7,), (3, 5)), ((2, 3), (7,)), ((2, 3), (5, 4)), ((1,), (1,))]
TOKENS = 3


@pytest.fixture(params=BACKENDS)
def matmul(request: pytest.FixtureRequest) -> Callable[..., jax.Array]:
    return jax.jit(resolve("matmul", request.param), static_argnums=(2, 3, 4))


def operands(inputs: tuple[int, ...], outputs: tuple[int, ...], dtype: Any) -> list[np.ndarray]:
    """Returns x[T, *inputs] and w[*inputs, *outputs]."""
    rng = np.random.default_rng(0)
    shapes = (TOKENS, *inputs), inputs + outputs
    return [rng.normal(size=shape).astype(dtype) for shape in shapes]


@pytest.mark.parametrize("orientation", ["in_out", "out_in"])
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_inputs_are_contracted_in_either_orientation(
    matmul: Callable[..., jax.Array],
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
    orientation: str,
) -> None:
    x, w = operands(inputs, outputs, np.float32)
    wanted = np.tensordot(x.astype(np.float64), w.astype(np.float64), axes=len(inputs))
    if orientation == "out_in":
        w = np.moveaxis(w, range(len(inputs)), range(-len(inputs), 0))
    found = matmul(x, w, len(inputs), orientation, "float32")
    assert found.shape == (TOKENS, *outputs)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wanted_dtype", ["float32", "bfloat16"])
def test_bfloat16_is_summed_in_float32_and_returned_as_asked(
    matmul: Callable[..., jax.Array], wanted_dtype: str
) -> None:
    # 256 + 1 + ... + 1 stays 256 where every sum is rounded to bfloat16.
    x = np.ones((1, 65), ml_dtypes.bfloat16)
    x[0, 0] = 256
    w = np.ones((65, 1), ml_dtypes.bfloat16)
    found = matmul(x, w, 1, "in_out", wanted_dtype)
    assert found.dtype == jnp.dtype(wanted_dtype)
    assert float(found[0, 0]) == 320.0


def test_float32_keeps_its_precision(matmul: Callable[..., jax.Array]) -> None:
    # One more than a power of two is lost where operands are cut to fewer bits.
    x, w = np.full((1, 1), 1 + 2.0**-20, np.float32), np.ones((1, 1), np.float32)
    found = matmul(x, w, 1, "in_out", "float32")
    assert float(found[0, 0]) == 1 + 2.0**-20
