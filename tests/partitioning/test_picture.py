"""A layout as text and as a picture says what is where."""

import runpy
import xml.etree.ElementTree as ET
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from jaxserve.partitioning.layout_file import choose
from jaxserve.partitioning.mesh import MeshPlan, make_mesh, places
from jaxserve.partitioning.picture import LayoutView

from .equality import FAMILIES


def view(mesh, family: str = "llama", **names) -> LayoutView:
    layout = choose(FAMILIES[family], "float32", mesh=mesh, **names)
    assert layout is not None
    return LayoutView(layout, FAMILIES[family])


def test_text_names_the_parts_of_every_chip() -> None:
    assert repr(view((2, 1, 2))).splitlines() == [
        "ws2d/heads on 2x1x2: 4 devices, float32",
        "padded: heads 6 to 8, ffn 50 to 52, vocabulary 97 to 98",
        "chip  x  y  z  embed  ffn    heads  kv_heads  vocab  cached sequences  cached kv_heads",
        "0     0  0  0  0:24   0:26   0:4    0:1       0:49   all               0:1",
        "1     0  0  1  0:24   26:52  4:8    1:2       49:98  all               1:2",
        "2     1  0  0  24:48  0:26   0:4    0:1       0:49   all               0:1",
        "3     1  0  1  24:48  26:52  4:8    1:2       49:98  all               1:2",
    ]


def test_large_meshes_are_shortened() -> None:
    lines = repr(view((4, 4, 3), attention="batch")).splitlines()
    assert lines[-1] == "and 32 more"
    assert lines[-2].split()[-2:] == ["48", "0:2"]


@pytest.mark.parametrize("names", [{}, {"layout": "ws1d"}, {"attention": "heads-batch"}])
@pytest.mark.parametrize("mesh", [(2, 2, 2), (1, 2, 4), (3, 2, 1)])
def test_the_parts_are_those_of_the_arrays(mesh, names) -> None:
    drawn = view(mesh, **names)
    devices = make_mesh(MeshPlan(*mesh))
    place, numbers = places(devices, drawn.layout.decode), devices.devices.ravel().tolist()
    for panel in drawn.panels()[:-1]:
        assert panel.rows.size is not None
        assert panel.columns.size is not None
        shape = (panel.rows.size, panel.columns.size)
        sharding = place((panel.rows.name, panel.columns.name), shape)
        pieces = {}
        assert isinstance(sharding, NamedSharding)
        for device, (rows, columns) in sharding.devices_indices_map(shape).items():
            at = rows.start or 0, columns.start or 0
            pieces.setdefault(at, []).append(numbers.index(device))
        found = drawn.chips(panel)
        assert [sorted(pieces[at]) for at in sorted(pieces)] == [found[at] for at in sorted(found)]


def test_a_chip_keeps_the_heads_that_its_queries_read() -> None:
    drawn = view((2, 2, 2), family="falcon")
    assert drawn.chips(drawn.panels()[-1]) == {(0, 0): list(range(8))}
    drawn = view((2, 2, 2), family="llama")
    assert drawn.chips(drawn.panels()[-1]) == {(0, 0): [0, 2, 4, 6], (0, 1): [1, 3, 5, 7]}
    drawn = view((2, 2, 2), attention="batch")
    assert drawn.chips(drawn.panels()[-1]) == {(chip, 0): [chip] for chip in range(8)}


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 2), (4, 4, 4)])
def test_the_picture_is_an_image_of_every_cell(mesh) -> None:
    config = FAMILIES["llama"]
    drawn = view(mesh) if np.prod(mesh) < 16 else view(mesh, layout="wg-xyz", attention="batch")
    assert config is drawn.config
    image = ET.fromstring(drawn.svg())
    cells = image.findall(".//{http://www.w3.org/2000/svg}g/{http://www.w3.org/2000/svg}rect")
    assert len(cells) == sum(len(drawn.chips(panel)) for panel in drawn.panels())
    assert "residual stream" in drawn._repr_html_()


def test_the_picture_needs_no_devices() -> None:
    assert np.prod((4, 4, 3)) > len(jax.devices())
    assert "<svg" in view((4, 4, 3))._repr_html_()


def test_the_pictures_of_the_documentation_are_new() -> None:
    folder = Path(__file__).parents[2] / "docs" / "layouts"
    drawn = runpy.run_path(str(folder / "draw.py"))["pictures"]()
    assert {path.name for path in folder.glob("*.svg")} == drawn.keys()
    for name, svg in drawn.items():
        assert (folder / name).read_text() == svg, f"{name}: run python docs/layouts/draw.py"
