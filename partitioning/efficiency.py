"""How much of their peak chips reach: four constants, fitted once to published measurements.

    Efficiency.read()              # of efficiency.toml, see `jaxserve.planner.fit`

No JAX.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np

BOUNDS = {
    "matmul": (0.7, 0.95),
    "hbm": (0.7, 0.9),
    "overlap": (0.0, 1.0),
    "layer_s": (0.0, 200e-6),
}
"""Between which the constants are sought. Google's TPU recipes measure 90% of the peak for large
products, and 83% to 87% of the bandwidth for copies."""

GATHERED_AHEAD = 0.82
"""Share of gathered weights that a program fetches while it multiplies: that which libtpu's
compiler makes asynchronous on v4 (measured on the compiled program, not on a chip)."""

HOST_S = 40e-6
"""Seconds between two steps while the host plans ahead (assumed; sglang-jax reports 38 us)."""


@dataclass(frozen=True)
class Efficiency:
    """Constants of the model of time.

    Attributes:
        matmul: share of the matrix unit's peak.
        hbm: share of the memory's bandwidth.
        overlap: share of the shorter of computing and reading memory that runs beside the longer.
        layer_s: fixed seconds of a layer.
    """

    matmul: float = 0.85
    hbm: float = 0.85
    overlap: float = 0.5
    layer_s: float = 50e-6

    @staticmethod
    @cache
    def read() -> Efficiency:
        """Returns the fitted constants."""
        return Efficiency(**{name: float(fitted()[name]) for name in BOUNDS})

    def hidden(self, compute: Any, memory: Any, gathers: Any) -> Any:
        """Returns the seconds that run beside others.

        Args:
            compute, memory: seconds of products, and of reads and writes of memory.
            gathers: seconds of gathering weights, which wait for no activation.
        """
        beside = self.overlap * np.minimum(compute, memory)
        return beside + GATHERED_AHEAD * np.minimum(gathers, np.maximum(compute, memory))


@cache
def fitted() -> dict[str, Any]:
    """Returns what the fit left: the constants, and its errors."""
    text = files("jaxserve").joinpath("partitioning", "efficiency.toml")
    return tomllib.loads(text.read_text(encoding="utf-8"))
