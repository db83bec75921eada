"""Muon for the matrices of the blocks, AdamW for embeddings and norms."""

from __future__ import annotations

from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from jaxserve.layers.decoder import Model
from jaxserve.training.schedule import Plan

MATRIX_RATE = 0.02
VECTOR_RATE = 0.004
WEIGHT_DECAY = 0.05
"""Of the matrices only; per step it removes rate * decay of a weight."""


def optimizer(model: Model, plan: Plan) -> optax.GradientTransformation:
    """Returns the update rule, gradients clipped to a global norm of one.

    Source: Jordan et al. 2024 (Muon); momentum 0.95, five Newton-Schulz iterations.
    """
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        muon(
            plan.rate(MATRIX_RATE),
            weight_decay=WEIGHT_DECAY,
            adam_b2=0.95,
            adam_learning_rate=plan.rate(VECTOR_RATE),
            muon_weight_dimension_numbers=_matrices(model),
        ),
    )


def _matrices(model: Model) -> Any:
    """Returns a tree with the sides of each block matrix, None for what Muon leaves alone.

    Every matrix of a block has "embed" on one side, and is stored outputs first.
    """

    def sides(axes: tuple[str, ...]) -> MuonDimensionNumbers | None:
        if len(axes) < 2 or "vocab" in axes:
            return None
        rest = tuple(index for index, name in enumerate(axes) if name != "embed")
        embed = (axes.index("embed"),)
        reads_embed = axes[0] != "embed"
        return MuonDimensionNumbers(
            reduction_axis=embed if reads_embed else rest,
            output_axis=rest if reads_embed else embed,
        )

    def is_axes(node: Any) -> bool:
        return isinstance(node, tuple)

    return jax.tree.map(sides, model.param_axes(), is_leaf=is_axes)
