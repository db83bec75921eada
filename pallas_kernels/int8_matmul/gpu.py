"""Int8 and fp8 matmul on Hopper: copies run ahead of wgmma, the weight is read once as it is.

A block of threads has groups that multiply and one that copies. Steps of the contraction go round
in shared memory: the copying group waits until a slot is free, the others until it is full.

The weight lies [outputs, inputs], as wgmma wants operands of one byte. With few rows it is the
left operand, whose 64 rows it fills, and the activations are the right one, 8 rows at least; the
result is then turned by XLA. In w8a16 the weight becomes the activations' type in registers. In
w8a8 rows are rounded by XLA, which does it where the rows are computed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu
from jax.typing import DTypeLike

from jaxserve.config import Activation
from jaxserve.errors import UnsupportedError
from jaxserve.pallas_kernels.hopper import on_platform, swizzled
from jaxserve.pallas_kernels.int8_matmul import Mode, activated
from jaxserve.pallas_kernels.int8_matmul.gpu_tiles import SUM_BYTES, Tile, swapped, tile_for
from jaxserve.pallas_kernels.int8_matmul.reference import LIMIT, scaled_rows

plgpu: Any = mosaic_gpu  # whose types do not know its own references

FP8_LIMIT = 448.0
"""Greatest magnitude of a rounded activation where weights are e4m3."""


@dataclass(frozen=True)
class _Build:
    """What a kernel is compiled for.

    Attributes:
        weight_left: the weight is the left operand.
        whole: the epilogue is the kernel's; else sums are put together outside.
        steps: of the contraction, for all its shares.
        copies: rows of the product for one row of activations.
    """

    mode: Mode
    tile: Tile
    weight_left: bool
    dtype: str
    activation: Activation | None
    whole: bool
    steps: int
    copies: int


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
        w: int8, or float8_e4m3fn, whose rows of activations are rounded to the same in w8a8. One
            that lies [inputs, outputs], or whose sides fill no block, is copied in every call.
        tile: sizes of the kernel's blocks; None takes those that `gpu_tiles` knows.
        interpret: False compiles, `InterpretGPUParams` interpret; None compiles on CUDA.

    Raises:
        UnsupportedError: the weight is of another type.
    """
    if w.dtype not in (jnp.int8, jnp.float8_e4m3fn):
        raise UnsupportedError(f"a weight of {w.dtype} is not supported; use int8 or float8_e4m3fn")
    tokens, size = x.shape[0], math.prod(x.shape[x.ndim - num_inputs :])
    flat_w = w.reshape(-1, size) if orientation == "out_in" else w.reshape(size, -1).T
    rows, factor, copies = _rows(x.reshape(tokens, size), flat_w.dtype, mode)
    # Mosaic GPU has no erf.
    finished = copies == 1 and activation is not Activation.GELU
    if tile is None:
        result_bytes = jnp.dtype(dtype).itemsize if finished else SUM_BYTES
        tile = tile_for(rows.shape[0], size, scales.size, mode, result_bytes)
    build = _Build(
        mode, tile, swapped(rows.shape[0], mode), jnp.dtype(dtype).name, activation,
        whole=finished and tile.splits == 1,
        steps=-(-size // tile.inputs),
        copies=copies,
    )  # fmt: skip
    row = [scales.astype(jnp.float32).reshape(-1)]
    if bias is not None:
        row.append(bias.astype(jnp.float32).reshape(-1))
    y = on_platform(partial(_multiply, build), interpret, rows, flat_w, factor, *row)
    return y.reshape(tokens, *scales.shape)


def _rows(x: Array, weights: Any, mode: Mode) -> tuple[Array, Array, int]:
    """Returns (what meets the weight for x[T, K], float32[T] factors of it, its rows a token)."""
    if mode is Mode.W8A16:
        ones = jnp.ones(x.shape[0], jnp.float32)
        if x.dtype != jnp.float32:
            return x, ones, 1
        # Three bfloat16 hold the 24 bits of a float32.
        parts, rest = [], x
        for _ in range(3):
            # Not a pair of casts, which XLA may drop.
            parts.append(lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7))
            rest = rest - parts[-1]
        return jnp.concatenate(parts).astype(jnp.bfloat16), ones, 3
    rows, factor = scaled_rows(x.astype(jnp.float32), 1)
    if weights == jnp.int8:
        return jnp.round(rows).astype(jnp.int8), factor, 1
    ratio = FP8_LIMIT / LIMIT
    return (rows * ratio).astype(weights), factor * (1 / ratio), 1


@partial(jax.jit, static_argnums=(0, 1))
def _multiply(
    build: _Build, interpret: Any, x: Array, w: Array, factor: Array, *row: Array
) -> Array:
    """Returns [T, N] for rows x[R, K] and w[N, K]; `row` is the scales and the bias, if any."""
    tile, (channels, _), rows = build.tile, w.shape, x.shape[0]
    of_left = tile.left * tile.groups
    of_w, of_x = (of_left, tile.right) if build.weight_left else (tile.right, of_left)
    depth = build.steps * tile.inputs
    x, w = _padded(x, of_x, depth), _padded(w, of_w, depth)
    given = [jnp.pad(factor, (0, x.shape[0] - factor.shape[0]))] if build.whole else []
    given += [jnp.pad(r, (0, w.shape[0] - channels)) for r in row] if build.whole else []
    left, right = (w, x) if build.weight_left else (x, w)
    y = _call(build, interpret, left, right, *given)
    if not build.whole:
        y = jnp.sum(y, axis=0, dtype=y.dtype)
    y = (y.T if build.weight_left else y)[:rows, :channels]
    if build.whole:
        return y
    # The first part holds the most: smallest first, so that none of their bits is lost.
    y = y.reshape(build.copies, -1, channels).astype(jnp.float32)[::-1].sum(axis=0)
    return _finished(build, y, factor[:, None], [r[None] for r in row])


def _padded(x: Array, rows: int, columns: int) -> Array:
    """Returns x in whole blocks of rows, with zeros up to a number of columns."""
    return jnp.pad(x, ((0, -x.shape[0] % rows), (0, columns - x.shape[1])))


def _finished(build: _Build, y: Any, factor: Any, row: Sequence[Any]) -> Any:
    """Returns the epilogue of float32 sums."""
    if build.mode is Mode.W8A8:
        y = y * factor
    y = y * row[0]
    if len(row) > 1:
        y = y + row[1]
    return activated(y, build.activation).astype(build.dtype)


def _call(build: _Build, interpret: Any, left: Array, right: Array, *row: Array) -> Array:
    """Returns what one kernel gives: the result, or the sums of each share."""
    tile = build.tile
    across = tile.left * tile.groups
    sums = jnp.int32 if left.dtype == right.dtype == jnp.int8 else jnp.float32
    out = jax.ShapeDtypeStruct(
        (left.shape[0], right.shape[0]) if build.whole
        else (tile.splits, left.shape[0], right.shape[0]),
        build.dtype if build.whole else sums,
    )  # fmt: skip

    def slots(rows: int, dtype: Any) -> Any:
        shape = tile.stages, rows, tile.inputs
        return plgpu.SMEM(shape, dtype, transforms=swizzled(tile.inputs, dtype))

    shape = tile.groups, tile.left, tile.right
    scratch = [
        slots(across, left.dtype),
        slots(tile.right, right.dtype),
        plgpu.SMEM(shape, out.dtype, transforms=swizzled(tile.right, out.dtype)),
        plgpu.Barrier(num_arrivals=2, num_barriers=tile.stages),
        plgpu.Barrier(num_arrivals=tile.groups, num_barriers=tile.stages),
    ]
    if interpret and left.dtype != right.dtype:
        # The interpreter has no wgmma whose left operand lies in registers.
        shape = tile.groups, tile.left, tile.inputs
        scratch.append(
            plgpu.SMEM(shape, right.dtype, transforms=swizzled(tile.inputs, right.dtype))
        )
    return plgpu.kernel(
        partial(_kernel, build, len(row), sums),
        out_type=out,
        grid=(left.shape[0] // across, right.shape[0] // tile.right, tile.splits),
        grid_names=("left", "right", "share"),
        num_threads=tile.groups + 1,
        thread_name="group",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=False),
        interpret=interpret or None,
    )(left, right, *row)


def _kernel(build: _Build, rows: int, sums: Any, left: Any, right: Any, *refs: Any) -> None:
    row, (out, lefts, rights, outs, full, free, *staged) = refs[:rows], refs[rows:]
    tile, group = build.tile, lax.axis_index("group")
    across = tile.left * tile.groups
    at = lax.axis_index("left") * across, lax.axis_index("right") * tile.right
    first, steps, unfreed = _share(build)

    @pl.when(group == tile.groups)
    def _copy() -> None:
        _registers(tile, 40)

        def step(i: Any, none: None) -> None:
            slot = lax.rem(i, tile.stages)

            @pl.when(i >= tile.stages)
            def _() -> None:
                plgpu.barrier_wait(free.at[slot])

            inputs = pl.ds((first + i) * tile.inputs, tile.inputs)
            for source, start, size, slots in (
                (left, at[0], across, lefts),
                (right, at[1], tile.right, rights),
            ):
                here = source.at[pl.ds(start, size), inputs]
                plgpu.copy_gmem_to_smem(here, slots.at[slot], full.at[slot])

        def drain(i: Any, none: None) -> None:
            plgpu.barrier_wait(free.at[lax.rem(i, tile.stages)])

        lax.fori_loop(0, steps, step, None)
        lax.fori_loop(unfreed, steps, drain, None)

    @pl.when(group < tile.groups)
    def _multiply() -> None:
        _registers(tile, 232)
        mine = pl.ds(group * tile.left, tile.left)

        def product(acc: Any) -> Any:
            def step(i: Any, none: None) -> None:
                slot = lax.rem(i, tile.stages)
                plgpu.barrier_wait(full.at[slot])
                a, b = lefts.at[slot, mine], rights.at[slot].transpose((1, 0))
                if left.dtype != right.dtype:
                    plgpu.wgmma(acc, _widened(a, right.dtype, staged, group), b)
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(free.at[slot])
                    return
                plgpu.wgmma(acc, a, b)
                plgpu.wgmma_wait(1)  # the step before this one has been read

                @pl.when(i > 0)
                def _() -> None:
                    plgpu.barrier_arrive(free.at[lax.rem(i - 1, tile.stages)])

            lax.fori_loop(0, steps, step, None)
            y = acc[...]
            if left.dtype == right.dtype:
                plgpu.barrier_arrive(free.at[_slot(steps - 1, tile)])
            return y

        y = pl.run_scoped(product, plgpu.ACC((tile.left, tile.right), sums))
        there = pl.ds(at[0] + group * tile.left, tile.left), pl.ds(at[1], tile.right)
        if build.whole:
            y = _epilogue(build, y, row, there)
        target = out.at[there] if build.whole else out.at[(lax.axis_index("share"), *there)]
        outs[group] = y
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(outs.at[group], target)
        plgpu.wait_smem_to_gmem(0)


def _slot(step: Any, tile: Tile) -> Any:
    return step % tile.stages if isinstance(step, int) else lax.rem(step, tile.stages)


def _share(build: _Build) -> tuple[Any, Any, Any]:
    """Returns the first step of this block's share, their number, and how many slots come back.

    Shares differ by one step at most: no weight is padded to be a multiple of its shares.
    """
    splits, stages = build.tile.splits, build.tile.stages
    if splits == 1:
        return 0, build.steps, max(build.steps - stages, 0)
    share = lax.axis_index("share")
    first = lax.div(share * build.steps, splits)
    steps = lax.div((share + 1) * build.steps, splits) - first
    return first, steps, lax.max(steps - stages, 0)


def _registers(tile: Tile, n: int) -> None:
    """Gives a group of threads its share of registers, where sums take many.

    Where they take few, two blocks of threads fit on a multiprocessor without it, and copy at once.
    """
    if tile.left * tile.right >= 64 * 128:
        plgpu.set_max_registers(n, action="decrease" if n < 128 else "increase")


def _widened(part: Any, dtype: Any, staged: Sequence[Any], group: Any) -> Any:
    """Returns the left operand in the right one's type: in registers, or staged."""
    a = part[...]
    if a.dtype == jnp.float8_e4m3fn:
        a = a.astype(jnp.float32)  # which is how Hopper converts it
    a = a.astype(dtype)
    if not staged:
        return a
    staged[0][group] = a
    plgpu.commit_smem()
    return staged[0].at[group]


def _epilogue(build: _Build, y: Any, row: Sequence[Any], there: tuple[Any, Any]) -> Any:
    """Returns the result for sums [left, right] at a place."""

    def along(ref: Any, side: int) -> Any:
        layout = plgpu.Layout.WGMMA.reduce(1 - side)
        x = plgpu.load(ref.at[there[side]], layout=layout, optimized=False)
        return lax.broadcast_in_dim(x, y.shape, [side])

    channels = 0 if build.weight_left else 1
    factor, *rest = row
    # Rows of w8a16 have no factors.
    factor = along(factor, 1 - channels) if build.mode is Mode.W8A8 else 1.0
    return _finished(build, y.astype(jnp.float32), factor, [along(r, channels) for r in rest])
