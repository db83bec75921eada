"""Sums and maxima along rows: their values, and their bits beside other rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.layers.sums import row_max, row_sum

_sum = jax.jit(row_sum)
_sum_of_squares = jax.jit(lambda x: row_sum(x * x))
_max = jax.jit(row_max)
_exponentials = jax.jit(lambda x: jnp.exp(x - row_max(x)))
_softmax_total = jax.jit(lambda x: row_sum(jnp.exp(x - row_max(x))))


def test_sums_are_those_of_the_last_dimension() -> None:
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    assert _sum(x).tolist() == x.sum(-1).tolist()
    assert _sum(x[:1, 0]).tolist() == [6.0]  # one row
    assert _sum(x[0, 0]).tolist() == 6.0  # no other dimension


@pytest.mark.parametrize("width", [12, 31, 256, 768])
def test_a_row_has_the_same_bits_however_many_rows_there_are(width: int) -> None:
    x = np.random.default_rng(width).normal(size=(512, width)).astype(np.float32)
    for of in (_sum, _sum_of_squares):
        whole = np.asarray(of(x))
        for rows in (1, 2, 3, 8, 32, 100):
            np.testing.assert_array_equal(np.asarray(of(x[:rows])), whole[:rows])


@pytest.mark.parametrize("width", [1, 3, 4, 31, 256])
def test_maxima_are_those_of_rows(width: int) -> None:
    x = np.random.default_rng(width).normal(size=(5, width)).astype(np.float32)
    np.testing.assert_array_equal(_max(x), x.max(-1, keepdims=True))
    assert _max(np.full((2, width), -np.inf, np.float32)).tolist() == [[-np.inf]] * 2


@pytest.mark.parametrize("width", [31, 256, 3000])
def test_what_follows_from_a_maximum_has_the_same_bits_too(width: int) -> None:
    x = np.random.default_rng(width).normal(size=(200, width)).astype(np.float32) * 3
    for of in (_exponentials, _softmax_total):
        whole = np.asarray(of(x))
        for rows in (1, 2, 3, 8, 32, 100):
            np.testing.assert_array_equal(np.asarray(of(x[:rows])), whole[:rows])


def test_gradients_go_through() -> None:
    x = jnp.asarray([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    found = jax.grad(lambda x: jnp.sum(row_sum(x * x)))(x)
    np.testing.assert_array_equal(found, 2 * x)
