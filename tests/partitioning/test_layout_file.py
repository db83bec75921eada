"""A layout as one value and one file: kept whole, and refused where it does not fit."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from jaxserve.errors import CheckpointError, UnsupportedError, UsageError
from jaxserve.partitioning.layout import Ffn, Heads, PhaseLayout
from jaxserve.partitioning.layout_file import (
    Buckets,
    Dtypes,
    Layout,
    choose,
    model_digest,
    read_layout,
)
from jaxserve.partitioning.plan import MeshPlan

from .equality import FAMILIES

CONFIG = FAMILIES["llama"]


def chosen(mesh: Any = (2, 2, 2), **names: Any) -> Layout:
    found = choose(CONFIG, "float32", mesh=mesh, **names)
    assert found is not None
    return found


def test_names_become_layouts() -> None:
    found = chosen(mesh="2,1,4", layout="ws2d", prefill_layout="wg-xy", attention="heads-batch")
    assert found.mesh == MeshPlan(2, 1, 4)
    assert found.prefill == PhaseLayout(Ffn.WG_XY, Heads.HEADS_BATCH)
    assert found.decode == PhaseLayout(Ffn.WS2D, Heads.HEADS_BATCH)
    assert found.dtypes == Dtypes("float32", "float32", "float32")
    assert str(found) == "prefill wg-xy/heads-batch, decode ws2d/heads-batch on 2x1x4"


def test_a_mesh_alone_is_weight_stationary_by_heads() -> None:
    found = chosen()
    assert found.prefill == found.decode == PhaseLayout(Ffn.WS2D, Heads.HEADS)
    assert str(found) == "ws2d/heads on 2x2x2"


def test_no_mesh_is_no_layout() -> None:
    assert choose(CONFIG, "float32") is None


@pytest.mark.parametrize("option", ["layout", "prefill_layout", "attention"])
def test_a_layout_needs_a_mesh(option: str) -> None:
    names: Any = {option: "heads" if option == "attention" else "ws2d"}
    with pytest.raises(UsageError, match=f"{option} needs a mesh; .* as in 2,2,2"):
        choose(CONFIG, "float32", **names)


@pytest.mark.parametrize(
    ("option", "remedy"),
    [
        ("layout", "ws1d, ws2d, wg-x, wg-xy, wg-xyz"),
        ("prefill_layout", "ws1d, ws2d, wg-x, wg-xy, wg-xyz"),
        ("attention", ", ".join(Heads)),
    ],
)
def test_unknown_names_are_refused_with_the_known_ones(option: str, remedy: str) -> None:
    with pytest.raises(UsageError) as caught:
        chosen(**{option: "3d"})
    assert str(caught.value) == f"{option}='3d' is not known; use one of {remedy}"


@pytest.mark.parametrize(("first", "second"), [("ws1d", "ws2d"), ("wg-xyz", "ws1d")])
def test_phases_store_weights_alike(first: str, second: str) -> None:
    with pytest.raises(UsageError, match="store weights differently; use ws1d for both"):
        chosen(prefill_layout=first, layout=second)


def test_phases_store_keys_and_values_alike() -> None:
    other = PhaseLayout(Ffn.WS2D, Heads.BATCH)
    with pytest.raises(UsageError, match="by batch and decode by heads store keys"):
        msgspec.structs.replace(chosen(), prefill=other).check(CONFIG)


def test_a_width_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UsageError, match=r"embed_dim=48 does not divide over x=5.*x in \{1, 2, 3"):
        chosen(mesh=(5, 1, 1))


def test_a_file_keeps_everything(tmp_path: Path) -> None:
    path = tmp_path / "layout.json"
    layout = msgspec.structs.replace(chosen(layout="wg-x"), buckets=Buckets(8, 64))
    layout.write(path)
    assert read_layout(path) == layout
    assert choose(CONFIG, "float32", layout=str(path)) == layout
    assert choose(CONFIG, "float32", layout=path) == layout
    assert json.loads(path.read_text()) == {
        "model": model_digest(CONFIG),
        "mesh": {"x": 2, "y": 2, "z": 2, "data": 1, "expert": 1, "pipeline": 1},
        "prefill": {"ffn": "wg-x", "heads": "heads", "overlap": "plain", "wire": None},
        "decode": {"ffn": "wg-x", "heads": "heads", "overlap": "plain", "wire": None},
        "dtypes": {"weights": "float32", "activations": "float32", "kv": "float32"},
        "buckets": {"max_sequences": 8, "max_step_tokens": 64},
        "version": 1,
    }


def test_a_file_stands_alone(tmp_path: Path) -> None:
    chosen().write(tmp_path / "layout.json")
    with pytest.raises(UsageError, match="leave mesh out"):
        choose(CONFIG, "float32", layout=tmp_path / "layout.json", mesh=(2, 2, 2))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"version": 2}, UnsupportedError, "schema version 2, and this build reads 1"),
        ({"decode": {"ffn": "ws3d", "heads": "heads"}}, CheckpointError, "ws3d"),
        ({"colour": 1}, CheckpointError, "colour"),
        ({"mesh": {"x": 0}}, UsageError, "positive"),
        ({"mesh": {"x": 2, "expert": 2}}, UnsupportedError, "expert=2"),
        ({"model": None}, CheckpointError, "model"),
        ({"mesh": {"x": 2, "w": 2}}, CheckpointError, "mesh has 'w'"),
        (
            {"decode": {"ffn": "ws2d", "heads": "heads", "overlapp": "one-way"}},
            CheckpointError,
            "decode has 'overlapp'",
        ),
        (
            {"decode": {"ffn": "ws2d", "heads": "heads", "wire": "int8"}},
            UsageError,
            "wire='int8' is unknown; use bfloat16, float16, float32 or None",
        ),
    ],
)
def test_a_file_that_says_something_else_is_refused(tmp_path, change, error, message) -> None:
    path = tmp_path / "layout.json"
    chosen().write(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(error, match=message):
        read_layout(path)


@pytest.mark.parametrize("text", ["", "[1]", "{", "\xff"])
def test_what_is_no_layout_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "layout.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match="is no layout"):
        read_layout(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.json cannot be read"):
        choose(CONFIG, "float32", layout=tmp_path / "none.json")


def test_the_layout_of_another_model_is_refused() -> None:
    layout = chosen()
    layout.check(replace(CONFIG, max_context_tokens=32))
    with pytest.raises(UsageError, match="made for a model with digest"):
        layout.check(FAMILIES["palm"])


def test_the_layout_of_another_dtype_is_refused() -> None:
    with pytest.raises(UsageError, match="use dtype='float32'"):
        chosen().check(CONFIG, "bfloat16")
    mixed = msgspec.structs.replace(chosen(), dtypes=Dtypes("int8", "bfloat16", "bfloat16"))
    with pytest.raises(UnsupportedError, match="weights in int8"):
        mixed.check(CONFIG)


def test_padding_serves_both_phases() -> None:
    found = chosen(prefill_layout="wg-xyz").padding
    assert found.ffn(50) == 56
    assert chosen().padding.phases == (chosen().decode,)
