"""On one device communication is the identity."""

import jax.numpy as jnp

from jaxserve.partitioning.collectives import Comm, LocalComm


def test_every_collective_of_one_device_returns_its_input() -> None:
    comm: Comm = LocalComm()
    x = jnp.ones((2, 3))
    assert comm.all_gather(x, ("embed",)) is x
    assert comm.reduce_scatter(x, ("embed",), ("ffn",)) is x
    assert comm.psum(x, "embed") is x
    assert comm.all_to_all(x, "heads", "batch") is x


def test_local_communication_is_a_static_value() -> None:
    assert LocalComm() == LocalComm()
    assert hash(LocalComm()) == hash(LocalComm())
