"""Every ragged matmul against numpy in float64, group by group."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.pallas_kernels import BACKENDS, resolve
from jaxserve.pallas_kernels.int8_matmul import Mode
from jaxserve.pallas_kernels.int8_matmul.tiles import Tile
from jaxserve.pallas_kernels.ragged_matmul import reference, tpu
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
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def ragged_matmul(backend: str) -> Callable[..., jax.Array]:
    return jax.jit(resolve("ragged_matmul", backend), static_argnums=3)


def rounded_matmul(backend: str, mode: Mode) -> Callable[..., jax.Array]:
    op = resolve("ragged_matmul", backend)
    return jax.jit(lambda x, w, sizes, scales: op(x, w, sizes, "float32", scales=scales, mode=mode))


def rounded(
    rng: np.random.Generator, rows: int, groups: int, channels: int, inputs: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns float32[rows, inputs], int8[groups, channels, inputs], float32[groups, channels]."""
    x = rng.normal(size=(rows, inputs)).astype(np.float32)
    w = rng.integers(-127, 128, (groups, channels, inputs)).astype(np.int8)
    return x, w, rng.uniform(0.5, 1.5, (groups, channels)).astype(np.float32)


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


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize(("sizes", "left"), SIZES)
def test_weights_of_int8_have_a_scale_for_each_group_and_channel(
    backend: str, sizes: tuple[int, ...], left: int, mode: Mode
) -> None:
    rng = np.random.default_rng(0)
    x, w, scales = rounded(rng, sum(sizes) + left, len(sizes), 5, 7)
    ends = np.cumsum(sizes)
    group = np.minimum((np.arange(len(x))[:, None] >= ends).sum(axis=1), len(sizes) - 1)
    unit = np.abs(x).max(axis=1, keepdims=True) / 127
    rows = np.rint(x / unit) * unit if mode is Mode.W8A8 else x.astype(np.float64)
    wanted = np.einsum("mk,mnk->mn", rows, w[group].astype(np.float64)) * scales[group]
    wanted[len(x) - left :] = 0
    found = rounded_matmul(backend, mode)(x, w, np.array(sizes, np.int32), scales)
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blocks_of_the_kernel_fit_no_side(mode: Mode, dtype: str) -> None:
    rng = np.random.default_rng(1)
    sizes = np.array((0, 20, 0, 3, 40, 1, 0), np.int32)
    x, w, scales = rounded(rng, 70, len(sizes), 300, 150)
    scales = jnp.asarray(scales)
    given = jnp.asarray(x, dtype), jnp.asarray(w), jnp.asarray(sizes), dtype
    found = tpu.ragged_matmul(*given, scales=scales, mode=mode, tile=Tile(16, 128, 128))
    wanted = reference.ragged_matmul(*given, scales=scales, mode=mode)
    limit = 1e-5 if dtype == "float32" else 1e-2
    error = np.abs(np.asarray(found, np.float32) - np.asarray(wanted, np.float32)).max()
    assert error < limit * np.abs(np.asarray(wanted, np.float32)).max()


def test_a_visit_is_a_block_and_a_group_that_has_rows_in_it() -> None:
    visits = tpu._visits(jnp.array([3, 6, 0, 2]), 11, 4)
    count = int(visits.number[0])
    assert count == 5
    found = [tuple(int(x[i]) for x in visits[:4]) for i in range(count)]
    assert found == [(0, 0, 0, 3), (0, 1, 3, 4), (1, 1, 0, 4), (2, 1, 0, 1), (2, 3, 1, 3)]
    # The others repeat the last.
    assert {tuple(int(x[i]) for x in visits[:4]) for i in range(count, 6)} == {found[-1]}


@pytest.mark.parametrize("mode", Mode)
def test_rounded_rows_do_not_depend_on_the_rows_beside_them(mode: Mode) -> None:
    rng = np.random.default_rng(0)
    x, w, scales = rounded(rng, 300, 4, 64, 96)
    found = []
    for sizes in ((0, 0, 1, 0), (3, 9, 40, 1), (100, 0, 150, 50)):
        start = sum(sizes[:2])
        rows = np.concatenate([x[:start] + 1, x[:1], x[start + 1 : sum(sizes)] - 1])
        y = rounded_matmul("xla", mode)(rows, w, np.array(sizes, np.int32), scales)
        found.append(np.asarray(y[start]))
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])


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
