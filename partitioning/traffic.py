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
        turns = config.num_layers // len(config.pattern)
        once = replace(config, layers=config.pattern)
        base = 64 * math.prod(sizes.values())
        # Gathered weights are counted in bfloat16 here, and in their own dtype by `Flow`.
        dtype = "bfloat16"
        first, second = (
            step_collectives(
                once, phase, dict(sizes), Pass(base * t, base * r, dtype, Stage.SAMPLED)
            )
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
            times = 1 if where is Where.ENDS else turns
            found.append(
                Flow(
                    kind,
                    axes,
                    name,
                    where,
                    size * times / base if growth == 2 else 0.0,
                    size * times / base if growth == 3 else 0.0,
                    size * times / dtype_bytes(dtype) if growth == 1 else 0.0,
                    int(count) * times,
                )
            )
        return cls(tuple(found))
