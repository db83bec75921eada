"""Feed-forward part of a block."""

from __future__ import annotations

from flax import nnx
from jax import Array

from jaxserve.config import MlpSpec
from jaxserve.layers.activation import activate
from jaxserve.layers.linear import linear, linear_group
from jaxserve.layers.param import Axis, Declare
from jaxserve.layers.runtime import Runtime


class Mlp(nnx.Module):
    """act(x up) down, or (act(x gate) * (x up)) down where gated."""

    def __init__(self, spec: MlpSpec, embed: Axis, declare: Declare) -> None:
        self.spec = spec
        ffn = Axis("ffn", spec.ffn_dim)
        members = {"gate": (ffn,), "up": (ffn,)} if spec.gated else {"up": (ffn,)}
        self.hidden = declare.group((embed,), spec.bias, **members)
        self.down = declare.weight((ffn,), (embed,), spec.bias)

    def __call__(self, x: Array, run: Runtime) -> Array:
        """Returns the MLP of x[T, embed] as [T, embed]."""
        first, *rest = linear_group(x, self.hidden, run.comm, run.kernels)
        h = activate(first, self.spec.activation)
        if rest:
            h = h * rest[0]
        return linear(h, self.down, run.comm, run.kernels)
