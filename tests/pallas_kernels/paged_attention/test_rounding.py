"""Keys and values of one byte, with a scale for each token and head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.config import AttentionSpec, KvDtype, cache_spec
from jaxserve.errors import UsageError
from jaxserve.pallas_kernels import BACKENDS, kernel_set
from jaxserve.pallas_kernels.paged_attention.rounding import LIMITS, finite, rounded

from .pools import Pool, Run, read

SPEC = AttentionSpec(4, 2, 64)
DTYPES = [KvDtype.INT8.value, KvDtype.FP8.value]


def test_the_largest_of_a_head_takes_the_limit_and_the_rest_the_nearest() -> None:
    x = jnp.array([[[1.0, -12.7, 0.26, 0.24], [0, 0, 0, 0]]])
    values, scales = rounded(x, "int8")
    np.testing.assert_array_equal(values, [[[10, -127, 3, 2], [0, 0, 0, 0]]])
    np.testing.assert_allclose(scales, [[0.1, 1.0]], rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0.0, 1e-44, 1e-38, 1.0, 3e38])
def test_no_magnitude_leaves_what_is_no_number(dtype: str, size: float) -> None:
    x = jnp.full((1, 1, 4), size, jnp.float32) * jnp.array([[[1, -1, 0.5, 0]]])
    values, scales = rounded(x, dtype)
    back = np.asarray(values.astype(jnp.float32)) * np.asarray(scales)[..., None]
    assert np.isfinite(back).all()
    np.testing.assert_allclose(back, x, rtol=0.07, atol=2e-38)
    assert float(jnp.max(jnp.abs(values.astype(jnp.float32)))) <= LIMITS[dtype]


def test_values_that_are_not_finite_become_zeros() -> None:
    x = jnp.array([[[1.0, np.inf, -np.inf, np.nan]]])
    values, scales = rounded(finite(x), "int8")
    np.testing.assert_array_equal(values, [[[127, 0, 0, 0]]])
    np.testing.assert_allclose(scales, 1 / 127, rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_pages_are_the_same_however_a_sequence_is_cut(dtype: str, backend: str) -> None:
    whole, cut = (_filled(dtype, backend, written) for written in (40, 7))
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(cut), strict=True):
        first, second = (np.asarray(x.astype(jnp.float32)) for x in (one, other))
        np.testing.assert_array_equal(first, second)
        assert first.any()


def _filled(dtype: str, backend: str, written: int) -> object:
    pool = Pool(SPEC, pages_dtype=dtype, backend=backend, width=3, written=written)
    return pool.filled([0], [40])[1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_is_that_of_keys_and_values_times_their_scales(dtype: str, backend: str) -> None:
    size = 40
    tokens = read(SPEC, 0)
    table, at = jnp.array([[3, 1, 2]]), jnp.arange(size, dtype=jnp.int32)
    q = jnp.asarray(tokens.q[:size])
    # Heads of very different sizes: a scale for all of a page would lose the small one.
    sizes = np.array([1e-2, 2])[None, :, None]
    k, v = (jnp.asarray(x[:size] * sizes, jnp.float32) for x in (tokens.k, tokens.v))

    def attended(name: str, dtype: str, k: jax.Array, v: jax.Array) -> np.ndarray:
        some = kernel_set(name)
        pages = some.init_pages(4, 16, cache_spec(SPEC, dtype))
        out, _ = some.write_and_attend(
            q, k, v, pages, table, jnp.zeros_like(at), jnp.array([0, size]), jnp.array([size]),
            at, SPEC, page_size=16,
        )  # fmt: skip
        return np.asarray(out)

    def back(x: jax.Array) -> jax.Array:
        values, scales = rounded(x, dtype)
        return values.astype(jnp.float32) * scales[..., None]

    wanted = attended("reference", "float32", back(k), back(v))
    found = attended(backend, dtype, k, v)
    for heads in (slice(0, 2), slice(2, 4)):
        most = np.abs(wanted[:, heads]).max()
        np.testing.assert_allclose(found[:, heads], wanted[:, heads], atol=3e-6 * most)
        assert np.abs(wanted[:, heads] - attended("reference", "float32", k, v)[:, heads]).max() > (
            1e-4 * most
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tokens_bits_do_not_depend_on_the_rows_beside_it(dtype: str) -> None:
    pool = Pool(SPEC, "bfloat16", pages_dtype=dtype)
    alone = pool.call([Run(0, 300, 1)])
    beside = pool.call([Run(1, 0, 50), Run(0, 300, 1), Run(2, 600, 1)])
    cut = pool.call([Run(0, 290, 11)])
    np.testing.assert_array_equal(alone[0], beside[50])
    np.testing.assert_array_equal(alone[0], cut[10])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_copied_page_has_its_scales(backend: str) -> None:
    kernels = kernel_set(backend)
    table, pages = Pool(SPEC, pages_dtype="int8", backend=backend, width=3).filled([0], [40])
    source = int(table[0, 1])
    after = kernels.copy_pages(pages, jnp.array([source]), jnp.array([0]))
    for leaf in jax.tree.leaves(after):
        np.testing.assert_array_equal(leaf[0], leaf[source])
        assert np.asarray(leaf[0]).any()


def test_an_unknown_type_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match="kv_dtype='int4' is not supported; use int8 or fp8"):
        KvDtype.named("int4")
