"""Checkpoints in object stores: loaded to the same bits, by ranges of bytes."""

import json
import sys
from itertools import pairwise
from pathlib import Path

import fsspec
import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.checkpoint import convert, inspect, load_params, remote
from jaxserve.checkpoint.locate import locate
from jaxserve.checkpoint.orbax import kvstore
from jaxserve.checkpoint.remote import Remote, is_address, mirror, runs
from jaxserve.errors import CheckpointError
from jaxserve.layers.decoder import Model
from jaxserve.layers.param import Declare

STORE = fsspec.filesystem("memory")


@pytest.fixture(autouse=True)
def _empty_store():
    yield
    STORE.store.clear()


def put(directory: Path, name: str = "models/llama") -> str:
    """Returns the address of a copy in the store."""
    for path in directory.rglob("*"):
        if path.is_file():
            STORE.pipe_file(f"/{name}/{path.relative_to(directory)}", path.read_bytes())
    return f"memory://{name}"


def given_bytes(monkeypatch) -> list[int]:
    """Returns the sizes of what the store gives of weights, as they come."""
    sizes: list[int] = []
    whole = type(STORE).cat_file

    def counted(self, path, *, start=None, end=None, **more):  # in other orders elsewhere
        data = whole(self, path, start, end, **more)
        if start:
            sizes.append(len(data))
        return data

    monkeypatch.setattr(type(STORE), "cat_file", counted)
    return sizes


def same(address: str, directory: Path, sharding=None) -> None:
    """Checks that both load to the same bits."""
    there, here = inspect(locate(address)), inspect(directory)
    model = Model(here.config, Declare(here.dtype, fuse=True))
    found, expected = (load_params(info, model, sharding) for info in (there, here))
    for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(two))


@pytest.mark.parametrize("shards", [1, 3])
def test_a_checkpoint_in_a_store_loads_to_the_same_bits(make, monkeypatch, shards):
    sizes = given_bytes(monkeypatch)
    checkpoint = make(shards=shards)
    same(put(checkpoint.path), checkpoint.path)
    assert sum(sizes) == inspect(checkpoint.path).nbytes


def test_what_a_family_cuts_out_is_read_alone_but_for_copies(make, falcon_config, monkeypatch):
    falcon = make(falcon_config)
    sizes = given_bytes(monkeypatch)
    monkeypatch.setattr(remote, "GAP_BYTES", 0)
    same(put(falcon.path), falcon.path)
    # Queries are no view of the fused tensor: keys and values, 24 rows and biases, come with them.
    embed = falcon_config["hidden_size"]
    assert sum(sizes) == inspect(falcon.path).nbytes + 24 * (embed + 1) * 2


def test_a_part_of_a_tensor_costs_no_more_than_gaps(llama, monkeypatch):
    path = locate(put(llama.path))
    far = Remote.of(path)
    assert far is not None
    tensor = inspect(path).tensors["model.layers.0.mlp.up_proj.weight"]
    rows, columns = tensor.shape
    sizes = given_bytes(monkeypatch)
    dtype = np.dtype(tensor.dtype)
    far.read(tensor, dtype, lambda whole: whole[2:5])
    assert sizes == [3 * columns * dtype.itemsize]
    sizes.clear()
    far.read(tensor, dtype, lambda whole: whole[:, :4])  # gaps below GAP_BYTES come, too
    assert sizes == [((rows - 1) * columns + 4) * dtype.itemsize]
    sizes.clear()
    monkeypatch.setattr(remote, "GAP_BYTES", 0)
    monkeypatch.setattr(remote, "PIECE_BYTES", 10)
    part = far.read(tensor, dtype, lambda whole: whole[:, 4:12].T)
    assert sum(sizes) == part.nbytes
    assert max(sizes) == 10
    here = inspect(llama.path)
    data = here.tensors[tensor.name].file.read_bytes()
    start = here.tensors[tensor.name].offset or 0
    whole = np.frombuffer(data, dtype, rows * columns, start).reshape(tensor.shape)
    np.testing.assert_array_equal(part, whole[:, 4:12].T)


def test_a_cut_that_copies_reads_all(llama, monkeypatch):
    path = locate(put(llama.path))
    far, tensor = Remote.of(path), inspect(path).tensors["model.norm.weight"]
    assert far is not None
    sizes = given_bytes(monkeypatch)
    found = far.read(tensor, np.dtype(tensor.dtype), lambda whole: whole[:1] + 0)
    assert sizes == [tensor.nbytes]
    assert found.shape == (1,)


@given(st.data())
def test_runs_cover_a_view_and_no_more_than_gaps(data):
    shape = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    bytes_ = np.zeros(2 * int(np.prod(shape)), np.uint8)
    steps = st.sampled_from([1, 2])
    order = data.draw(st.permutations(range(len(shape))))
    cuts = [
        slice(start, stop, data.draw(steps))
        for size in shape
        for start, stop in [sorted(data.draw(st.tuples(*2 * [st.integers(0, size)])))]
    ]
    view = bytes_.view(np.int16).reshape(shape)[tuple(cuts)].transpose(order)
    if data.draw(st.booleans()):
        view = view[::-1]
    gap = data.draw(st.sampled_from([0, 0, 3, 6]))
    found = runs(view, bytes_, gap)
    view[...] = -1
    wanted = bytes_ == 255
    covered = np.zeros_like(wanted)
    for start, stop in found:
        assert not covered[start:stop].any()
        covered[start:stop] = True
        assert wanted[start] and wanted[stop - 1]
    assert covered[wanted].all()
    assert all(two[0] - one[1] > gap for one, two in pairwise(found))
    if gap == 0:
        assert (covered == wanted).all()


def test_runs_that_meet_are_one():
    bytes_ = np.zeros(12, np.uint8)
    view = bytes_.view(np.int16).reshape(2, 3)[:, ::2]
    assert runs(view, bytes_, 0) == [(0, 2), (4, 8), (10, 12)]


def test_a_long_header_is_read_to_its_end(llama, monkeypatch):
    monkeypatch.setattr(remote, "HEADER_BYTES", 16)
    same(put(llama.path), llama.path)


def test_a_mesh_reads_a_slice_once(llama, monkeypatch):
    sizes = given_bytes(monkeypatch)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]), ("x",))
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    same(put(llama.path), llama.path, replicated)
    assert sum(sizes) == inspect(llama.path).nbytes


def test_a_converted_checkpoint_is_read_where_tensorstore_reads(llama, tmp_path):
    out = tmp_path / "orbax"
    convert(llama.path, out)
    same(f"file://{out}", out)
    largest = max((out / "params").rglob("*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated or changed"):
        inspect(mirror(f"file://{out}"))


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("gs://bucket/a/b", {"driver": "gcs", "bucket": "bucket", "path": "a/b/params/"}),
        ("s3://bucket", {"driver": "s3", "bucket": "bucket", "path": "params/"}),
    ],
)
def test_tensorstore_is_told_the_bucket(url, expected, monkeypatch):
    for name in ("AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    far = Remote(url, Path("here"), {})
    assert kvstore(Path("here"), far) == expected
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://minio:9000")
    told = {"endpoint": "http://minio:9000"} if url.startswith("s3") else {}
    assert kvstore(Path("here"), far) == expected | told


def test_a_converted_checkpoint_elsewhere_is_refused():
    with pytest.raises(CheckpointError, match="gs:// or s3:// alone"):
        kvstore(Path("here"), Remote("memory://a", Path("here"), {}))


def test_what_is_missing_is_named_with_the_remedy(llama, monkeypatch):
    with pytest.raises(CheckpointError, match="there are no files below memory://models/none"):
        locate("memory://models/none")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(CheckpointError, match=r"pip install 'jaxserve\[remote\]'"):
        locate("gs://bucket/llama")
    with pytest.raises(CheckpointError, match="more than one place"):
        locate("memory://a::file://b")
    with pytest.raises(CheckpointError, match="Protocol not known: nowhere"):
        locate("nowhere://bucket/llama")
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(CheckpointError, match="fsspec, which is not installed"):
        locate("memory://models/llama")


def test_a_lost_shard_and_a_lost_file_are_named(make):
    checkpoint = make(shards=3)
    address = put(checkpoint.path)
    path, model = locate(address), Model(inspect(checkpoint.path).config, Declare())
    shard = "model-00002-of-00003.safetensors"
    STORE.rm_file(f"/models/llama/{shard}")
    with pytest.raises(CheckpointError, match=rf"models/llama/{shard} cannot be read"):
        load_params(inspect(path), model)
    with pytest.raises(CheckpointError, match=rf"{shard}'?, which memory://models/llama does not"):
        inspect(locate(address))


def test_a_file_cut_short_meanwhile_is_no_checkpoint(llama):
    path = locate(put(llama.path))
    info = inspect(path)
    name = "/models/llama/model.safetensors"
    STORE.pipe_file(name, STORE.cat_file(name)[:-8])
    with pytest.raises(CheckpointError, match="was it replaced meanwhile"):
        load_params(info, Model(info.config, Declare()))


WEIGHTS = "/models/llama/model.safetensors"


def replaced_meanwhile(checkpoint, monkeypatch, name=WEIGHTS, data=None) -> None:
    """Checks that a file which somebody writes during a load, to the same length, is noticed."""
    info = inspect(locate(put(checkpoint.path)))
    new = data or STORE.cat_file(name)[:-8] + bytes(8)
    whole = type(STORE).cat_file

    def once(self, path, *, start=None, end=None, **more):
        if start:
            monkeypatch.setattr(type(STORE), "cat_file", whole)
            STORE.pipe_file(name, new)
        return whole(self, path, start, end, **more)

    monkeypatch.setattr(type(STORE), "cat_file", once)
    load_params(info, Model(info.config, Declare()))


def test_a_file_replaced_during_a_load_is_named(llama, monkeypatch):
    with pytest.raises(CheckpointError, match=r"model\.safetensors was replaced .*: its time was"):
        replaced_meanwhile(llama, monkeypatch)


def test_a_file_that_comes_during_a_load_is_named(llama, monkeypatch):
    with pytest.raises(CheckpointError, match=r"llama/new was replaced .*: its size was none"):
        replaced_meanwhile(llama, monkeypatch, "/models/llama/new", b"data")


def test_a_tag_tells_more_than_size_and_time(llama, monkeypatch):
    tags, ls = iter(range(10**6)), type(STORE).find

    def tagged(self, path, **more):
        tag = next(tags)
        return {name: entry | {"ETag": tag} for name, entry in ls(self, path, **more).items()}

    monkeypatch.setattr(type(STORE), "find", tagged)
    info = inspect(locate(put(llama.path)))
    with pytest.raises(CheckpointError, match="its tag was"):
        load_params(info, Model(info.config, Declare()))


def test_the_folder_here_follows_what_is_there(llama):
    first = locate(put(llama.path))
    assert first == locate("memory://models/llama")
    assert first.name == "llama"
    assert json.loads((first / remote.NAME).read_text())["url"] == "memory://models/llama"
    config = json.loads(STORE.cat_file("/models/llama/config.json"))
    STORE.pipe_file("/models/llama/config.json", json.dumps(config | {"bos_token_id": 3}).encode())
    assert locate("memory://models/llama") != first


def test_a_checkpoint_from_elsewhere_names_no_place_of_its_weights(llama):
    (llama.path / remote.NAME).write_text('{"url": "memory://models/other", "sizes": {}}')
    assert Remote.of(llama.path) is None
    assert inspect(llama.path).nbytes


def test_addresses_are_no_names_of_the_hub_or_of_folders():
    assert is_address("gs://bucket/llama") and is_address("s3://b")
    assert not any(map(is_address, ("owner/name", "./gs:/x", "gs://", "C://x", Path("gs://b/x"))))
