"""Every ragged matmul against numpy in float64, group by group."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.pallas_kernels import BACKENDS, resolve
from jaxserve.pallas_kernels.ragged_matmul.xla import BLOCK_ROWS

# Rows of each group, and rows of none: even, none at all, one alone, blocks full and not.
SIZES = [
    ((3, 2, 4), 0),
    ((0, 5, 0), 2),
    ((0, 0, 1), 0),
    ((0, 0, 0), 3),
    ((BLOCK_ROWS, 2 * BLOCK_ROWS + 1, BLOCK_ROWS - 1), 7),
]


@pytest.fixture(params=BACKENDS)
def ragged_matmul(request: pytest.FixtureRequest) -> Callable[..., jax.Array]:
    return jax.jit(resolve("ragged_matmul", request.param), static_argnums=3)


@pytest.mark.parametrize(("sizes", "left"), SIZES)
def test_each_row_meets_the_weight_of_its_group(
    ragged_matmul: Callable[..., jax.Array], sizes: tuple[int, ...], left: int
) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(sum(sizes) + left, 7)).astype(np.float32)
    w = rng.normal(size=(len(sizes), 5, 7)).astype(np.float32)
    groups = np.split(x.astype(np.float64), np.cumsum(sizes))
    wanted = [rows @ one.T for rows, one in zip(groups, w.astype(np.float64), strict=False)]
    found = ragged_matmul(x, w, np.array(sizes, np.int32), "float32")
    np.testing.assert_allclose(
        found, np.concatenate([*wanted, np.zeros((left, 5))]), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bits_of_a_row_do_not_depend_on_the_rows_beside_it(dtype: str) -> None:
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(4, 64, 96)), dtype)
    x = jnp.asarray(rng.normal(size=(300, 96)), dtype)
    found = []
    for sizes in ((0, 0, 1, 0), (3, 9, 40, 1), (100, 0, 150, 50)):
        start = sum(sizes[:2])
        rows = jnp.concatenate([x[:start] + 1, x[:1], x[start + 1 : sum(sizes)] - 1])
        y = jax.jit(resolve("ragged_matmul", "xla"), static_argnums=3)(
            rows, w, jnp.array(sizes, jnp.int32), dtype
        )
        found.append(np.asarray(y[start].astype(jnp.float32)))
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])


def test_gradients_reach_rows_and_weights() -> None:
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(9, 7)), rng.normal(size=(3, 5, 7))
    sizes = np.array((4, 0, 3), np.int32)
    grads = [
        jax.grad(lambda *both, op=op: jnp.sum(op(*both, sizes, "float32") ** 2), (0, 1))(
            jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32)
        )
        for op in (resolve("ragged_matmul", backend) for backend in BACKENDS)
    ]
    *others, definition = grads
    for found, wanted in (pair for one in others for pair in zip(one, definition, strict=True)):
        assert np.abs(wanted).max() > 1
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
