"""Feed-forward part of a block."""

from __future__ import annotations

from collections.abc import Sequence

from flax import nnx
from jax import Array

from jaxserve.config import MlpSpec
from jaxserve.layers.activation import activate
from jaxserve.layers.linear import Product, linear_from, linear_group
from jaxserve.layers.param import Axis, Declare
from jaxserve.layers.runtime import Runtime
from jaxserve.partitioning.collectives import Part
from jaxserve.partitioning.layout import Stage


class Mlp(nnx.Module):
    """act(x up) down, or (act(x gate) * (x up)) down where gated.

    Attributes:
        first: outputs of the first projections.
        hidden: these projections; None where the block has them.
    """

    def __init__(self, spec: MlpSpec, embed: Axis, declare: Declare, joint: bool = False) -> None:
        self.spec = spec
        ffn = declare.ffn(spec.ffn_dim)
        self.first = {"gate": (ffn,), "up": (ffn,)} if spec.gated else {"up": (ffn,)}
        self.hidden = None if joint else declare.group((embed,), spec.bias, **self.first)
        self.down = declare.weight((ffn,), (embed,), spec.bias)

    def route(self, x: Array, run: Runtime) -> Runtime:
        """Returns the runtime: all tokens go the same way."""
        return run

    def project(self, x: Array, run: Runtime) -> list[Part]:
        """Returns what x[T, embed] gives to the non-linearity: [T, ffn], two where gated."""
        assert self.hidden is not None
        return self.parts(linear_group(x, self.hidden, run.comm, run.kernels))

    def parts(self, products: Sequence[Product]) -> list[Part]:
        """Returns what goes to the non-linearity on its way."""
        return [Part(y, Stage.HIDDEN, bias=bias, bundle=bundle) for y, bias, bundle in products]

    def finish(self, first: Array, *rest: Array, run: Runtime) -> Array:
        """Returns terms of the output [T, embed], without its bias."""
        h = activate(first, self.spec.activation)
        if rest:
            h = h * rest[0]
        return linear_from(h, Stage.HIDDEN, self.down, run.comm, run.kernels)
