"""What a step sends, as a function of its tokens.

    traffic = Traffic.of(config, phase, sizes)
    [(flow.kind, flow.axes, flow.bytes(tokens=64, rows=64)) for flow in traffic.flows]

`cost.step_collectives` is asked twice, with twice the tokens and three times the rows: what it
then answers says of each collective whether it grows with the tokens, with the rows whose logits
are wanted, or with neither, as gathered weights do. So a search derives every layout once, for all
batches. No JAX.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from jaxserve.config import ModelConfig, dtype_bytes
from jaxserve.partitioning.cost import Pass, Where, step_collectives
from jaxserve.partitioning.layout import PhaseLayout, Stage


@dataclass(frozen=True)
class Flow:
    """Collectives of a step that are alike.

    Attributes:
        kind, axes, dtype, where: see `cost.Collective`.
        per_token, per_row: bytes of full tensors that grow with the step.
        weights: elements of gathered weights.
        count: collectives.
    """

    kind: str
    axes: tuple[str, ...]
    dtype: str
    where: Where
    per_token: float
    per_row: float
    weights: float
    count: int

    def times(self, turns: int) -> Flow:
        """Returns them of so many turns; what is at the ends is there once."""
        if self.where is Where.ENDS or turns == 1:
            return self
        per_token, per_row = self.per_token * turns, self.per_row * turns
        weights, count = self.weights * turns, self.count * turns
        return Flow(
            self.kind, self.axes, self.dtype, self.where, per_token, per_row, weights, count
        )

    @property
    def gathers_weights(self) -> bool:
        """Returns whether it does not depend on activations, so that it can run ahead of them."""
        return self.weights > 0


@dataclass(frozen=True)
class Traffic:
    """All collectives of a step."""

    flows: tuple[Flow, ...]

    @classmethod
    def of(cls, config: ModelConfig, phase: PhaseLayout, sizes: Mapping[str, int]) -> Traffic:
        """Returns what a step sends.

        Args:
            config: its sizes divide over the mesh; see `cost.padded`.
        """
        pattern = config.pattern
        turns = config.num_layers // len(pattern)
        flows = _of_turn(replace(config, layers=pattern), phase, tuple(sizes.items()))
        return cls(tuple(flow.times(turns) for flow in flows))


@lru_cache(maxsize=4096)
def _of_turn(
    once: ModelConfig, phase: PhaseLayout, mesh: tuple[tuple[str, int], ...]
) -> tuple[Flow, ...]:
    """Returns what is sent where the pattern of layers is not repeated.

    Stages of a pipeline differ in their number of layers alone.
    """
    sizes = dict(mesh)
    base = 64 * math.prod(sizes.values())
    # Gathered weights are counted in bfloat16 here, and in their own dtype by `Flow`.
    dtype = "bfloat16"
    first, second = (
        step_collectives(once, phase, dict(sizes), Pass(base * t, base * r, dtype, Stage.SAMPLED))
        for t, r in ((1, 1), (2, 3))
    )
    sums: dict[tuple[str, tuple[str, ...], str, Where, int], list[float]] = {}
    for one, other in zip(first, second, strict=True):
        growth = other.bytes // one.bytes if one.bytes else 1
        assert other.bytes == growth * one.bytes and growth in (1, 2, 3)
        key = str(one.kind), one.axes, one.dtype, one.where, growth
        total = sums.setdefault(key, [0.0, 0])
        total[0] += one.bytes
        total[1] += 1
    found = []
    for (kind, axes, name, where, growth), (size, count) in sums.items():
        found.append(
            Flow(
                kind,
                axes,
                name,
                where,
                size / base if growth == 2 else 0.0,
                size / base if growth == 3 else 0.0,
                size / dtype_bytes(dtype) if growth == 1 else 0.0,
                int(count),
            )
        )
    return tuple(found)
