"""Every int8_matmul against numpy in float64."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxserve.pallas_kernels import BACKENDS, resolve
from jaxserve.pallas_kernels.int8_matmul import Mode
from jaxserve.pallas_kernels.int8_matmul.reference import scaled_rows

SHAPES = [((7,), (5,)), ((70,), (3, 5)), ((2, 33), (7,)), ((2, 3), (5, 4)), ((1,), (1,))]
TOKENS = 3


@pytest.fixture(params=BACKENDS)
def int8_matmul(request: pytest.FixtureRequest) -> Callable[..., jax.Array]:
    return jax.jit(
        resolve("int8_matmul", request.param), static_argnums=(3, 4, 5), static_argnames="mode"
    )


def operands(
    inputs: tuple[int, ...], outputs: tuple[int, ...], dtype: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns x[T, *inputs], w[*inputs, *outputs] of int8 and scales[*outputs]."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(TOKENS, *inputs)) * np.exp(rng.normal(size=(TOKENS, *[1] * len(inputs))))
    w = rng.integers(-127, 128, size=inputs + outputs).astype(np.int8)
    return x.astype(dtype), w, rng.uniform(0.01, 0.1, size=outputs).astype(np.float32)


def exact(x: np.ndarray, w: np.ndarray, scales: np.ndarray, num_inputs: int) -> np.ndarray:
    return np.tensordot(x.astype(np.float64), w.astype(np.float64), axes=num_inputs) * scales


def stored(w: np.ndarray, num_inputs: int, orientation: str) -> np.ndarray:
    if orientation == "in_out":
        return w
    return np.ascontiguousarray(np.moveaxis(w, range(num_inputs), range(-num_inputs, 0)))


def size_of(x: np.ndarray, w: np.ndarray, scales: np.ndarray, num_inputs: int) -> np.ndarray:
    """Returns what the products sum to without their signs: what rounding is relative to."""
    return exact(np.abs(x), np.abs(w.astype(np.int32)), scales, num_inputs)


@pytest.mark.parametrize("orientation", ["in_out", "out_in"])
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
@pytest.mark.parametrize(("dtype", "bound"), [(np.float32, 1e-6), (ml_dtypes.bfloat16, 1e-4)])
def test_weights_alone_lose_nothing_beyond_their_own_rounding(
    int8_matmul: Callable[..., jax.Array],
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
    orientation: str,
    dtype: Any,
    bound: float,
) -> None:
    x, w, scales = operands(inputs, outputs, dtype)
    n = len(inputs)
    found = int8_matmul(
        x, stored(w, n, orientation), scales, n, orientation, "float32", mode=Mode.W8A16
    )
    assert found.shape == (TOKENS, *outputs)
    error = np.abs(np.asarray(found) - exact(x, w, scales, n))
    largest = np.abs(x.astype(np.float32)).reshape(TOKENS, -1).max(1)
    rows = largest.reshape(-1, *[1] * len(outputs)) * np.abs(w.astype(np.float32)).sum(
        tuple(range(n))
    )
    assert np.all(error <= bound * (size_of(x, w, scales, n) + rows * scales))


@pytest.mark.parametrize("orientation", ["in_out", "out_in"])
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_rounded_rows_are_summed_exactly(
    int8_matmul: Callable[..., jax.Array],
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
    orientation: str,
) -> None:
    x, w, scales = operands(inputs, outputs, ml_dtypes.bfloat16)
    n = len(inputs)
    found = int8_matmul(
        x, stored(w, n, orientation), scales, n, orientation, "float32", mode=Mode.W8A8
    )
    flat = x.astype(np.float64).reshape(TOKENS, -1)
    unit = np.abs(flat).max(axis=1, keepdims=True) / 127
    rounded = (np.round(flat / unit) * unit).reshape(x.shape)
    wanted = exact(rounded, w, scales, n)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


def test_a_row_of_zeros_gives_zeros(int8_matmul: Callable[..., jax.Array]) -> None:
    _, w, scales = operands((7,), (5,), np.float32)
    for mode in Mode:
        found = int8_matmul(np.zeros((2, 7)), w, scales, 1, "in_out", "bfloat16", mode=mode)
        assert found.dtype == jnp.bfloat16
        np.testing.assert_array_equal(found.astype(jnp.float32), np.zeros((2, 5)))


def test_a_rows_bits_do_not_depend_on_the_others(int8_matmul: Callable[..., jax.Array]) -> None:
    x, w, scales = operands((70,), (15,), ml_dtypes.bfloat16)
    for mode in Mode:
        alone = int8_matmul(x[:2], w, scales, 1, "in_out", "bfloat16", mode=mode)
        beside = int8_matmul(np.tile(x, (9, 1)), w, scales, 1, "in_out", "bfloat16", mode=mode)
        np.testing.assert_array_equal(alone, beside[:2])


def test_rows_round_to_nearest_and_reach_the_largest_value() -> None:
    rows, factor = scaled_rows(jnp.asarray([[63.5, 0.25, 0.75, -0.2, -63.5]]), 1)
    assert jnp.round(rows).tolist() == [[127, 0, 2, 0, -127]]
    assert factor.tolist() == [0.5]
