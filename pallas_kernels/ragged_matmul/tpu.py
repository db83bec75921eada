"""Groups of rows on TPU: XLA's own ragged dot for dense weights, a kernel for those of int8.

The kernel goes over visits: a block of rows and a group that has some of them. Rows are sorted by
group, so a block's visits follow each other and it is written once; a group's weight is read for
each block that it has rows in, as int8, and never if it has none. Rows of other groups are
computed beside and not kept.

    rows, sorted    blocks      visits (block, group)
    0 0 0 1         [0 0 0 1]   (0, 0) (0, 1)
    1 1 1 1         [1 1 1 1]   (1, 1)
    1 3 3           [1 3 3 .]   (2, 1) (2, 3)

In w8a16 a part of the weight becomes the activations' type next to the matrix unit; in w8a8 the
rows are rounded before, and sums are exact, in int32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from jaxserve.pallas_kernels.int8_matmul import Mode
from jaxserve.pallas_kernels.int8_matmul.reference import scaled_rows
from jaxserve.pallas_kernels.int8_matmul.tiles import Tile
from jaxserve.pallas_kernels.ragged_matmul import xla

LANES = 128


class _Visits(NamedTuple):
    """What the kernel does in turn, int32[V] each but for `number`, which has one number.

    Attributes:
        block: of rows.
        group: whose weight they meet.
        low, high: rows of the block that are the group's.
        number: visits that there are; those after it repeat the last one and do nothing.
    """

    block: Array
    group: Array
    low: Array
    high: Array
    number: Array


@dataclass(frozen=True)
class _Build:
    """What a kernel is compiled for."""

    tile: Tile
    parts: int
    rounded: bool
    dtype: str
    interpret: Any


def ragged_matmul(
    x: Array,
    w: Array,
    sizes: Array,
    dtype: DTypeLike,
    *,
    scales: Array | None = None,
    mode: Mode = Mode.W8A16,
    tile: Tile | None = None,
    interpret: Any = None,
) -> Array:
    """Returns [M, N] in `dtype`; see `reference.ragged_matmul`.

    Args:
        tile: sizes of the blocks; None takes those of `tile_for`.
        interpret: False compiles, True or `InterpretParams` interpret; None compiles on TPU.
    """
    if scales is None:
        return xla.ragged_matmul(x, w, sizes, dtype)
    groups, channels, inputs = w.shape
    tile = (tile or tile_for(x.shape[0], groups)).within(x.shape[0], inputs, channels)
    parts, rounded = -(-inputs // tile.inputs), mode is Mode.W8A8
    factor = None
    if rounded:
        x, factor = scaled_rows(x.astype(jnp.float32), 1)
        x, factor = jnp.round(x).astype(jnp.int8), factor[:, None]
    # Past the end of the contraction a weight's block holds any numbers, and x has zeros there.
    x = jnp.pad(x, ((0, 0), (0, parts * tile.inputs - inputs)))
    build = _Build(tile, parts, rounded, jnp.dtype(dtype).name, interpret)
    given = x, w, scales.astype(jnp.float32)[:, None], factor, _visits(sizes, x.shape[0], tile.rows)
    if interpret is not None:
        y = _multiply(build, *given)
    else:
        y = lax.platform_dependent(
            *given,
            tpu=partial(_multiply, replace(build, interpret=False)),
            default=partial(_multiply, replace(build, interpret=True)),
        )
    grouped = jnp.arange(x.shape[0], dtype=jnp.int32) < jnp.sum(sizes)
    return jnp.where(grouped[:, None], y, jnp.zeros_like(y))


def tile_for(rows: int, groups: int) -> Tile:
    """Returns sizes of blocks: twice the rows where groups are long enough to fill them."""
    return Tile(256 if rows >= 256 * groups else 128, 1024, 1024)


def _visits(sizes: Array, num_rows: int, block: int) -> _Visits:
    """Returns the visits of groups to blocks of rows, in order."""
    groups, blocks = sizes.shape[0], -(-num_rows // block)
    ends = jnp.cumsum(sizes)
    starts = ends - sizes
    first = lax.div(starts, block)
    each = jnp.where(sizes > 0, lax.div(ends - 1, block) - first + 1, 0)
    last = jnp.cumsum(each)
    # Every block begins with one visit, and every group after the first may add one.
    number = jnp.arange(blocks + groups - 1, dtype=jnp.int32)
    number = jnp.minimum(number, jnp.maximum(last[-1] - 1, 0))
    group = jnp.sum(last[None, :] <= number[:, None], axis=1, dtype=jnp.int32)
    group = jnp.minimum(group, groups - 1)
    at = jnp.clip(first[group] + number - (last - each)[group], 0, blocks - 1)
    low, high = (jnp.clip(x[group] - at * block, 0, block) for x in (starts, ends))
    return _Visits(at, group, low, high, last[-1:].astype(jnp.int32))


@partial(jax.jit, static_argnums=0)
def _multiply(
    build: _Build, x: Array, w: Array, scales: Array, factor: Array | None, visits: _Visits
) -> Array:
    """Returns [M, N] for x[M, parts * inputs], w[E, N, K] and scales[E, 1, N]."""
    tile, parts = build.tile, build.parts
    channels = w.shape[1]

    def part(v: Any, k: Any, count: Any) -> Any:
        # A visit that there is not asks for what is there already.
        return jnp.where(v < count[0], k, parts - 1)

    per_row = pl.BlockSpec((tile.rows, 1), lambda n, v, k, block, *_: (block[v], 0))
    specs = [
        pl.BlockSpec(
            (tile.rows, tile.inputs),
            lambda n, v, k, block, group, low, high, count: (block[v], part(v, k, count)),
        ),
        pl.BlockSpec(
            (None, tile.channels, tile.inputs),
            lambda n, v, k, block, group, low, high, count: (group[v], n, part(v, k, count)),
        ),
        pl.BlockSpec((None, 1, tile.channels), lambda n, v, k, block, group, *_: (group[v], 0, n)),
    ]
    sums = jnp.int32 if build.rounded else jnp.float32
    return pl.pallas_call(
        partial(_kernel, build),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], channels), build.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(visits),
            grid=(-(-channels // tile.channels), visits.block.shape[0], parts),
            in_specs=[*specs, per_row] if build.rounded else specs,
            out_specs=pl.BlockSpec(
                (tile.rows, tile.channels), lambda n, v, k, block, *_: (block[v], n)
            ),
            scratch_shapes=[pltpu.VMEM((tile.rows, tile.channels), sums)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
        ),
        interpret=build.interpret,
        name=f"ragged_matmul_{'w8a8' if build.rounded else 'w8a16'}",
    )(*visits, x, w, scales, *([factor] if build.rounded else []))


def _kernel(
    build: _Build, block: Any, group: Any, low: Any, high: Any, count: Any, *refs: Any
) -> None:
    x, w, scales, *factor, out, sums = refs
    visit, part = pl.program_id(1), pl.program_id(2)
    real = visit < count[0]

    @pl.when(part == 0)
    def _():
        sums[...] = jnp.zeros_like(sums)

    @pl.when(real)
    def _():
        own = w[...] if build.rounded else w[...].astype(x.dtype)
        exact = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
        sums[...] += lax.dot_general(
            x[...], own, (((1,), (1,)), ((), ())), precision=exact,
            preferred_element_type=sums.dtype,
        )  # fmt: skip

    @pl.when(real & (part == build.parts - 1))
    def _():
        y = sums[...].astype(jnp.float32)
        if build.rounded:
            y = y * factor[0][...]
        y = y * scales[...]
        row = lax.broadcasted_iota(jnp.int32, y.shape, 0)
        mine = (row >= low[visit]) & (row < high[visit])
        before = jnp.where(low[visit] > 0, out[...].astype(jnp.float32), 0.0)
        out[...] = jnp.where(mine, y, before).astype(out.dtype)
