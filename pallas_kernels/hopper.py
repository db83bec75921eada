"""What the kernels for Hopper share: who can run them, swizzles, and where they are interpreted.

They are written in Mosaic GPU, which multiplies with wgmma and copies with the tensor memory
accelerator. Off the GPU they are interpreted, thread by thread and barrier by barrier.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.errors import UnsupportedError

FIRST = (0, 11, 2)
"""First JAX whose Mosaic GPU has all that the kernels use, the interpreter included."""

CAPABILITY = "9.0"
"""Compute capability of Hopper: sm_90a's instructions exist on no other, newer or older."""

NUM_CORES = 132
"""Multiprocessors of an H100."""

SMEM_BYTES = 227 * 1024
"""Shared memory that one block of threads may have."""

ROWS = 64
"""Rows of one wgmma."""


def require() -> None:
    """Checks that this JAX has what the kernels are written in, and a GPU what they run on.

    Raises:
        UnsupportedError: JAX is too old, or its GPU is not a Hopper.
    """
    if jax.__version_info__ < FIRST:
        raise UnsupportedError(
            f"backend='gpu' needs jax >= {'.'.join(map(str, FIRST))} and this is {jax.__version__};"
            " use 'xla', or a newer jax"
        )
    if jax.default_backend() != "gpu":
        return  # interpreted, or compiled for one that is elsewhere
    for device in jax.local_devices():
        capability = str(device.compute_capability)
        if capability != CAPABILITY:
            raise UnsupportedError(
                f"backend='gpu' needs compute capability {CAPABILITY}, as an H100 has, and"
                f" {device.device_kind} has {capability}; use backend='xla'"
            )


def _mosaic() -> Any:
    """Returns Mosaic GPU, which is imported where a kernel is made and not before."""
    from jax.experimental.pallas import mosaic_gpu

    return mosaic_gpu


def swizzled(columns: int, dtype: Any) -> tuple[Any, ...]:
    """Returns the transforms of rows of `columns` in shared memory, as wgmma and copies have them.

    The widest swizzle that the rows are a multiple of: no bank is asked twice at a time.
    """
    plgpu = _mosaic()
    size = jnp.dtype(dtype).itemsize
    width = next(w for w in (128, 64, 32, 16) if columns * size % w == 0)
    if width == 16:
        return ()
    return plgpu.TilingTransform((8, width // size)), plgpu.SwizzleTransform(width)


def interpreter() -> Any:
    """Returns the parameters that interpret a kernel with its races reported."""
    return _mosaic().InterpretGPUParams(detect_races=True)


def on_platform(run: Callable[..., Any], interpret: Any, *given: Any) -> Any:
    """Returns `run(interpret, *given)`; where `interpret` is None, compiled for CUDA alone.

    Where JAX's own backend is a GPU, the interpreter is not even traced: its ordered effect would
    be every program's, which then takes a token and misses the fast way to call it.

    Args:
        run: takes False to compile, or the parameters of the interpreter.
    """
    if interpret is None and jax.default_backend() == "gpu":
        interpret = False
    if interpret is not None:
        return run(interpret, *given)

    def compiled(*given: Any) -> Any:
        return run(False, *given)

    def interpreted(*given: Any) -> Any:
        return run(_mosaic().InterpretGPUParams(), *given)

    return lax.platform_dependent(*given, cuda=compiled, default=interpreted)
