"""Chips, their sources, and the slices they form."""

from pathlib import Path

import pytest

from jaxserve.errors import ConfigError, UsageError
from jaxserve.partitioning.hardware import Origin, chips, parse_chips, shapes, slice_of

SMALL = """
[mine]
device_kind = "cpu"
network = "none"
host_chips = 1
max_chips = 1
tile = 1
bfloat16 = [1e12, "measured", "here"]
hbm_bytes = [1e9, "measured", "here"]
hbm = [1e10, "measured", "here"]
hop_s = [0, "assumed", "none"]
"""

PUBLISHED = {
    # bfloat16 TF, int8 TF, GB/s of memory, GB/s a chip sends
    "v4": (275, 275, 1200, 270),
    "v5e": (197, 393, 819, 180),
    "v5p": (459, 918, 2765, 540),
    "v6e": (918, 1836, 1638, 360),
    "tpu7x": (2307, 4614, 7380, 600),
    "a100": (312, 624, 2039, 300),
    "h100": (989, 1979, 3350, 450),
    "h200": (989, 1979, 4800, 450),
    "b200": (2250, 4500, 7700, 900),
    "l4": (121, 242, 300, 32),
}


def test_every_chip_has_its_published_figures():
    found = {
        name: (
            chip.flops.number / 1e12,
            chip.number("int8") / 1e12,
            chip.hbm.number / 1e9,
            chip.number("link") * chip.number("links") / 1e9,
        )
        for name, chip in chips().items()
    }
    assert found == PUBLISHED


def test_every_value_names_its_source():
    for chip in chips().values():
        assert all(value.source for value in chip.values.values())
        assert chip.flops.origin is Origin.SPEC


@pytest.mark.parametrize(
    ("name", "rings"),
    [
        ("v5e:16x16", (True, True)),
        ("v5e:8x16", (False, True)),
        ("v4:4x4x4", (True, True, True)),
        ("v4:2x4x4", (False, False, False)),
        ("tpu7x:4x4x4", (True, True, True, False)),
        ("h100:2x8", (False, False)),
    ],
)
def test_rings_follow_the_shape(name: str, rings: tuple[bool, ...]):
    assert tuple(axis.ring for axis in slice_of(name).axes) == rings


def test_hosts_of_a_switch_are_joined_by_the_slower_network():
    outer, inner = slice_of("h100:2x8").axes
    assert (outer.size, outer.bandwidth) == (2, 50e9)
    assert (inner.size, inner.bandwidth) == (8, 450e9)


def test_two_devices_of_a_chip_share_its_memory():
    whole = slice_of("tpu7x:2x2x1")
    assert whole.num_devices == 8
    assert whole.device_hbm_bytes == 96 * 2**30


def test_parts_are_cut_across_the_longest_sides():
    assert slice_of("v4:4x4x8").part(4).shape == (2, 4, 4)  # type: ignore[union-attr]
    assert slice_of("v5e:4x4").part(3) is None


def test_slices_to_choose_from_come_by_size():
    found = [one.num_chips for one in shapes(chips()["v5e"], 64)]
    assert found == sorted(found)
    assert found[-1] == 64


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v9:4x4", "known: v4, v5e"),
        ("v5e", "is not CHIP:SIZES, as in v5e:4x4"),
        ("v5e:3x5", "there is no slice v5e:3x5: v5e comes as one chip"),
        ("v5e:4x4x4", "two sides of 2, 4, 8 or 16"),
        ("v5e:1x2", "one chip, or two sides of 2"),
        ("v4:3x4x4", "three sides, each 1, 2 or a multiple of 4"),
        ("h100:9", "up to 8 chips of one host"),
        ("v5e:0x4", "is not CHIP:SIZES"),
    ],
)
def test_an_impossible_slice_is_refused_with_the_remedy(text: str, message: str):
    with pytest.raises(UsageError) as caught:
        slice_of(text)
    assert message in str(caught.value)


def test_a_file_adds_a_chip(tmp_path: Path):
    path = tmp_path / "mine.toml"
    path.write_text(SMALL)
    assert slice_of("mine:1", chips(path)).num_chips == 1


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"measured", "here"', '"guessed", "here"', "origin one of spec, measured"),
        ("tile = 1", "", "tile is missing"),
        ("tile = 1", "tile = 1\ncolour = 1", "colour is not known"),
        ('network = "none"', 'network = "ring"', "use one of plane, torus"),
        ('network = "none"', 'network = "torus"', "link is missing"),
        ("hop_s = [0,", "hop_s = [-1,", "is not [number, origin, source]"),
    ],
)
def test_a_faulty_table_is_refused(old: str, new: str, message: str):
    with pytest.raises(ConfigError) as caught:
        parse_chips(SMALL.replace(old, new, 1), "mine.toml")
    assert message in str(caught.value)
