"""Norms against values worked out by hand."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec

from jaxserve.config import NormKind, NormSpec
from jaxserve.layers.norm import Norm
from jaxserve.layers.param import Axis, Declare
from jaxserve.partitioning.collectives import LocalComm
from jaxserve.partitioning.layout import Stage

from .tiny_models import filled, with_values

# Mean square 12.5; mean 3.5 and variance 0.25.
X = np.array([[3.0, 4.0]], np.float32)
SCALE = np.array([2.0, 0.5], np.float32)
BIAS = np.array([10.0, -10.0], np.float32)


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [
        (NormSpec(NormKind.RMS, eps=0.0), np.array([6.0, 2.0]) / 12.5**0.5),
        (NormSpec(NormKind.RMS, eps=3.5), np.array([6.0, 2.0]) / 4.0),
        (NormSpec(NormKind.RMS, eps=3.5, unit_offset=True), np.array([9.0, 6.0]) / 4.0),
        (NormSpec(NormKind.LAYER, eps=0.0), np.array([-2.0, 0.5])),
        (NormSpec(NormKind.LAYER, eps=0.75), np.array([-1.0, 0.25])),
        (NormSpec(NormKind.LAYER, eps=0.0, bias=True), np.array([8.0, -9.5])),
    ],
)
def test_a_norm_gives_what_is_worked_out_by_hand(spec: NormSpec, wanted: np.ndarray) -> None:
    params = {"scale": jnp.asarray(SCALE)} | ({"bias": jnp.asarray(BIAS)} if spec.bias else {})
    norm = with_values(Norm(spec, Axis("embed", 2), Declare()), params)
    np.testing.assert_allclose(
        norm(jnp.asarray(X), LocalComm(), Stage.RESIDUAL)[0], wanted, rtol=1e-6
    )


@pytest.mark.parametrize("kind", NormKind)
def test_statistics_are_float32_and_the_result_is_of_the_input_dtype(kind: NormKind) -> None:
    # In bfloat16 the sum of 512 squares would be off by far more than the rounding of the result.
    x = np.linspace(1, 3, 512, dtype=np.float32)[None]
    norm, _ = filled(Norm(NormSpec(kind), Axis("embed", 512), Declare("bfloat16")))
    x16 = jnp.asarray(x, jnp.bfloat16)
    found = norm(x16, LocalComm(), Stage.RESIDUAL)
    assert found.dtype == jnp.bfloat16
    wide = np.asarray(x16, np.float64)
    if kind is NormKind.LAYER:
        wide -= wide.mean()
    wanted = wide / np.sqrt((wide**2).mean() + 1e-5) * np.asarray(norm.scale[...], np.float64)
    np.testing.assert_allclose(np.asarray(found, np.float64), wanted, rtol=2**-8)


@dataclass(frozen=True)
class Sharded(LocalComm):
    """Features lie over the mesh axis x."""

    def total(self, x: Array, stage: Stage) -> Array:
        return lax.psum(x, "x")


@pytest.mark.parametrize("kind", NormKind)
def test_statistics_are_summed_over_the_shards_of_the_features(kind: NormKind) -> None:
    declared = Norm(NormSpec(kind, bias=True), Axis("embed", 16), Declare())
    norm, params = filled(declared)
    x = jnp.asarray(np.random.default_rng(3).normal(size=(3, 16)), jnp.float32)

    def shard(params: dict[str, Array], x: Array) -> Array:
        return with_values(declared, params)(x, Sharded(), Stage.RESIDUAL)

    mesh = Mesh(jax.devices(), ("x",))
    over, wide = PartitionSpec("x"), PartitionSpec(None, "x")
    sharded = jax.shard_map(shard, mesh=mesh, in_specs=(over, wide), out_specs=wide)
    np.testing.assert_allclose(
        jax.jit(sharded)(params, x), norm(x, LocalComm(), Stage.RESIDUAL), atol=2e-6
    )
