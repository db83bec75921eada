"""Contraction of activations with a weight of int8, one scale an output channel.

    mode = choose(Mode.W8A8, "v4").mode                      # W8A16: that chip has no s8 x s8
    y = kernels.int8_matmul(x, w, scales, 1, "out_in", "bfloat16", mode=mode)

`reference` defines the operation and both modes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

import jax
from jax import Array, lax

from jaxserve.config import Activation


class Mode(StrEnum):
    """How activations meet the weight."""

    W8A16 = "w8a16"
    """As they are; the weight becomes their type in the core."""
    W8A8 = "w8a8"
    """Rounded to int8, one scale a row, found in the kernel; sums are exact, in int32."""


@dataclass(frozen=True)
class Choice:
    """The mode that a chip runs, and why where it is not the one asked for."""

    mode: Mode
    reason: str | None = None


def choose(wanted: Mode, chip: str) -> Choice:
    """Returns the mode that runs on a chip, named as in "v4" or "v5e"."""
    if wanted is Mode.W8A8 and chip == "v4":
        return Choice(Mode.W8A16, "TPU v4 multiplies no int8 by int8; w8a16 runs instead of w8a8")
    return Choice(wanted)


def activated(y: Array, kind: Activation | None) -> Array:
    """Returns the non-linearity of y in its own type, or y."""
    match kind:
        case None:
            return y
        case Activation.SILU:
            return jax.nn.silu(y)
        case Activation.GELU:
            # Written out: the TPU kernel has erf and not the erfc of jax.nn.gelu.
            return 0.5 * y * (1.0 + lax.erf(y * math.sqrt(0.5)))
        case Activation.GELU_TANH:
            return jax.nn.gelu(y, approximate=True)
        case Activation.RELU:
            return jax.nn.relu(y)
