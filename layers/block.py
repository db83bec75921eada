"""One block of the decoder."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxserve.config import BlockKind, LayerSpec, NormPlace
from jaxserve.layers.attention import Attention
from jaxserve.layers.cache import AnyCache, At
from jaxserve.layers.linear import linear_group
from jaxserve.layers.mlp import Mlp
from jaxserve.layers.moe import Experts
from jaxserve.layers.norm import Norm
from jaxserve.layers.param import Axis, Declare, Weight
from jaxserve.layers.runtime import Runtime
from jaxserve.partitioning.collectives import Part
from jaxserve.partitioning.layout import Stage


class Block(nnx.Module):
    """Attention and MLP, in series or side by side, with their norms.

    Attributes:
        first: the first projections of both, where they share an input and a mesh cuts them alike;
            else None, and each part has its own.
    """

    def __init__(self, spec: LayerSpec, embed: Axis, declare: Declare) -> None:
        self.spec = spec
        self.attention_norm = Norm(spec.norm, embed, declare)
        joint = declare.joint(spec)
        self.attention = Attention(spec.attention, embed, declare, joint)
        self.mlp_norm = Norm(spec.norm, embed, declare) if spec.mlp_norm else None
        if spec.mlp.experts is None:
            self.mlp = Mlp(spec.mlp, embed, declare, joint)
        else:
            self.mlp = Experts(spec.mlp, embed, declare)
        first = None
        if joint:
            assert isinstance(self.mlp, Mlp)
            names = {f"attention.{name}": axes for name, axes in self.attention.first.items()}
            names |= {f"mlp.{name}": axes for name, axes in self.mlp.first.items()}
            first = declare.group((embed,), spec.mlp.bias, **names)
        self.first = first
        self.attention_post_norm = Norm(spec.norm, embed, declare) if spec.post_norms else None
        self.mlp_post_norm = Norm(spec.norm, embed, declare) if spec.post_norms else None

    def __call__(
        self, x: Array, layer: At, cache: AnyCache, run: Runtime
    ) -> tuple[Array, AnyCache]:
        """Returns (the residual stream [T, embed] after this block, the cache)."""
        if self.spec.block is BlockKind.PARALLEL:
            x, cache = self._side_by_side(x, layer, cache, run)
        else:
            x, cache = self._in_series(x, layer, cache, run)
        return run.tap(f"layers.{layer.index}.resid", x), cache

    def _side_by_side(
        self, x: Array, layer: At, cache: AnyCache, run: Runtime
    ) -> tuple[Array, AnyCache]:
        """Both parts read the same input: their activations share gathers and scatters."""
        comm = run.comm
        h = comm.move(x, Stage.RESIDUAL, Stage.INPUT)
        first = self.attention_norm(h, comm, Stage.INPUT)
        second = first if self.mlp_norm is None else self.mlp_norm(h, comm, Stage.INPUT)
        run = self._routed(second, layer, run)
        q, k, v, *hidden = comm.distribute(self._project(first, second, run))
        attended, cache = self.attention.finish(q, k, v, layer, cache, run)
        with jax.named_scope("mlp"):
            fed = self.mlp.finish(*hidden, run=run)
        out, down = self.attention.out, self.mlp.down
        if comm.whole:
            attended = run.tap(f"layers.{layer.index}.attention", self._biased(attended, out, run))
            return x + attended + run.tap(
                f"layers.{layer.index}.mlp", self._biased(fed, down, run)
            ), cache
        added = comm.move(attended + fed, Stage.PRODUCED, Stage.RESIDUAL)
        return x + self._biased(self._biased(added, out, run), down, run), cache

    def _project(self, first: Array, second: Array, run: Runtime) -> list[Part]:
        """Returns what the parts' inputs give to attention and to the non-linearity."""
        if self.first is None:
            return [*self.attention.project(first, run), *self.mlp.project(second, run)]
        with jax.named_scope("first"):
            q, k, v, *hidden = linear_group(first, self.first, run.comm, run.kernels)
        assert isinstance(self.mlp, Mlp)
        return [*self.attention.parts([q, k, v]), *self.mlp.parts(hidden)]

    def _in_series(
        self, x: Array, layer: At, cache: AnyCache, run: Runtime
    ) -> tuple[Array, AnyCache]:
        comm = run.comm
        h = self._input(x, self.attention_norm, run)
        q, k, v = comm.distribute(self.attention.project(h, run))
        attended, cache = self.attention.finish(q, k, v, layer, cache, run)
        attended = self._added(attended, self.attention.out, self.attention_post_norm, run)
        attended = run.tap(f"layers.{layer.index}.attention", attended)
        x = self._sum(x, attended, self.attention_norm, run)
        h = self._input(x, self.mlp_norm, run)
        with jax.named_scope("mlp"):
            run = self._routed(h, layer, run)
            fed = self.mlp.finish(*comm.distribute(self.mlp.project(h, run)), run=run)
        fed = self._added(fed, self.mlp.down, self.mlp_post_norm, run)
        fed = run.tap(f"layers.{layer.index}.mlp", fed)
        return self._sum(x, fed, self.mlp_norm, run), cache

    def _routed(self, x: Array, layer: At, run: Runtime) -> Runtime:
        """Returns the runtime with the routing to experts, where there are any, reported."""
        run = self.mlp.route(x, run)
        if run.routing is not None:
            run.tap.show(f"layers.{layer.index}.expert_load", run.routing.load)
        return run

    def _input(self, x: Array, norm: Norm | None, run: Runtime) -> Array:
        """Returns what a part reads of the residual stream."""
        h = run.comm.move(x, Stage.RESIDUAL, Stage.INPUT)
        if norm is None or self.spec.norm_place is NormPlace.SUM:
            return h
        return norm(h, run.comm, Stage.INPUT)

    def _sum(self, x: Array, added: Array, norm: Norm | None, run: Runtime) -> Array:
        """Returns the residual stream behind a part."""
        if norm is None or self.spec.norm_place is NormPlace.INPUT:
            return x + added
        return norm(x + added, run.comm, Stage.RESIDUAL)

    def _added(self, terms: Array, weight: Weight, norm: Norm | None, run: Runtime) -> Array:
        """Returns what a part adds to the residual stream."""
        y = self._biased(run.comm.move(terms, Stage.PRODUCED, Stage.RESIDUAL), weight, run)
        return y if norm is None else norm(y, run.comm, Stage.RESIDUAL)

    @staticmethod
    def _biased(y: Array, weight: Weight, run: Runtime) -> Array:
        if weight.bias is None:
            return y
        bias = run.comm.vector(weight.bias[...], Stage.RESIDUAL)
        return y + jnp.broadcast_to(bias, y.shape)
