"""The one contraction: bias, groups, and what is told to the collectives."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from jaxserve.layers.linear import linear, linear_group
from jaxserve.layers.param import Axis, Declare, Orientation
from jaxserve.pallas_kernels import kernel_set
from jaxserve.partitioning.collectives import LocalComm

from .tiny_models import filled, with_values

EMBED, HEADS, HEAD = Axis("embed", 6), Axis("heads", 4), Axis("head", 3)
X = np.random.default_rng(0).normal(size=(2, 6)).astype(np.float32)
KERNELS = kernel_set("reference")


@pytest.mark.parametrize("orientation", Orientation)
def test_a_linear_map_contracts_inputs_and_adds_the_bias(orientation: Orientation) -> None:
    declared = Declare(orientation=orientation).weight((EMBED,), (HEADS, HEAD), bias=True)
    weight, params = filled(declared)
    w = params["values"]
    if orientation is Orientation.OUT_IN:
        w = np.moveaxis(w, -1, 0)
    wanted = np.tensordot(X, w, 1) + params["bias"]
    found = linear(jnp.asarray(X), weight, LocalComm(), KERNELS)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_the_result_has_the_dtype_of_the_activations() -> None:
    weight, _ = filled(Declare("bfloat16").weight((EMBED,), (HEADS,), bias=True))
    found = linear(jnp.asarray(X, jnp.bfloat16), weight, LocalComm(), KERNELS)
    assert found.dtype == jnp.bfloat16


@pytest.mark.parametrize("bias", [False, True])
def test_a_fused_group_gives_what_separate_members_give(bias: bool) -> None:
    members = {"q": (HEADS, HEAD), "k": (Axis("kv_heads", 2), HEAD), "v": (HEAD,)}
    apart, params = filled(Declare().group((EMBED,), bias, **members))
    weights = [params["separate"][name] for name in members]
    fused: dict[str, Any] = {
        "values": jnp.concatenate([w["values"].reshape(6, -1) for w in weights], axis=1)
    }
    if bias:
        fused["bias"] = jnp.concatenate([w["bias"].ravel() for w in weights])
    whole = with_values(Declare(fuse=True).group((EMBED,), bias, **members), {"fused": fused})
    x = jnp.asarray(X)
    found = linear_group(x, whole, LocalComm(), KERNELS)
    wanted = linear_group(x, apart, LocalComm(), KERNELS)
    assert [y.shape for y in found] == [(2, 4, 3), (2, 2, 3), (2, 3)]
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_adapters_are_refused_until_they_exist() -> None:
    weight, _ = filled(Declare().weight((EMBED,), (HEADS,)))
    adapters: Any = {"rank": 4}
    with pytest.raises(ValueError, match="adapters are not supported"):
        linear(jnp.asarray(X), weight, LocalComm(), KERNELS, adapters)


@dataclass(frozen=True)
class Halves(LocalComm):
    """Inputs lie in two halves: gathering doubles, reducing adds a hundred."""

    seen: list[Any] = field(default_factory=list, hash=False)

    def all_gather(self, x: Array, axes: tuple[str, ...]) -> Array:
        self.seen.append(("all_gather", axes, x.shape))
        return jnp.concatenate([x, x], axis=1)

    def reduce_scatter(
        self, x: Array, contracted: tuple[str, ...], produced: tuple[str, ...]
    ) -> Array:
        self.seen.append(("reduce_scatter", contracted, produced, x.shape))
        return x + 100


def test_activations_are_gathered_before_and_reduced_after_the_contraction() -> None:
    weight, params = filled(Declare().weight((EMBED,), (HEADS, HEAD), bias=True))
    comm, x = Halves(), jnp.asarray(X[:, :3])
    found = linear(x, weight, comm, KERNELS)
    gathered = np.concatenate([X[:, :3], X[:, :3]], axis=1)
    # The bias comes after the sum over shards, else it would be added once a shard.
    wanted = np.tensordot(gathered, params["values"], 1) + 100 + params["bias"]
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert comm.seen == [
        ("all_gather", ("embed",), (2, 3)),
        ("reduce_scatter", ("embed",), ("heads", "head"), (2, 4, 3)),
    ]


def test_gradients_reach_weights_and_activations() -> None:
    declared = Declare().weight((EMBED,), (HEADS,))
    _, params = filled(declared)

    def loss(params: dict[str, Array], x: Array) -> Array:
        return jnp.sum(linear(x, with_values(declared, params), LocalComm(), KERNELS))

    of_params, of_x = jax.grad(loss, argnums=(0, 1))(params, jnp.asarray(X))
    np.testing.assert_allclose(of_params["values"], np.tile(X.sum(0)[:, None], 4), rtol=1e-5)
    row = params["values"].sum(1)
    np.testing.assert_allclose(of_x, np.stack([row, row]), rtol=1e-5)
