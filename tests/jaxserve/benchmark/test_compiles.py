"""The count of compilations is the compiler's own."""

import jax
import jax.numpy as jnp

from jaxserve.benchmark.compiles import CompileCount


def test_each_new_program_counts_once():
    doubled = jax.jit(lambda x: x * 2)
    short, long = jnp.zeros(3), jnp.zeros(5)
    with CompileCount() as compiles:
        doubled(short)
        doubled(short)
        assert compiles.total == 1
        doubled(long)
    assert compiles.total == 2
    assert compiles.seconds > 0


def test_nothing_counts_once_it_is_closed():
    tripled = jax.jit(lambda x: x * 3)
    values = jnp.zeros(3)
    with CompileCount() as compiles:
        pass
    tripled(values)
    assert compiles.total == 0


def test_programs_compiled_ahead_count():
    with CompileCount() as compiles:
        jax.jit(lambda x: x * 4).lower(jax.ShapeDtypeStruct((3,), jnp.float32)).compile()
    assert compiles.total == 1
