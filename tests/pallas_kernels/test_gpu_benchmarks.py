"""What the benchmarks for a GPU count and check, without one."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.pallas_kernels.hopper import FIRST

if jax.__version_info__ < FIRST:
    pytest.skip("this JAX has no Mosaic GPU", allow_module_level=True)

from benchmarks import kernels_gpu, model_gpu


def test_bytes_of_a_step_leave_out_the_table_as_it_is_kept() -> None:
    def like(dtype: Any) -> Any:
        return {
            "embedding": {"values": jax.ShapeDtypeStruct((100, 10), dtype)},
            "head": {"values": jax.ShapeDtypeStruct((100, 10), dtype)},
            "norm": jax.ShapeDtypeStruct((10,), jnp.float32),
        }

    assert model_gpu.read_bytes(like(jnp.int8)) == 1040
    assert model_gpu.read_bytes(like(jnp.bfloat16)) == 2040


def case(run: Any, own: bool = True) -> kernels_gpu.Case:
    """Returns a case whose program should return its operand."""
    x = jnp.arange(1.0, 13).reshape(6, 2)
    rows = kernels_gpu.drawn(6)

    def ours() -> kernels_gpu.Program:
        return kernels_gpu.Program("ours", run, [(x,), (x + 0,)], own)

    wanted = np.asarray(x, np.float64)[rows]
    return kernels_gpu.Case("one", 96, 1, "bf16", rows, 1e-2, lambda: wanted, [ours])


def test_a_wrong_row_is_not_ok() -> None:
    def ok(run: Any, own: bool = True) -> bool:
        (row,) = kernels_gpu.measured(case(run, own), 1, 2, 1e9)
        return row["ok"]

    last = int(kernels_gpu.drawn(6)[-1])
    assert ok(lambda x: x + 0)
    assert not ok(lambda x: x.at[last].multiply(1.1))
    assert not ok(lambda x: x * jnp.nan)
    assert ok(lambda x: x * 2, own=False)  # another's error is shown, not judged

    def fails(x: Any) -> Any:
        raise ValueError("no such shape")

    assert not ok(fails)


def test_rows_are_rounded_as_their_weights_are() -> None:
    rows = np.array([[127.0, 0.4, -63.6]])
    np.testing.assert_array_equal(kernels_gpu.exactly_rounded(rows, "int8"), [[127, 0, -64]])
    found = kernels_gpu.exactly_rounded(np.array([[448.0, 17.2]]), "float8_e4m3fn")
    np.testing.assert_array_equal(found, [[448, 18]])
