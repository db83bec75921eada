"""Dense weights on GPU: XLA's own dot, which calls the maker's library.

Weights of int8 have a kernel of their own, `int8_matmul`.
"""

from __future__ import annotations

from jaxserve.pallas_kernels.matmul.xla import matmul

__all__ = ["matmul"]
