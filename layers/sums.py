"""Sums and maxima along rows; a row's bits do not depend on how many rows there are."""

from __future__ import annotations

from functools import reduce

import jax.numpy as jnp
from jax import Array, lax


def row_sum(x: Array) -> Array:
    """Returns float32[...], the sums over the last dimension of float32[..., V].

    A row's bits do not depend on the number of rows, which XLA's own sum does not promise: on CPU
    it changes its order of summation with the size of the array, and dots theirs at one row.
    """
    flat = x.reshape(-1, x.shape[-1])
    rows = flat.shape[0]
    padded = jnp.pad(flat, ((0, 1), (0, 0))) if rows == 1 else flat
    ones = jnp.ones((2, x.shape[-1]), x.dtype)
    sums = lax.dot_general(padded, ones, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST)
    return sums[:rows, 0].reshape(x.shape[:-1])


def row_max(x: Array) -> Array:
    """Returns float32[B, 1], the maxima of the rows of float32[B, V].

    XLA on CPU fuses a plain maximum over a large array with what is computed from it, be it an
    exponential or a dot, and these then have other bits, in some programs others for every number
    of rows. Maxima of runs of a row are left alone, and cost the same. On a TPU a run of a large
    vocabulary does not fit into the fast memory.
    """
    return lax.platform_dependent(x, cpu=_max_of_runs, default=_plain_max)


def _plain_max(x: Array) -> Array:
    return jnp.max(x, axis=1, keepdims=True)


def _max_of_runs(x: Array) -> Array:
    size = x.shape[1]
    run = -(-size // _RUNS)
    tops = lax.reduce_window(
        x, -jnp.inf, lax.max, (1, run), (1, run), ((0, 0), (0, run * _RUNS - size))
    )
    return reduce(jnp.maximum, (tops[:, i : i + 1] for i in range(_RUNS)))


_RUNS = 4
