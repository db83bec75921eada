"""Several MLPs of which each token takes the few that a router scores highest.

    run = experts.route(x, run)                      # which token goes where
    parts = experts.project(x, run)                  # rows sorted by expert, then back in order
    y = experts.finish(*comm.distribute(parts), run=run)

No token is dropped, however many choose the same expert; padding goes to none. Between the
projections the features of a token's experts stand side by side, [T, ffn, taken], so that they
move over a mesh as those of one MLP do. Every device has all experts and a part of their features.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from jaxserve.config import ExpertsSpec, MlpSpec
from jaxserve.layers.activation import activate
from jaxserve.layers.linear import mode_for
from jaxserve.layers.param import Axis, Declare, Orientation, Weight
from jaxserve.layers.runtime import Runtime
from jaxserve.layers.sums import row_sum
from jaxserve.partitioning.collectives import Part
from jaxserve.partitioning.layout import Stage


@dataclass(frozen=True)
class Routing:
    """Where the tokens of a step go.

    Attributes:
        weights: float32[T, taken], of each expert that a token takes.
        order: int32[T * taken], rows of tokens sorted by expert, those of padding last.
        places: int32[T * taken], where each row stands in that order.
        load: int32[E], rows of each expert.
    """

    weights: Array
    order: Array
    places: Array
    load: Array

    @classmethod
    def of(cls, scores: Array, valid: Array, spec: ExpertsSpec) -> Routing:
        """Returns the routing by float32[T, E] scores of the tokens that are valid[T]."""
        best, chosen = lax.top_k(scores, spec.per_token)
        chances = jnp.exp(best - best[:, :1])
        if spec.renormalised:
            total = _sum(chances, spec.per_token)
        else:
            total = row_sum(jnp.exp(scores - best[:, :1]))
        rows = jnp.where(valid[:, None], chosen, spec.count).reshape(-1).astype(jnp.int32)
        order = jnp.argsort(rows, stable=True).astype(jnp.int32)
        experts = jnp.arange(spec.count, dtype=jnp.int32)
        load = jnp.sum(rows[:, None] == experts[None, :], axis=0, dtype=jnp.int32)
        return cls(chances / total[:, None], order, jnp.argsort(order).astype(jnp.int32), load)


class Experts(nnx.Module):
    """A router and its experts, in the place of an `Mlp`.

    Weights have their outputs first on every backend, expert by expert. Rounded ones have a scale
    for each output of each expert; the router is never rounded.
    """

    def __init__(self, spec: MlpSpec, embed: Axis, declare: Declare) -> None:
        assert spec.experts is not None
        self.spec, self.taken = spec, spec.experts.per_token
        declare = replace(declare, orientation=Orientation.OUT_IN)
        experts, ffn = Axis("experts", spec.experts.count), declare.ffn(spec.ffn_dim)
        # A few scores decide which weights are used at all: they stay as they are.
        self.router = replace(declare, quantize=None).weight((embed,), (experts,))
        self.gate = declare.weight((embed,), (experts, ffn)) if spec.gated else None
        self.up = declare.weight((embed,), (experts, ffn))
        self.down = declare.weight((ffn,), (experts, embed))

    def route(self, x: Array, run: Runtime) -> Runtime:
        """Returns the runtime with the routing of x[T, embed]."""
        assert self.spec.experts is not None
        with jax.named_scope("route"):
            scores = run.kernels.matmul(
                x, _whole(self.router, run), 1, Orientation.OUT_IN.value, jnp.dtype("float32")
            )
            # [T, E] {partial where the width is cut} -> [T, E]
            scores = run.comm.total(scores, Stage.INPUT)
            return replace(run, routing=Routing.of(scores, run.valid, self.spec.experts))

    def project(self, x: Array, run: Runtime) -> list[Part]:
        """Returns what x[T, embed] gives to the non-linearity: [T, ffn, taken], two where gated."""
        routing = _routing(run)
        rows = jnp.take(x, routing.order // self.taken, axis=0)
        weights = [self.up] if self.gate is None else [self.gate, self.up]
        return [
            Part(self._apart(self._grouped(rows, one, run), run), Stage.HIDDEN) for one in weights
        ]

    def finish(self, first: Array, *rest: Array, run: Runtime) -> Array:
        """Returns terms of the output [T, embed]."""
        routing = _routing(run)
        h = activate(first, self.spec.activation)
        if rest:
            h = h * rest[0]
        h = run.comm.move(h, Stage.HIDDEN, Stage.CONTRACTED)
        rows = jnp.swapaxes(h, 1, 2).reshape(-1, h.shape[1])
        rows = self._grouped(jnp.take(rows, routing.order, axis=0), self.down, run)
        y = self._apart(rows, run).astype(jnp.float32)
        weights = jnp.broadcast_to(routing.weights[:, None, :], y.shape)
        return _sum(y * weights, self.taken).astype(h.dtype)

    def _grouped(self, rows: Array, weight: Weight, run: Runtime) -> Array:
        """Returns rows sorted by expert, each times the weight of its own."""
        values, load, dtype = _whole(weight, run), _routing(run).load, rows.dtype
        if weight.scales is None:
            return run.kernels.ragged_matmul(rows, values, load, dtype)
        scales = run.comm.scales(weight.scales[...], [(a.name, a.size) for a in weight.outputs])
        mode = mode_for(weight.quantize)
        return run.kernels.ragged_matmul(rows, values, load, dtype, scales=scales, mode=mode)

    def _apart(self, rows: Array, run: Runtime) -> Array:
        """Returns [T, features, taken] of rows sorted by expert; those of padding are zeros."""
        y = jnp.take(rows, _routing(run).places, axis=0)
        return jnp.swapaxes(y.reshape(-1, self.taken, y.shape[1]), 1, 2)


def _whole(weight: Weight, run: Runtime) -> Array:
    return run.comm.weight(weight.values[...], [(a.name, a.size) for a in weight.stored])


def _routing(run: Runtime) -> Routing:
    assert run.routing is not None
    return run.routing


def _sum(x: Array, count: int) -> Array:
    """Returns the sum over the last dimension, in order: its bits depend on nothing else."""
    return reduce(jnp.add, (x[..., i] for i in range(count)))
