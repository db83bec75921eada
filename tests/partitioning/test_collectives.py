"""On one device communication is the identity."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.config import AttentionSpec
from jaxserve.partitioning.collectives import Comm, LocalComm, Part
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


def test_a_rounded_table_of_many_tokens_is_looked_up_by_parts_of_its_width() -> None:
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.integers(-127, 128, (8192, 1024)), jnp.int8)
    scales = jnp.asarray(rng.uniform(1, 2, 8192), jnp.float32)
    index = rng.integers(0, 8192, 300)
    taken = str(
        jax.make_jaxpr(LocalComm().lookup, static_argnums=3)(table, index, scales, "float32")
    )
    assert "gather" in taken and "i8[300,512]" in taken
    found = LocalComm().lookup(table, jnp.asarray(index), scales, "float32")
    wanted = np.asarray(table, np.float32)[index] * np.asarray(scales)[index, None]
    np.testing.assert_array_equal(found, wanted)


def test_local_communication_is_a_static_value() -> None:
    assert LocalComm() == LocalComm()
    assert hash(LocalComm()) == hash(LocalComm())
