"""Whole sequences on GPU: XLA's own program, which can be differentiated.

A prompt that is served goes through `paged_attention`.
"""

from __future__ import annotations

from jaxserve.pallas_kernels.attention.xla import attention

__all__ = ["attention"]
