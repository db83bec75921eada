"""Parameters are the checkpoint's numbers, in the form in which the model stores them."""

import shutil
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxserve.checkpoint import inspect, load_params
from jaxserve.checkpoint.hf import SINGLE
from jaxserve.checkpoint.load import open_reader
from jaxserve.checkpoint.place import host_values, place
from jaxserve.checkpoint.stored import stored_parameters
from jaxserve.checkpoint.tensors import Reader
from jaxserve.errors import CheckpointError
from jaxserve.layers.decoder import Model
from jaxserve.layers.param import Declare, Orientation
from jaxserve.progress import Unit

STORAGES = [(orientation, fuse) for orientation in Orientation for fuse in (False, True)]
BF16 = ml_dtypes.bfloat16


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Returns path -> leaf, containers without leaves left out."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def bits(array: Any) -> np.ndarray:
    return np.asarray(array).view(np.uint8)


def linear_in(weights: list[np.ndarray], inputs_first: bool) -> np.ndarray:
    """Returns Hugging Face weights [out, in], end to end, with the wanted side first."""
    whole = np.concatenate(weights)
    return whole.T if inputs_first else whole


def by_hand(tensors: dict[str, np.ndarray], orientation: Orientation, fuse: bool):
    """Returns the parameters of the two-layer Llama of conftest, from its tensors."""
    first = orientation is Orientation.IN_OUT
    expected = {
        "embedding.values": tensors["model.embed_tokens.weight"],
        "head.values": tensors["lm_head.weight"],
        "final_norm.scale": tensors["model.norm.weight"],
    }
    for i in range(2):
        there, here = f"model.layers.{i}", f"layers.{i}"
        q, k, v, o = (tensors[f"{there}.self_attn.{n}_proj.weight"] for n in "qkvo")
        gate, up, down = (tensors[f"{there}.mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
        expected[f"{here}.attention_norm.scale"] = tensors[f"{there}.input_layernorm.weight"]
        expected[f"{here}.mlp_norm.scale"] = tensors[f"{there}.post_attention_layernorm.weight"]
        out = linear_in([o], first)
        expected[f"{here}.attention.out.values"] = out.reshape(
            (8, 10, 48) if first else (48, 8, 10)
        )
        expected[f"{here}.mlp.down.values"] = linear_in([down], first)
        if fuse:
            expected[f"{here}.attention.qkv.fused.values"] = linear_in([q, k, v], first)
            expected[f"{here}.mlp.hidden.fused.values"] = linear_in([gate, up], first)
            continue
        for name, weight, heads in (("q", q, 8), ("k", k, 4), ("v", v, 4)):
            shape = (48, heads, 10) if first else (heads, 10, 48)
            path = f"{here}.attention.qkv.separate.{name}.values"
            expected[path] = linear_in([weight], first).reshape(shape)
        for name, weight in (("gate", gate), ("up", up)):
            expected[f"{here}.mlp.hidden.separate.{name}.values"] = linear_in([weight], first)
    return expected


@pytest.mark.parametrize(("orientation", "fuse"), STORAGES)
def test_every_storage_holds_the_tensors_of_the_file(llama, orientation: Orientation, fuse: bool):
    info = inspect(llama.path)
    model = Model(info.config, Declare("bfloat16", orientation, fuse))
    params = load_params(info, model)
    assert jax.tree.structure(params) == jax.tree.structure(model.abstract_params())
    found, expected = flat(params), by_hand(llama.tensors, orientation, fuse)
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        assert isinstance(found[path], jax.Array), path
        assert found[path].dtype == jnp.bfloat16, path
        np.testing.assert_array_equal(bits(found[path]), bits(np.ascontiguousarray(value)), path)


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [
        ("float32", "bfloat16"),
        ("float16", "bfloat16"),
        ("float16", "float32"),
        ("bfloat16", "float32"),
        ("bfloat16", "float16"),
    ],
)
def test_dtypes_are_cast_to_nearest(make, stored: str, wanted: str):
    checkpoint = make(dtype=stored)
    info = inspect(checkpoint.path)
    assert info.dtype == stored
    params = load_params(info, Model(info.config, Declare(wanted)))
    tensor = checkpoint.tensors["model.embed_tokens.weight"]
    expected = jnp.asarray(tensor).astype(wanted)
    np.testing.assert_array_equal(bits(params["embedding"]["values"]), bits(expected))


def test_a_value_too_large_for_float16_is_refused(make):
    checkpoint = make()
    checkpoint.tensors["model.norm.weight"][3] = 1e30
    checkpoint.write_tensors()
    with pytest.raises(CheckpointError) as caught:
        load_params(checkpoint.path, Model(inspect(checkpoint.path).config, Declare("float16")))
    message = str(caught.value)
    assert SINGLE in message
    assert "'model.norm.weight'" in message
    assert "65504" in message


def test_an_infinity_of_the_file_stays_one(make):
    checkpoint = make()
    checkpoint.tensors["model.norm.weight"][3] = np.inf
    checkpoint.write_tensors()
    info = inspect(checkpoint.path)
    params = load_params(info, Model(info.config, Declare("float16")))
    assert np.isinf(params["final_norm"]["scale"]).sum() == 1


@pytest.mark.parametrize(("orientation", "fuse"), STORAGES)
def test_grouped_projections_and_biases_are_taken_apart(
    make, falcon_config, orientation: Orientation, fuse: bool
):
    checkpoint = make(falcon_config)
    info = inspect(checkpoint.path)
    params = load_params(info, Model(info.config, Declare("bfloat16", orientation, fuse)))
    layer, qkv = "transformer.h.0.self_attention", params["layers"][0]["attention"]["qkv"]
    # Two groups of four query heads, a key and a value head, six features each.
    weight = checkpoint.tensors[f"{layer}.query_key_value.weight"].reshape(2, 6, 6, 48)
    bias = checkpoint.tensors[f"{layer}.query_key_value.bias"].reshape(2, 6, 6)
    members = {
        "q": [(group, head) for group in range(2) for head in range(4)],
        "k": [(0, 4), (1, 4)],
        "v": [(0, 5), (1, 5)],
    }
    rows = {name: np.stack([weight[at] for at in places]) for name, places in members.items()}
    biases = {name: np.stack([bias[at] for at in places]) for name, places in members.items()}
    inputs_first = orientation is Orientation.IN_OUT
    if fuse:
        rows = {"fused": np.concatenate(list(rows.values())).reshape(-1, 48)}
        biases = {"fused": np.concatenate(list(biases.values())).ravel()}
    for name in rows:
        stored = qkv["fused"] if fuse else qkv["separate"][name]
        expected = np.moveaxis(rows[name], -1, 0) if inputs_first else rows[name]
        np.testing.assert_array_equal(bits(stored["values"]), bits(np.ascontiguousarray(expected)))
        np.testing.assert_array_equal(bits(stored["bias"]), bits(biases[name]))


@pytest.mark.parametrize(("orientation", "fuse"), STORAGES)
def test_any_slice_is_that_slice_of_the_whole(llama, orientation: Orientation, fuse: bool):
    info = inspect(llama.path)
    reader = open_reader(info)
    random = np.random.default_rng(1)
    for stored in stored_parameters(Model(info.config, Declare("float32", orientation, fuse))):
        whole = host_values(stored, reader, tuple(slice(None) for _ in stored.shape))
        assert whole.shape == stored.shape
        for _ in range(20):
            ends = [sorted(random.integers(0, size + 1, 2)) for size in stored.shape]
            index = tuple(slice(int(a), int(b)) for a, b in ends)
            np.testing.assert_array_equal(host_values(stored, reader, index), whole[index])


def test_parameters_do_not_share_memory_with_the_file(llama, tmp_path):
    info = inspect(llama.path)
    model = Model(info.config, Declare("bfloat16", Orientation.OUT_IN))
    params = load_params(info, model)
    before = jax.tree.map(np.array, params)
    # In place: another file under the same name would leave the old pages alone.
    with (llama.path / SINGLE).open("r+b") as file:
        size = file.seek(0, 2)
        file.seek(0)
        file.write(bytes(size))
    shutil.rmtree(llama.path)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(bits(a), bits(b)), params, before)


def test_donating_parameters_leaves_others_alone(llama):
    info = inspect(llama.path)
    model = Model(info.config, Declare("float32", Orientation.OUT_IN))
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    first, second = (load_params(info, model, replicated) for _ in range(2))
    grown = jax.jit(lambda tree: jax.tree.map(lambda a: a + 1, tree), donate_argnums=0)(first)
    for after, before in zip(jax.tree.leaves(grown), jax.tree.leaves(second), strict=True):
        for shard, old in zip(after.addressable_shards, before.addressable_shards, strict=True):
            np.testing.assert_array_equal(np.asarray(shard.data), np.asarray(old.data) + 1)


class Counting:
    """A reader that counts the elements it hands out."""

    parallel = 1

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.shape, self.where = reader.shape, reader.where
        self.count = 0

    def read(self, name, index):
        values = self.reader.read(name, index)
        self.count += values.size
        return values


@pytest.mark.parametrize("cut", [("x",), (None, "x"), ()])
def test_a_slice_is_read_once_however_many_devices_hold_it(llama, cut):
    info = inspect(llama.path)
    reader = Counting(open_reader(info))
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 4), ("x", "y"))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*cut))
    stored = next(s for s in stored_parameters(Model(info.config, Declare(fuse=True))) if s.joined)
    place(stored, reader, sharding)
    assert reader.count == np.prod(stored.shape)


def test_a_model_of_another_config_is_refused(make):
    small, large = make(), make(name="large", intermediate_size=64, num_hidden_layers=3)
    model = Model(inspect(large.path).config, Declare())
    with pytest.raises(CheckpointError, match=r"'layers\.0\.mlp\.\w+' is .*56"):
        load_params(small.path, model)
    deeper = make(name="deeper", num_hidden_layers=3)
    with pytest.raises(CheckpointError, match=r"no weight 'layers\.2"):
        load_params(small.path, Model(inspect(deeper.path).config, Declare()))


def test_a_model_with_another_head_is_refused(make):
    tied = make(tie_word_embeddings=True)
    untied = make(name="untied")
    with pytest.raises(CheckpointError, match="no weight 'head'"):
        load_params(tied.path, Model(inspect(untied.path).config, Declare()))


class Recording:
    """A reporter that keeps what it is told."""

    def task(self, label, total, unit=Unit.BYTES):
        self.label, self.total, self.unit, self.done = label, total, unit, 0
        return self

    def __enter__(self):
        return self.advance

    def __exit__(self, *error):
        return False

    def advance(self, amount):
        self.done += amount


def test_progress_counts_the_bytes_of_the_parameters(llama):
    seen, info = Recording(), inspect(llama.path)
    params = load_params(info, Model(info.config, Declare("float32")), progress=seen)
    assert seen.total == seen.done == sum(a.nbytes for a in jax.tree.leaves(params))
    assert (seen.label, seen.unit) == ("loading model", Unit.BYTES)
