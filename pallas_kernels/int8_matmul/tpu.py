"""Int8 matmul on TPU: a weight is read once for as many rows as fit, as int8.

The grid goes over rows, output channels and parts of the contraction, the last innermost. In
w8a16 a part of the weight becomes the activations' type next to the matrix unit. In w8a8 the rows
are rounded when a core computes its first output channels and stay rounded in its memory; the sums
are int32, so they do not depend on the size of the parts. The epilogue (scales, bias, activation)
costs nothing beside either.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from jaxserve.config import Activation
from jaxserve.pallas_kernels.int8_matmul import Mode, activated
from jaxserve.pallas_kernels.int8_matmul.reference import LIMIT
from jaxserve.pallas_kernels.int8_matmul.tiles import Tile, tile_for

LANES = 128


@dataclass(frozen=True)
class _Build:
    """What a kernel is compiled for.

    Attributes:
        cores: that share the blocks of output channels; each rounds the rows for itself.
    """

    mode: Mode
    tile: Tile
    out_first: bool
    dtype: str
    has_bias: bool
    activation: Activation | None
    parts: int
    cores: int
    interpret: Any


def int8_matmul(
    x: Array,
    w: Array,
    scales: Array,
    num_inputs: int,
    orientation: str,
    dtype: DTypeLike,
    *,
    mode: Mode = Mode.W8A16,
    bias: Array | None = None,
    activation: Activation | None = None,
    tile: Tile | None = None,
    interpret: Any = None,
) -> Array:
    """Returns activation(x w scales + bias) as [T, *outputs]; see `reference.int8_matmul`.

    Args:
        tile: sizes of the blocks; None takes those that `tiles` knows.
        interpret: False compiles, True or `InterpretParams` interpret; None compiles on TPU.
    """
    size = math.prod(x.shape[x.ndim - num_inputs :])
    out_first = orientation == "out_in"
    flat_w = w.reshape(-1, size) if out_first else w.reshape(size, -1)
    channels = scales.size
    tile = (tile or tile_for(x.shape[0], size, channels, mode)).within(x.shape[0], size, channels)
    build = _Build(
        mode,
        tile,
        out_first,
        jnp.dtype(dtype).name,
        bias is not None,
        activation,
        parts=-(-size // tile.inputs),
        cores=tile.cores,
        interpret=interpret,
    )
    # Past the end of the contraction a weight's block holds any numbers, and x has zeros there.
    flat_x = jnp.pad(x.reshape(-1, size), ((0, 0), (0, build.parts * tile.inputs - size)))
    row = [scales.astype(jnp.float32).reshape(1, -1)]
    if bias is not None:
        row.append(bias.astype(jnp.float32).reshape(1, -1))
    if interpret is not None:
        y = _multiply(build, flat_x, flat_w, *row)
    else:
        y = lax.platform_dependent(
            flat_x,
            flat_w,
            *row,
            tpu=partial(_multiply, replace(build, interpret=False)),
            default=partial(_multiply, replace(build, interpret=True)),
        )
    return y.reshape(x.shape[0], *scales.shape)


@partial(jax.jit, static_argnums=0)
def _multiply(build: _Build, x: Array, w: Array, *row: Array) -> Array:
    """Returns [T, N] for x[T, parts * inputs]; `row` is the scales and the bias, if any."""
    tile = build.tile
    tokens, channels = x.shape[0], row[0].shape[1]
    whole = build.mode is Mode.W8A8
    blocks = -(-channels // tile.channels)
    cores = min(build.cores, blocks)
    share = -(-blocks // cores)
    grid = -(-tokens // tile.rows), cores, share, build.parts

    def block(core: Any, n: Any) -> Any:
        # Where shares are not even, the last core computes its last block twice.
        return (
            core * share + n
            if cores * share == blocks
            else jnp.minimum(core * share + n, blocks - 1)
        )

    if whole:
        x_spec = pl.BlockSpec((tile.rows, x.shape[1]), lambda m, c, n, k: (m, 0))
    else:
        x_spec = pl.BlockSpec((tile.rows, tile.inputs), lambda m, c, n, k: (m, k))
    if build.out_first:
        w_spec = pl.BlockSpec((tile.channels, tile.inputs), lambda m, c, n, k: (block(c, n), k))
    else:
        w_spec = pl.BlockSpec((tile.inputs, tile.channels), lambda m, c, n, k: (k, block(c, n)))
    per_channel = pl.BlockSpec((1, tile.channels), lambda m, c, n, k: (0, block(c, n)))
    sums = jnp.int32 if whole else jnp.float32
    scratch = [pltpu.VMEM((tile.rows, tile.channels), sums)]
    if whole:
        scratch.append(pltpu.VMEM((tile.rows, x.shape[1]), jnp.int8))
        scratch.append(pltpu.VMEM((tile.rows, LANES), jnp.float32))
    across = "arbitrary" if whole else "parallel"
    return pl.pallas_call(
        partial(_kernel, build),
        out_shape=jax.ShapeDtypeStruct((tokens, channels), build.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=0,
            grid=grid,
            in_specs=[x_spec, w_spec, *[per_channel] * len(row)],
            out_specs=pl.BlockSpec((tile.rows, tile.channels), lambda m, c, n, k: (m, block(c, n))),
            scratch_shapes=scratch,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", across, "arbitrary"),
            vmem_limit_bytes=vmem_bytes(build, x.shape[1], x.dtype),
        ),
        interpret=build.interpret,
        name=f"int8_matmul_{build.mode}",
    )(x, w, *row)


def vmem_bytes(build: _Build, inputs: int, dtype: Any) -> int:
    """Returns the memory that a core is asked for: blocks twice, sums, what stays of the rows."""
    tile, size = build.tile, jnp.dtype(dtype).itemsize
    whole = build.mode is Mode.W8A8
    rows = tile.rows * (inputs if whole else tile.inputs) * size
    weight = tile.inputs * tile.channels
    sums = tile.rows * tile.channels * 4
    kept = tile.rows * (inputs + 4 * LANES) if whole else 0
    inside = 4 * tile.rows * tile.inputs if whole else 2 * weight
    return max(16 << 20, 2 * rows + 2 * weight + 4 * sums + kept + inside + (4 << 20))


def _kernel(build: _Build, x: Any, w: Any, scales: Any, *refs: Any) -> None:
    bias = refs[0] if build.has_bias else None
    out, sums, *rest = refs[build.has_bias :]
    part = pl.program_id(3)
    if build.mode is Mode.W8A8:
        rounded, factor = rest
        pl.when(_begins())(partial(_round, x, rounded, factor))

    def product() -> Any:
        if build.mode is Mode.W8A16:
            return _dot(build, x[...], w[...].astype(x.dtype), jnp.float32)
        size = build.tile.inputs
        here = rest[0][:, pl.ds(pl.multiple_of(part * size, size), size)]
        return _dot(build, here, w[...], jnp.int32)

    def finish(total: Any) -> None:
        y = total.astype(jnp.float32)
        if build.mode is Mode.W8A8:
            y = y * rest[1][:, :1]
        y = y * scales[...]
        if bias is not None:
            y = y + bias[...]
        out[...] = activated(y, build.activation).astype(out.dtype)

    if build.parts == 1:
        finish(product())
        return

    @pl.when(part == 0)
    def _():
        sums[...] = jnp.zeros_like(sums)

    sums[...] += product()
    pl.when(part == build.parts - 1)(lambda: finish(sums[...]))


def _begins() -> Any:
    """Returns whether a core meets these rows for the first time."""
    return (pl.program_id(2) == 0) & (pl.program_id(3) == 0)


def _round(x: Any, rounded: Any, factor: Any) -> None:
    """Rounds all of some rows to int8, each by its own largest element, by single rows of lanes."""

    def at(turn: Any) -> Any:
        return slice(None), pl.ds(pl.multiple_of(turn * LANES, LANES), LANES)

    def widest(turn: Any, so_far: Any) -> Any:
        return jnp.maximum(so_far, jnp.abs(x[at(turn)].astype(jnp.float32)))

    turns = x.shape[1] // LANES
    largest = lax.fori_loop(0, turns, widest, jnp.zeros((x.shape[0], LANES), jnp.float32))
    largest = jnp.max(largest, axis=1, keepdims=True)
    some = largest > 0
    inverse = jnp.where(some, LIMIT / jnp.where(some, largest, 1.0), 0.0)
    factor[...] = jnp.broadcast_to(largest * (1.0 / LIMIT), factor.shape)

    def one(turn: Any, none: None) -> None:
        whole = jnp.round(x[at(turn)].astype(jnp.float32) * inverse)
        rounded[at(turn)] = whole.astype(jnp.int32).astype(jnp.int8)

    lax.fori_loop(0, turns, one, None)


def _dot(build: _Build, x: Any, w: Any, sums: Any) -> Any:
    exact = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    contracted = 1 if build.out_first else 0
    return lax.dot_general(
        x, w, (((1,), (contracted,)), ((), ())), precision=exact, preferred_element_type=sums
    )
