import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxserve.config import AlibiSpec
from jaxserve.pallas_kernels.attention.scores import alibi_bias, alibi_slopes


def test_slopes_of_a_power_of_two_are_a_geometric_series() -> None:
    np.testing.assert_allclose(alibi_slopes(4), [2**-2, 2**-4, 2**-6, 2**-8])


def test_further_heads_take_every_other_slope_of_the_next_series() -> None:
    # Six heads: the four above, then the first and third of the series for eight.
    np.testing.assert_allclose(alibi_slopes(6), [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3])


def test_bias_is_slope_times_key_position_times_scale() -> None:
    positions = jnp.array([[0, 1, 2, 5]])
    bias = alibi_bias(AlibiSpec(scale=0.5), 2, positions)
    np.testing.assert_allclose(bias[0, 0], np.array([0, 1, 2, 5]) * 2**-4 * 0.5)
    np.testing.assert_allclose(bias[0, 1], np.array([0, 1, 2, 5]) * 2**-8 * 0.5)


@pytest.mark.parametrize("compiled", [False, True])
def test_bfloat16_rounds_slopes_positions_and_products(compiled: bool) -> None:
    # Past 256 a position is rounded itself; nine heads have a slope that is no power of two.
    # Compiled, XLA would drop a cast to bfloat16 and back.
    positions = np.arange(1024)
    spec = AlibiSpec(bfloat16=True)

    def bias(positions: jax.Array) -> jax.Array:
        return alibi_bias(spec, 9, positions)

    found = (jax.jit(bias) if compiled else bias)(jnp.asarray(positions)[None])[0]
    rounded = positions.astype(ml_dtypes.bfloat16)
    assert (rounded != positions).any()
    for head, slope in enumerate(alibi_slopes(9).astype(ml_dtypes.bfloat16)):
        np.testing.assert_array_equal(found[head], (slope * rounded).astype(np.float32))
