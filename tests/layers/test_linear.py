"""The one contraction, and groups of it."""

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
def test_a_linear_map_contracts_inputs_and_leaves_the_bias(orientation: Orientation) -> None:
    declared = Declare(orientation=orientation).weight((EMBED,), (HEADS, HEAD), bias=True)
    weight, params = filled(declared)
    w = params["values"]
    if orientation is Orientation.OUT_IN:
        w = np.moveaxis(w, -1, 0)
    wanted = np.tensordot(X, w, 1)
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
    assert [y.shape for y, *_ in found] == [(2, 4, 3), (2, 2, 3), (2, 3)]
    for (one, own, _), (other, others, _) in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
        if bias:
            np.testing.assert_array_equal(own, others)
        else:
            assert own is others is None


def test_adapters_are_refused_until_they_exist() -> None:
    weight, _ = filled(Declare().weight((EMBED,), (HEADS,)))
    adapters: Any = {"rank": 4}
    with pytest.raises(ValueError, match="adapters are not supported"):
        linear(jnp.asarray(X), weight, LocalComm(), KERNELS, adapters)


def test_gradients_reach_weights_and_activations() -> None:
    declared = Declare().weight((EMBED,), (HEADS,))
    _, params = filled(declared)

    def loss(params: dict[str, Array], x: Array) -> Array:
        return jnp.sum(linear(x, with_values(declared, params), LocalComm(), KERNELS))

    of_params, of_x = jax.grad(loss, argnums=(0, 1))(params, jnp.asarray(X))
    np.testing.assert_allclose(of_params["values"], np.tile(X.sum(0)[:, None], 4), rtol=1e-5)
    row = params["values"].sum(1)
    np.testing.assert_allclose(of_x, np.stack([row, row]), rtol=1e-5)
