"""What every layer of one forward shares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxserve.config import AttentionSpec, RopeSpec
from jaxserve.layers.rope import rotation
from jaxserve.layers.step import Step
from jaxserve.layers.tap import Taps
from jaxserve.pallas_kernels import KernelSet
from jaxserve.partitioning.collectives import Comm
from jaxserve.partitioning.layout import Stage


@dataclass(frozen=True)
class Runtime:
    """Collectives, kernels, taps and per-step facts that the layers are given.

    Attributes:
        step: tokens whose attention is computed here.
        valid: bool[T], which tokens that the first projections see are not padding.
        routing: see `moe.Routing`, of the block under way where it has experts.
        rotations: rotary table of the step's positions; and, with the size of a streaming cache,
            that of the positions inside it.
    """

    comm: Comm
    kernels: KernelSet
    tap: Taps
    step: Step
    valid: Array
    routing: Any = None
    rotations: Mapping[tuple[RopeSpec, int | None], tuple[Array, Array]] = field(
        default_factory=dict
    )

    @classmethod
    def begin(
        cls,
        step: Step,
        attentions: set[AttentionSpec],
        comm: Comm,
        kernels: KernelSet,
        tap: Taps,
    ) -> Runtime:
        """Returns the runtime of one step; every rotary table is computed once for all layers."""
        valid = comm.tokens(step.valid, Stage.INPUT)
        # Attention sees the tokens of its own sequences.
        step = jax.tree.map(lambda x: comm.tokens(x, Stage.QUERY), step)
        tables: dict[tuple[RopeSpec, int | None], tuple[Array, Array]] = {}
        for spec in attentions:
            if spec.rope is None:
                continue
            tables[spec.rope, None] = rotation(spec.rope, step.positions, step.lengths)
            if (size := spec.cached_tokens) is not None:
                inside = jnp.minimum(step.positions, size - 1)
                tables[spec.rope, size] = rotation(spec.rope, inside, step.lengths)
        return cls(comm, kernels, tap, step, valid, rotations=tables)
