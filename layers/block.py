"""One block of the decoder."""

from __future__ import annotations

import jax
from flax import nnx
from jax import Array

from jaxserve.config import BlockKind, LayerSpec
from jaxserve.layers.attention import Attention
from jaxserve.layers.cache import AnyCache
from jaxserve.layers.mlp import Mlp
from jaxserve.layers.norm import Norm
from jaxserve.layers.param import Axis, Declare
from jaxserve.layers.runtime import Runtime


class Block(nnx.Module):
    """Attention and MLP, in series or side by side, with their norms."""

    def __init__(self, spec: LayerSpec, embed: Axis, declare: Declare) -> None:
        self.spec = spec
        self.attention_norm = Norm(spec.norm, embed, declare)
        self.attention = Attention(spec.attention, embed, declare)
        self.mlp_norm = Norm(spec.norm, embed, declare) if spec.mlp_norm else None
        self.mlp = Mlp(spec.mlp, embed, declare)
        self.attention_post_norm = Norm(spec.norm, embed, declare) if spec.post_norms else None
        self.mlp_post_norm = Norm(spec.norm, embed, declare) if spec.post_norms else None

    def __call__(
        self, x: Array, layer: int, cache: AnyCache, run: Runtime
    ) -> tuple[Array, AnyCache]:
        """Returns (the residual stream [T, embed] after this block, the cache)."""
        h = self.attention_norm(x, run.comm)
        attended, cache = self.attention(h, layer, cache, run)
        if self.attention_post_norm is not None:
            attended = self.attention_post_norm(attended, run.comm)
        attended = run.tap(f"layers.{layer}.attention", attended)
        if self.spec.block is BlockKind.SERIAL:
            x = x + attended
        if self.mlp_norm is not None:
            h = self.mlp_norm(x, run.comm)
        with jax.named_scope("mlp"):
            fed = self.mlp(h, run)
        if self.mlp_post_norm is not None:
            fed = self.mlp_post_norm(fed, run.comm)
        fed = run.tap(f"layers.{layer}.mlp", fed)
        x = x + fed if self.spec.block is BlockKind.SERIAL else x + attended + fed
        return run.tap(f"layers.{layer}.resid", x), cache
