"""Parameters with zeros, and of layers that repeat: the checkpoint's numbers in their places."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxserve.checkpoint import Format, convert, inspect, load_params
from jaxserve.checkpoint.load import open_reader
from jaxserve.checkpoint.place import place
from jaxserve.checkpoint.stored import stored_parameters
from jaxserve.errors import CheckpointError
from jaxserve.layers.decoder import Model
from jaxserve.layers.param import Declare, Orientation, named_parameters, padded
from jaxserve.partitioning.layout import Ffn, Heads, PhaseLayout
from jaxserve.partitioning.mesh import MeshPlan, make_mesh, places
from jaxserve.partitioning.padding import Padding

PHASE = PhaseLayout(Ffn.WS2D, Heads.HEADS)
PLAN = MeshPlan(1, 3, 2)
"""Over six devices none of 8 heads, 4 key heads, and 104 tokens of a vocabulary divide."""


class Counting:
    """A reader that remembers how many elements were read."""

    parallel = 1

    def __init__(self, reader) -> None:
        self._reader = reader
        self.read_elements = 0

    def shape(self, name):
        return self._reader.shape(name)

    def where(self, name):
        return self._reader.where(name)

    def read(self, name, index):
        found = self._reader.read(name, index)
        self.read_elements += found.size
        return found


def same_bits(a, b) -> None:
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


def stacked(params, model: Model):
    """Returns the parameters of single layers, those of repeated layers in one array."""
    period = len(model.config.pattern)
    layers = params["layers"]
    groups = {i: [layers[at] for at in range(i, len(layers), period)] for i in range(period)}
    joined = {i: jax.tree.map(lambda *each: np.stack(each), *g) for i, g in groups.items()}
    return {**params, "layers": joined}


def by_hand(params, model: Model):
    """Returns unpadded parameters with the model's zeros."""
    leaves = {path: leaf.logical for path, leaf in named_parameters(model.module())}

    def one(path, value):
        return padded(value, leaves[tuple(key.key for key in path)])

    return jax.tree_util.tree_map_with_path(one, params)


@pytest.mark.parametrize("stack", [False, True])
@pytest.mark.parametrize("orientation", Orientation)
@pytest.mark.parametrize("form", Format)
def test_zeros_stand_where_the_checkpoint_has_nothing(
    llama, tmp_path: Path, form, orientation, stack
) -> None:
    path = llama.path if form is Format.SAFETENSORS else convert(llama.path, tmp_path / "o").path
    info = inspect(path)
    plain = Declare("bfloat16", orientation)
    padding = Padding((PHASE,), PLAN.sizes)
    model = Model(info.config, replace(plain, stack=stack, padding=padding))
    expected = load_params(info, Model(info.config, plain))
    expected = by_hand(stacked(expected, model) if stack else expected, model)
    found = load_params(info, model)
    jax.tree.map(same_bits, found, expected)
    on_mesh = load_params(info, model, places(make_mesh(PLAN), PHASE))
    jax.tree.map(same_bits, on_mesh, expected)


def test_heads_stay_with_their_group(llama) -> None:
    info = inspect(llama.path)  # 8 heads in 4 groups
    padding = Padding((PHASE,), MeshPlan(1, 2, 8).sizes)
    assert padding.heads(8, 4) == (16, 4)
    params = load_params(info, Model(info.config, Declare("bfloat16", padding=padding)))
    q = np.asarray(params["layers"][0]["attention"]["qkv"]["separate"]["q"]["values"], np.float32)
    given = llama.tensors["model.layers.0.self_attn.q_proj.weight"].astype(np.float32)
    heads = given.reshape(4, 2, 10, 48).transpose(3, 0, 1, 2)
    grouped = q.reshape(48, 4, 4, 10)
    np.testing.assert_array_equal(grouped[:, :, :2], heads)
    np.testing.assert_array_equal(grouped[:, :, 2:], 0)


def test_every_number_is_read_once_for_all_devices(llama) -> None:
    info = inspect(llama.path)
    model = Model(info.config, Declare("bfloat16", padding=Padding((PHASE,), PLAN.sizes)))
    reader = Counting(open_reader(info))
    place_on = places(make_mesh(PLAN), PHASE)
    for stored in stored_parameters(model):
        before = reader.read_elements
        place(stored, reader, place_on(stored.axes, stored.shape))
        sizes = [int(np.prod(piece.shape)) for piece in stored.pieces]
        assert reader.read_elements - before == sum(sizes), stored.path


@pytest.mark.parametrize("fuse", [False, True])
def test_layers_that_repeat_are_stacked_fused_or_not(llama, fuse: bool) -> None:
    info = inspect(llama.path)
    declare = Declare("bfloat16", Orientation.OUT_IN, fuse)
    model = Model(info.config, replace(declare, stack=True))
    expected = stacked(load_params(info, Model(info.config, declare)), model)
    jax.tree.map(same_bits, load_params(info, model), expected)


def test_a_layer_of_another_shape_is_named(llama) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    llama.tensors[name] = llama.tensors[name][:, :-1]
    llama.write_tensors()
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down"):
        load_params(llama.path, Model(inspect(llama.path).config, Declare(stack=True)))
