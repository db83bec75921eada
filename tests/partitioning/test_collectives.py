"""On one device communication is the identity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.config import AttentionSpec
from jaxserve.partitioning.collectives import Comm, LocalComm, Part, _by_columns
from jaxserve.partitioning.layout import Stage


def test_nothing_moves_on_one_device() -> None:
    comm: Comm = LocalComm()
    x = jnp.ones((2, 3))
    assert comm.move(x, Stage.RESIDUAL, Stage.INPUT) is x
    assert comm.distribute([Part(x, Stage.QUERY)]) == [x]
    assert comm.weight(x, [("embed", 2), ("ffn", 3)]) is x
    assert comm.total(x, Stage.RESIDUAL) is x
    spec = AttentionSpec(4, 2, 8)
    assert comm.local(spec) is spec


def test_biases_are_added_where_parts_arrive() -> None:
    bias = jnp.arange(3.0)
    (y,) = LocalComm().distribute([Part(jnp.ones((2, 3)), Stage.HIDDEN, bias=bias)])
    np.testing.assert_array_equal(y, [[1, 2, 3], [1, 2, 3]])


@pytest.mark.parametrize(
    ("dtype", "shape", "tokens", "parts"),
    [
        ("int8", (8192, 1024), 300, 2),
        ("int8", (8192, 1024), 200, 1),
        ("bfloat16", (4064, 2048), 128, 2),
        ("bfloat16", (4064, 2048), 64, 1),
        ("bfloat16", (2000, 2048), 128, 1),
        ("bfloat16", (16000, 4608), 128, 1),
    ],
)
def test_a_table_that_just_fits_is_looked_up_by_parts_of_its_width_on_a_tpu(
    dtype: str, shape: tuple[int, int], tokens: int, parts: int
) -> None:
    table = jax.ShapeDtypeStruct(shape, dtype)
    index = jax.ShapeDtypeStruct((tokens,), "int32")
    scales = jax.ShapeDtypeStruct(shape[:1], "float32") if dtype == "int8" else None
    asked = jax.jit(LocalComm().lookup, static_argnums=3).trace(table, index, scales, "float32")
    text = asked.lower(lowering_platforms=("tpu",)).as_text()
    short = {"int8": "i8", "bfloat16": "bf16"}[dtype]
    assert text.count(f"{tokens}x{shape[1] // parts}x{short}>") >= parts
    assert (f"{shape[0]}x{shape[1] // 2}x{short}>" in text) == (parts == 2)
    on_cpu = asked.lower(lowering_platforms=("cpu",)).as_text()
    assert f"{shape[0]}x{shape[1] // 2}x{short}>" not in on_cpu


def test_a_table_in_parts_gives_its_rows() -> None:
    table = jnp.asarray(np.random.default_rng(0).normal(size=(40, 256)), jnp.float32)
    index = jnp.asarray([3, 39, 3, 0])
    np.testing.assert_array_equal(_by_columns(2, table, index), np.asarray(table)[index])


def test_a_rounded_table_is_looked_up_with_its_scales() -> None:
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.integers(-127, 128, (64, 128)), jnp.int8)
    scales = jnp.asarray(rng.uniform(1, 2, 64), jnp.float32)
    index = rng.integers(0, 64, 300)
    found = LocalComm().lookup(table, jnp.asarray(index), scales, "float32")
    wanted = np.asarray(table, np.float32)[index] * np.asarray(scales)[index, None]
    np.testing.assert_array_equal(found, wanted)


def test_local_communication_is_a_static_value() -> None:
    assert LocalComm() == LocalComm()
    assert hash(LocalComm()) == hash(LocalComm())
