"""Declarations: shapes, axes, storage and fresh values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.config import Activation, AttentionSpec, LayerSpec, MlpSpec, ModelConfig, NormSpec
from jaxserve.layers.decoder import Model
from jaxserve.layers.norm import Norm
from jaxserve.layers.param import (
    Axis,
    Declare,
    Orientation,
    Parameter,
    named_parameters,
    size_of,
    tree_of,
)

from .tiny_models import MIXED

EMBED, HEADS, HEAD = Axis("embed", 6), Axis("heads", 4), Axis("head", 3)


def shape_of(parameter: Parameter) -> tuple[int, ...]:
    return parameter.get_value().shape


@pytest.mark.parametrize(
    ("orientation", "shape", "axes"),
    [
        (Orientation.IN_OUT, (6, 4, 3), ("embed", "heads", "head")),
        (Orientation.OUT_IN, (4, 3, 6), ("heads", "head", "embed")),
    ],
)
def test_a_weight_is_stored_in_the_orientation_declared(
    orientation: Orientation, shape: tuple[int, ...], axes: tuple[str, ...]
) -> None:
    weight = Declare("bfloat16", orientation).weight((EMBED,), (HEADS, HEAD), bias=True)
    assert shape_of(weight.values) == shape
    assert weight.values.axes == axes
    assert weight.values.get_value().dtype == jnp.bfloat16
    assert weight.bias is not None
    assert shape_of(weight.bias) == (4, 3)
    assert weight.bias.axes == ("heads", "head")


def test_a_fused_group_is_one_weight() -> None:
    group = Declare(fuse=True).group((EMBED,), True, q=(HEADS, HEAD), k=(HEAD,))
    assert group.fused is not None
    assert group.fused.bias is not None
    assert shape_of(group.fused.values) == (6, 4 * 3 + 3)
    assert shape_of(group.fused.bias) == (15,)
    assert not group.separate


def test_a_separate_group_has_a_weight_for_each_member_in_order() -> None:
    group = Declare().group((EMBED,), q=(HEADS, HEAD), k=(HEAD,))
    assert group.fused is None
    assert [name for name, _ in group.members] == ["q", "k"]
    assert shape_of(group.separate["q"].values) == (6, 4, 3)
    assert shape_of(group.separate["k"].values) == (6, 3)


@pytest.mark.parametrize(
    ("platform", "dtype", "orientation"),
    [
        ("cpu", "bfloat16", Orientation.OUT_IN),
        ("cpu", "float32", Orientation.OUT_IN),
        ("tpu", "bfloat16", Orientation.IN_OUT),
        ("gpu", "float32", Orientation.OUT_IN),
    ],
)
def test_the_best_storage_depends_on_the_platform(
    platform: str, dtype: str, orientation: Orientation
) -> None:
    assert Declare.best(platform, dtype) == Declare(dtype, orientation, fuse=True)


def test_axes_span_the_product_of_their_sizes() -> None:
    assert size_of((HEADS, HEAD)) == 12
    assert size_of(()) == 1


def test_parameters_are_named_by_path() -> None:
    norm = Norm(NormSpec(bias=True), EMBED, Declare())
    found = [(path, shape_of(leaf)) for path, leaf in named_parameters(norm)]
    assert found == [(("bias",), (6,)), (("scale",), (6,))]


def test_a_tree_has_every_leaf_at_its_path() -> None:
    assert tree_of([(("a", 0, "b"), 1), (("a", 1), 2), (("c",), 3)]) == {
        "a": {0: {"b": 1}, 1: 2},
        "c": 3,
    }


@pytest.mark.parametrize("fuse", [False, True])
def test_axes_and_shapes_of_a_model_are_parallel_trees(fuse: bool) -> None:
    model = Model(MIXED, Declare(fuse=fuse))
    shapes, axes = model.abstract_params(), model.param_axes()
    matched = jax.tree.map(lambda shape, names: len(shape.shape) == len(names), shapes, axes)
    assert all(jax.tree.leaves(matched))
    assert axes["embedding"]["values"] == ("vocab", "embed")
    assert axes["head"]["values"] == ("vocab", "embed")
    assert axes["layers"][1]["attention"]["out"]["values"] == ("heads", "head", "embed")


def test_storage_changes_no_count() -> None:
    def count(declare: Declare) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(Model(MIXED, declare).abstract_params()))

    assert count(Declare()) == count(Declare("bfloat16", Orientation.OUT_IN, fuse=True))


def test_fresh_parameters_have_the_distributions_declared() -> None:
    # A width of 64 gives its weights a standard deviation of 1/8, an MLP of 256 one of 1/16.
    spec = LayerSpec(
        AttentionSpec(4, 2, 16, qkv_bias=True),
        MlpSpec(256, Activation.RELU, gated=False),
        NormSpec(unit_offset=True),
    )
    config = ModelConfig("wide", 512, 64, (spec,), NormSpec(), max_context_tokens=8, tied=True)
    params = jax.jit(Model(config, Declare(fuse=True)).init)(jax.random.key(0))
    layer = params["layers"][0]
    for values, std in [
        (params["embedding"]["values"], 0.02),
        (layer["mlp"]["hidden"]["fused"]["values"], 1 / 8),
        (layer["mlp"]["down"]["values"], 1 / 16),
    ]:
        assert abs(float(jnp.mean(values))) < 0.05 * std
        assert float(jnp.std(values)) == pytest.approx(std, rel=0.03)
    np.testing.assert_array_equal(params["final_norm"]["scale"], 1)
    np.testing.assert_array_equal(layer["attention_norm"]["scale"], 0)  # one is added to it
    np.testing.assert_array_equal(layer["attention"]["qkv"]["fused"]["bias"], 0)
