"""Groups of rows on GPU: XLA's own ragged dot."""

from __future__ import annotations

from jaxserve.pallas_kernels.ragged_matmul.xla import ragged_matmul

__all__ = ["ragged_matmul"]
