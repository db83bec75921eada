"""Reading of optimised HLO: programs in the forms in which XLA prints them."""

from pathlib import Path

import pytest

from jaxserve.errors import UnsupportedError
from jaxserve.partitioning.cost import Collective, Where
from jaxserve.partitioning.hlo import collectives

CUBE = {"x": 4, "y": 4, "z": 4}
BOX = {"x": 2, "y": 2, "z": 2}

LOOP = (Path(__file__).parent / "hlo" / "loop.hlo").read_text()


def test_a_loop_is_a_layer_and_what_stands_outside_are_the_ends():
    assert collectives(LOOP, CUBE) == [
        Collective("all-gather", ("y", "z"), "bf16", 64 * 4608 * 2, Where.LAYER),
        Collective("reduce-scatter", ("y", "z"), "bf16", 64 * 4608 * 2, Where.LAYER),
        Collective("all-reduce", ("x",), "bf16", 64 * 288 * 2, Where.ENDS),
    ]


CHOICE = """
%skipped (p.1: bf16[64,288]) -> bf16[64,288] {
  ROOT %p.1 = bf16[64,288]{1,0} parameter(0)
}

ENTRY %main (p.2: bf16[64,288], wanted: pred[]) -> bf16[64,288] {
  %p.2 = bf16[64,288]{1,0} parameter(0)
  %wanted = pred[] parameter(1)
  ROOT %c = bf16[64,288]{1,0} conditional(%wanted, %p.2, %p.2), true_computation=%taken, \
false_computation=%skipped
}
"""


def test_a_branch_counts_apart_with_the_loops_in_it():
    found = collectives(LOOP.replace("ENTRY %main", "%taken") + CHOICE, CUBE)
    assert [(one.kind, one.where) for one in found] == [
        ("all-gather", Where.BRANCH),
        ("reduce-scatter", Where.BRANCH),
        ("all-reduce", Where.BRANCH),
    ]


def entry(*lines: str) -> str:
    """Returns a program of these lines, after `%p`, of which the last is the result."""
    *others, last = lines
    body = ["%p = bf16[16,128]{1,0:T(8,128)(2,1)} parameter(0)", *others, f"ROOT {last}"]
    return (
        "ENTRY %main (p: bf16[16,128]) -> bf16[16,128] {\n"
        + "\n".join(f"  {line}" for line in body)
        + "\n}\n"
    )


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("mesh['x'=2,'y'=2,'z'=2] {'y'}", ("y",)),
        ("mesh['x'=2,'y'=2,'z'=2] {'z','x'}", ("x", "z")),
        ("[4,2]<=[8]", ("z",)),
        ("[4,2]<=[2,4]T(1,0)", ("x",)),
        ("[2,4]<=[2,2,2]T(1,0,2)", ("x", "z")),
        ("[1,8]<=[8]", ("x", "y", "z")),
        ("{{0,2},{1,3},{4,6},{5,7}}", ("y",)),
        ("{{0,1,2,3},{4,5,6,7}}", ("y", "z")),
    ],
)
def test_groups_are_axes_of_the_mesh_however_they_are_written(groups, axes):
    text = entry(
        f"%g = bf16[32,128]{{1,0}} all-gather(%p), replica_groups={groups}, dimensions={{0}}"
    )
    assert collectives(text, BOX) == [
        Collective("all-gather", axes, "bf16", 32 * 128 * 2, Where.ENDS)
    ]


def test_axes_of_one_device_do_not_count():
    groups = "mesh['x'=4,'y'=2,'z'=1] {'z','y'}"
    text = entry(f"%g = bf16[32,128]{{1,0}} all-gather(%p), replica_groups={groups}")
    (found,) = collectives(text, {"x": 4, "y": 2, "z": 1})
    assert found.axes == ("y",)
    alone = text.replace("{'z','y'}", "{'z'}")
    assert collectives(alone, {"x": 4, "y": 2, "z": 1}) == []


@pytest.mark.parametrize("groups", ["{{0,3},{1,2},{4,7},{5,6}}", "{{0,1},{2,3,4,5,6,7}}"])
def test_groups_that_are_no_axes_are_refused(groups):
    text = entry(f"%g = bf16[32,128]{{1,0}} all-gather(%p), replica_groups={groups}")
    with pytest.raises(UnsupportedError, match="no axes of the mesh"):
        collectives(text, BOX)


def test_a_collective_in_two_parts_counts_once():
    groups = "replica_groups=mesh['x'=2,'y'=2,'z'=2] {'y'}"
    text = entry(
        f"%s = (bf16[16,128]{{1,0}}, bf16[32,128]{{1,0}}, u32[]{{:S(2)}}, u32[]{{:S(2)}}) "
        f"all-gather-start(%p), {groups}, dimensions={{0}}",
        "%d = bf16[32,128]{1,0} all-gather-done(%s)",
        f"%r = bf16[16,128]{{1,0}} all-reduce-start(%p), {groups}, to_apply=%sum",
        "%e = bf16[16,128]{1,0} all-reduce-done(%r)",
    )
    assert collectives(text, BOX) == [
        Collective("all-gather", ("y",), "bf16", 32 * 128 * 2, Where.ENDS),
        Collective("all-reduce", ("y",), "bf16", 16 * 128 * 2, Where.ENDS),
    ]


def test_arrays_that_go_together_count_by_dtype():
    text = entry(
        "%r = (bf16[16,128]{1,0}, f32[64,1]{1,0}, bf16[2]{0}) all-reduce(%p, %p, %p), "
        "replica_groups=mesh['x'=2,'y'=2,'z'=2] {'x'}, to_apply=%sum"
    )
    assert collectives(text, BOX) == [
        Collective("all-reduce", ("x",), "bf16", (16 * 128 + 2) * 2, Where.ENDS),
        Collective("all-reduce", ("x",), "f32", 64 * 4, Where.ENDS),
    ]


def test_an_all_to_all_sends_its_operand():
    text = entry(
        "%r = bf16[2,8,128]{2,1,0} all-to-all(%p), replica_groups=mesh['x'=2,'y'=2,'z'=2] {'x'}"
    )
    assert collectives(text, BOX) == [
        Collective("all-to-all", ("x",), "bf16", 2 * 8 * 128 * 2, Where.ENDS)
    ]


def test_a_permute_is_reported_with_the_axes_it_crosses():
    text = entry(
        "%r = bf16[16,128]{1,0} collective-permute(%p), source_target_pairs={{0,1},{1,0},{2,3}}"
    )
    assert [(one.kind, one.axes) for one in collectives(text, BOX)] == [
        ("collective-permute", ("z",))
    ]


FUSED_SCATTER = """%all-reduce-scatter.1 (q: bf16[16,128]) -> bf16[4,128] {
  %q = bf16[16,128]{1,0} parameter(0)
  %r = bf16[16,128]{1,0} all-reduce(%q), replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%sum
  %c = s32[] constant(0)
  ROOT %s = bf16[4,128]{1,0} dynamic-slice(%r, %c, %c), dynamic_slice_sizes={4,128}
}

ENTRY %main (p: bf16[16,128]) -> bf16[4,128] {
  %p = bf16[16,128]{1,0} parameter(0)
  ROOT %f = bf16[4,128]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_a_scatter_printed_as_a_fused_all_reduce_is_one():
    assert collectives(FUSED_SCATTER, BOX) == [
        Collective("reduce-scatter", ("x", "y"), "bf16", 16 * 128 * 2, Where.ENDS)
    ]


def test_a_scatter_that_became_an_all_reduce_is_seen():
    assert [
        one.kind for one in collectives(FUSED_SCATTER.replace("all-reduce-scatter", "other"), BOX)
    ] == ["all-reduce"]


ASYNC = (Path(__file__).parent / "hlo" / "beside.hlo").read_text()


def test_a_collective_that_goes_on_beside_others_counts_where_it_starts():
    assert collectives(ASYNC, BOX) == [
        Collective("all-gather", ("x",), "bf16", 32 * 128 * 2, Where.ENDS)
    ]
