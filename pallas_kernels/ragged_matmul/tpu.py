"""Groups of rows on TPU: XLA's own ragged dot, which the compiler turns into a kernel."""

from __future__ import annotations

from jaxserve.pallas_kernels.ragged_matmul.xla import ragged_matmul

__all__ = ["ragged_matmul"]
