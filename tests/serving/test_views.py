"""Weights one by one, of models that store several together."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.config import (
    Activation,
    AttentionSpec,
    BlockKind,
    LayerSpec,
    MlpSpec,
    ModelConfig,
    NormSpec,
    RopeSpec,
)
from jaxserve.layers.decoder import Model
from jaxserve.layers.param import Declare, Orientation
from jaxserve.pallas_kernels import kernel_set
from jaxserve.partitioning.layout_file import Layout, choose
from jaxserve.serving.generation import Program
from jaxserve.serving.placing import placed, places_of, program_of
from jaxserve.serving.views import Views, single, views

SERIAL = LayerSpec(
    AttentionSpec(6, 2, 8, rope=RopeSpec(8), qkv_bias=True),
    MlpSpec(50, Activation.SILU, gated=True),
    NormSpec(),
)
PARALLEL = LayerSpec(
    AttentionSpec(6, 1, 8, rope=RopeSpec(8)),
    MlpSpec(40, Activation.SILU, gated=True),
    NormSpec(),
    block=BlockKind.PARALLEL,
    mlp_norm=False,
)


@cache
def program(parallel: bool, stack: bool, orientation: Orientation) -> Program:
    layer = PARALLEL if parallel else SERIAL
    config = ModelConfig("tiny", 97, 48, (layer,) * 2, NormSpec(), max_context_tokens=64)
    layout = choose(config, "float32", mesh=(2, 2, 2))
    assert isinstance(layout, Layout)
    declare = Declare("float32", orientation, fuse=True, stack=stack, padding=layout.padding)
    return program_of(config, declare, kernel_set("reference"), layout)


@pytest.mark.parametrize(
    ("parallel", "stack", "orientation"),
    [(False, True, Orientation.IN_OUT), (True, False, Orientation.OUT_IN)],
)
def test_weights_given_one_by_one_come_back(parallel, stack, orientation) -> None:
    made = program(parallel, stack, orientation)
    given = single(made.model).init(jax.random.key(0))
    held = placed(made, given)
    kept = jax.tree.map(lambda leaf: leaf.shape, held)
    assert kept == jax.tree.map(lambda leaf: leaf.shape, made.model.abstract_params())
    shown = views(made.model, held, places_of(made))
    found, wanted = (dict(jax.tree.leaves_with_path(tree)) for tree in (shown, given))
    assert list(found) == list(wanted)
    for path, value in wanted.items():
        np.testing.assert_array_equal(found[path], value, err_msg=str(path))


def test_every_device_has_its_part_of_every_member() -> None:
    made = program(True, False, Orientation.IN_OUT)
    one = single(made.model).init(jax.random.key(1))
    held = placed(made, one)["layers"][0]["first"]["fused"]["values"]
    assert made.mesh is not None
    first = next(s for s in held.addressable_shards if s.device == made.mesh.devices[0, 0, 0])
    q = one["layers"][0]["attention"]["qkv"]["separate"]["q"]["values"].reshape(48, -1)
    gate, up = (one["layers"][0]["mlp"]["hidden"]["separate"][n]["values"] for n in ("gate", "up"))
    # Width over x; features in four pieces over z, y, each with two shares for x.
    shares = [
        m[:24, i * w : (i + 1) * w] for i in range(2) for m in (q, gate, up) for w in width(m)
    ]
    np.testing.assert_array_equal(first.data, jnp.concatenate(shares, axis=1))


def width(member) -> tuple[int]:
    return (member.shape[1] // 8,)


def test_a_view_is_made_where_it_is_asked_for() -> None:
    made = program(False, True, Orientation.IN_OUT)
    held = placed(made, single(made.model).init(jax.random.key(0)))
    shown = views(made.model, held, places_of(made))
    q = shown["layers"][1]["attention"]["qkv"]["separate"]["q"]["values"]
    assert q.shape == (48, 8, 8)
    assert q.sharding.spec == jax.P("x", ("z", "y"), None)
    assert len(shown["layers"]) == 2


def test_weights_on_one_device_are_shown_as_they_are_stored() -> None:
    model = Model(program(False, False, Orientation.IN_OUT).model.config, Declare(fuse=True))
    params = model.init(jax.random.key(0))
    shown = views(model, params, None)
    assert jax.tree.leaves(shown) == jax.tree.leaves(params)
    assert shown["final_norm"]["scale"] is params["final_norm"]["scale"]


@pytest.mark.parametrize("stack", [False, True])
def test_the_text_of_a_tree_has_shapes_and_no_numbers(stack: bool) -> None:
    made = program(False, stack, Orientation.IN_OUT)
    held = placed(made, single(made.model).init(jax.random.key(0)))
    text = repr(views(made.model, held, places_of(made)))
    assert "layers.1.attention.qkv.separate.q.values" in text and "float32[48, 8, 8]" in text
    assert "0." not in text.replace("layers.0.", "")


def test_a_tree_and_what_is_computed_from_it_are_of_one_kind() -> None:
    model = Model(program(False, False, Orientation.IN_OUT).model.config, Declare())
    shown = views(model, model.init(jax.random.key(0)), None)
    doubled = jax.tree.map(lambda x: 2 * x, shown)
    assert isinstance(doubled, Views)
    both = jax.tree.map(lambda a, b: b - 2 * a, shown, doubled)
    assert not any(x.any() for x in jax.tree.leaves(both))
