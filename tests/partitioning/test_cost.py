"""Communication of a layer against vectors worked out by hand."""

from dataclasses import replace

import pytest

from jaxserve.config import (
    Activation,
    AttentionSpec,
    BlockKind,
    LayerSpec,
    MlpSpec,
    ModelConfig,
    NormKind,
    NormSpec,
)
from jaxserve.partitioning.cost import (
    Collective,
    Pass,
    Where,
    gathered_bytes,
    layer_collectives,
    mlp_collectives,
    step_collectives,
    totals,
)
from jaxserve.partitioning.layout import Ffn, Heads, PhaseLayout
from jaxserve.partitioning.placement import Dim, Kind, Move, Placement, moves

CUBE = {"x": 4, "y": 4, "z": 4}
E, F, N, H = 512, 2048, 64, 2
HD = N * H


def layer(
    block: BlockKind = BlockKind.PARALLEL, *, kv_heads: int = 1, gated: bool = True
) -> LayerSpec:
    return LayerSpec(
        AttentionSpec(N, kv_heads, H),
        MlpSpec(F, Activation.SILU, gated),
        NormSpec(NormKind.RMS),
        block,
        mlp_norm=block is BlockKind.SERIAL,
    )


def sent(spec: LayerSpec, ffn: Ffn, heads: Heads, tokens: int) -> dict[tuple[str, str], int]:
    """Returns elements of full tensors by kind and axes, statistics of norms left out."""
    found = layer_collectives(
        spec, E, PhaseLayout(ffn, heads), CUBE, Pass(tokens, tokens, "bfloat16")
    )
    return {
        (kind, "".join(axes)): size // 2
        for (kind, axes, dtype, _), size in totals(found).items()
        if dtype == "bf16"
    }


def test_a_gated_parallel_layer_cut_in_two_dimensions():
    T = 64
    assert sent(layer(), Ffn.WS2D, Heads.HEADS, T) == {
        ("all-gather", "yz"): T * E // 4,
        # One scatter for queries, gate and up.
        ("reduce-scatter", "x"): T * (HD + 2 * F) // 16,
        # The one key head and the one value head are needed everywhere.
        ("all-reduce", "x"): T * 2 * H,
        ("all-gather", "x"): T * (HD + F) // 16,
        ("reduce-scatter", "yz"): T * E // 4,
    }


def test_attention_by_sequence_exchanges_queries_and_outputs():
    T = 64
    assert sent(layer(), Ffn.WS2D, Heads.BATCH, T) == {
        ("all-gather", "yz"): T * E // 4,
        ("reduce-scatter", "x"): T * (HD + 2 * F) // 16 + T * 2 * H,
        # Queries go to their sequences' devices, and the outputs back.
        ("all-to-all", "yz"): 2 * T * HD // 64,
        ("all-gather", "x"): T * (HD + F) // 16,
        ("reduce-scatter", "yz"): T * E // 4,
    }


def test_key_heads_that_divide_go_the_way_of_the_queries():
    T = 64
    assert sent(layer(kv_heads=64), Ffn.WS2D, Heads.HEADS, T) == {
        ("all-gather", "yz"): T * E // 4,
        ("reduce-scatter", "x"): T * (3 * HD + 2 * F) // 16,
        ("all-gather", "x"): T * (HD + F) // 16,
        ("reduce-scatter", "yz"): T * E // 4,
    }


def test_one_dimension_sends_the_width_twice_whatever_the_devices():
    T = 64
    found = layer_collectives(
        layer(kv_heads=64), E, PhaseLayout(Ffn.WS1D, Heads.HEADS), CUBE, Pass(T, T)
    )
    wire = sum(one.wire_bytes(CUBE) for one in found)
    assert wire == 2 * T * E * 2 * 63 / 64
    assert {one.axes for one in found} == {("x",), ("y", "z")}


def test_weights_are_gathered_whole():
    T = 64
    found = sent(layer(kv_heads=64), Ffn.WG_XYZ, Heads.BATCH, T)
    first, last = E * (3 * HD + 2 * F), E * (HD + F)
    # The last dimension comes first, so the sums are those of one gather over all devices.
    assert found == {
        ("all-gather", "yz"): first // 4 + last,
        ("all-gather", "x"): first + last // 16,
    }


def test_what_gathers_leave_in_memory():
    config = ModelConfig("llama", 64, E, (layer(),) * 2, NormSpec(), 64)
    matrices = E * (2 * HD + 3 * F)  # keys and values have one head, whole on all of y and z
    # Cut over y and z still, or gathered over them and then over x.
    over_x = 2 * (matrices // 16 + 2 * E * H)
    assert gathered_bytes(config, PhaseLayout(Ffn.WG_X, Heads.BATCH), CUBE) == over_x
    both = 2 * (matrices + 2 * E * H) + 2 * (E * (HD + 2 * F) // 4 + E * (HD + F) // 16)
    assert gathered_bytes(config, PhaseLayout(Ffn.WG_XYZ, Heads.BATCH), CUBE) == both
    assert gathered_bytes(config, PhaseLayout(Ffn.WS2D, Heads.BATCH), CUBE) == 0


def test_pieces_of_a_sequence_are_merged_in_float32():
    T = 64
    phase = PhaseLayout(Ffn.WS2D, Heads.SEQUENCE)
    found = layer_collectives(layer(), E, phase, CUBE, Pass(T, T))
    merged = [one for one in found if one.dtype == "f32" and one.bytes != T * 4]
    # The largest scores of 4 heads here, then their values with the totals.
    assert merged == [
        Collective("all-reduce", ("x",), "f32", T * 4 * 4),
        Collective("all-reduce", ("x",), "f32", T * 4 * (H + 1) * 4),
    ]


def test_serial_halves_gather_and_scatter_on_their_own():
    T = 64
    serial = sent(layer(BlockKind.SERIAL), Ffn.WS2D, Heads.HEADS, T)
    parallel = sent(layer(), Ffn.WS2D, Heads.HEADS, T)
    assert serial["all-gather", "yz"] == 2 * parallel["all-gather", "yz"]
    assert serial["reduce-scatter", "yz"] == 2 * parallel["reduce-scatter", "yz"]
    assert serial["all-gather", "x"] == parallel["all-gather", "x"]
    assert serial["reduce-scatter", "x"] == parallel["reduce-scatter", "x"]


@pytest.mark.parametrize(
    ("ffn", "coefficients"),
    [
        # Wire elements of an MLP without gate, F = 4E: (of T*E, of E*F).
        (Ffn.WS1D, (2 * 63 / 64, 0)),
        (Ffn.WS2D, (2 * (15 / 64 + 3 / 16), 0)),
        (Ffn.WG_X, (2 * 15 / 64, 2 * 3 / 64)),
        (Ffn.WG_XY, (2 * 3 / 64, 2 * 15 / 64)),
        (Ffn.WG_XYZ, (0, 2 * 63 / 64)),
    ],
)
@pytest.mark.parametrize("tokens", [64, 512, 2048])
def test_volumes_are_the_papers_times_what_comes_from_others(ffn, coefficients, tokens):
    assert mlp_wire(ffn, tokens) == coefficients[0] * tokens * E + coefficients[1] * E * F


def test_layouts_cross_where_the_paper_says():
    assert mlp_wire(Ffn.WS2D, F // 4) == mlp_wire(Ffn.WG_X, F // 4)
    assert mlp_wire(Ffn.WG_X, F) == mlp_wire(Ffn.WG_XY, F)
    assert mlp_wire(Ffn.WS2D, F // 8) < mlp_wire(Ffn.WG_X, F // 8)
    assert mlp_wire(Ffn.WS2D, F // 2) > mlp_wire(Ffn.WG_X, F // 2)


def mlp_wire(ffn: Ffn, tokens: int) -> float:
    """Returns elements that a chip receives, norm statistics left out."""
    found = mlp_collectives(
        layer(BlockKind.SERIAL, gated=False),
        E,
        PhaseLayout(ffn, Heads.HEADS),
        CUBE,
        Pass(tokens, tokens),
    )
    return sum(one.wire_bytes(CUBE) for one in found if one.dtype == "bf16") / 2


@pytest.mark.parametrize(("kind", "count"), [(NormKind.RMS, 1), (NormKind.LAYER, 2)])
def test_norms_sum_their_statistics_in_float32(kind, count):
    spec = replace(layer(), norm=NormSpec(kind))
    found = layer_collectives(spec, E, PhaseLayout(Ffn.WS2D, Heads.HEADS), CUBE, Pass(64, 64))
    assert [one for one in found if one.dtype == "f32"] == count * [
        Collective("all-reduce", ("x",), "f32", 64 * 4)
    ]


def test_the_ends_of_a_model():
    spec = layer()
    config = ModelConfig("palm", 1024, E, (spec,) * 3, spec.norm, 64, tied=True)
    T, R, V = 128, 64, 1024
    found = step_collectives(config, PhaseLayout(Ffn.WS2D, Heads.HEADS), CUBE, Pass(T, R))
    ends = {key[:3]: size for key, size in totals(found).items() if key[3] is Where.ENDS}
    assert ends == {
        ("reduce-scatter", ("y", "z"), "bf16"): T * E // 4 * 2,
        ("all-reduce", ("x", "y", "z"), "f32"): T * 4,
        ("all-gather", ("y", "z"), "bf16"): R * E // 4 * 2,
        ("all-reduce", ("x",), "f32"): R * V // 16 * 4,
        ("all-gather", ("y", "z"), "f32"): R * V * 4,
    }
    inside = [one for one in found if one.where is Where.LAYER]
    assert inside == layer_collectives(
        spec, E, PhaseLayout(Ffn.WS2D, Heads.HEADS), CUBE, Pass(T, R)
    )


def test_one_device_sends_nothing():
    spec = layer()
    config = ModelConfig("palm", 1024, E, (spec,), spec.norm, 64, tied=True)
    sizes = {"x": 1, "y": 1, "z": 1}
    for ffn in Ffn:
        assert step_collectives(config, PhaseLayout(ffn, Heads.BATCH), sizes, Pass(64, 64)) == []


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("all-gather", 768), ("reduce-scatter", 768), ("all-to-all", 768), ("all-reduce", 1536)],
)
def test_a_chip_receives_what_it_does_not_hold(kind, expected):
    assert Collective(kind, ("x",), "bf16", 1024).wire_bytes({"x": 4, "y": 2}) == expected


def test_what_is_left_of_a_scatter_is_summed():
    # Logits want a width cut over x of rows that lie over x and y: y adds up the pieces.
    taken, wanted = Placement((), (), ("x", "y")), Placement((), ("x",))
    scatter = Move(Kind.REDUCE_SCATTER, ("x",), Dim.FEATURES)
    assert moves(taken, wanted) == [scatter, Move(Kind.ALL_REDUCE, ("y",))]
    # With nothing to scatter, sums come before the gather, while there is less to sum.
    cut = Placement((), ("x",), ("y",))
    assert [move.kind for move in moves(cut, Placement())] == [Kind.ALL_REDUCE, Kind.ALL_GATHER]
