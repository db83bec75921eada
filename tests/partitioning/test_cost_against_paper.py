"""The model of time and memory against what is published."""

from dataclasses import replace

import pytest

from jaxserve.config import BlockKind, ModelConfig
from jaxserve.models.named import named_config
from jaxserve.models.size import num_parameters as declared_parameters
from jaxserve.partitioning.efficiency import BOUNDS, Efficiency, fitted
from jaxserve.partitioning.estimate import Coster, Part, Step, band, estimate
from jaxserve.partitioning.hardware import slice_of
from jaxserve.partitioning.layout import Ffn, Heads, PhaseLayout
from jaxserve.partitioning.memory import Kept, max_context
from jaxserve.partitioning.work import Share, num_parameters
from jaxserve.planner.published import CUBE, ROWS, Row

ON = slice_of("v4:4x4x4")
SIZES = dict(CUBE)
PALM = named_config("palm-540b")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_published_times_are_met_within_a_quarter(row: Row):
    assert abs(row.error()) < 0.25
    assert abs(row.error()) < band(slice_of(row.on))


@pytest.mark.parametrize("row", [row for row in ROWS if row.mfu], ids=lambda row: row.name)
def test_published_shares_of_the_peak_are_met(row: Row):
    assert row.mfu is not None
    assert float(row.estimate().mfu) == pytest.approx(row.mfu, abs=0.04)


def test_the_constants_are_four_and_within_bounds():
    constants = vars(Efficiency.read())
    assert constants.keys() == BOUNDS.keys() and len(BOUNDS) == 4
    for name, (low, high) in BOUNDS.items():
        assert low <= constants[name] <= high


def test_the_file_has_the_errors_of_its_constants():
    for row, noted in zip(ROWS, fitted()["errors"], strict=True):
        assert noted["row"] == row.name
        # The file rounds the constants.
        assert row.error() == pytest.approx(noted["all"], abs=1e-3)
        assert {"without the row", "without its phase"} < noted.keys()


@pytest.mark.parametrize(
    ("name", "falls_short", "derived"),
    [
        ("540B decode, 64, int8", 2.76, 3.4),
        ("540B decode, 512", 1.69, 2.4),
        ("540B prefill, 1, int8", 1.29, 1.8),
        ("540B prefill, 512", 1.16, 1.3),
    ],
)
def test_a_bare_roofline_falls_short(name: str, falls_short: float, derived: float):
    """Measured time by max(computing, memory) and what links move, all at their peaks.

    The derived ratios are those of sums that leave out attention's and the norms' part and the
    heads that pad; with them a roofline falls short by less, in the same order.
    """
    (row,) = (one for one in ROWS if one.name == name)
    found = row.estimate(Efficiency(1.0, 1.0, 0.0, 0.0))
    memory = sum(float(found.seconds(part)) for part in (Part.WEIGHTS, Part.KV))
    links = sum(float(t.seconds) - t.hops_s for t in found.terms if t.part is Part.COLLECTIVE)
    roofline = max(float(found.seconds(Part.COMPUTE)), memory) + links
    assert row.measured_s / roofline == pytest.approx(falls_short, abs=0.01)
    assert 1 < falls_short < derived
    assert abs(row.error()) < falls_short - 1


def longest(config: ModelConfig, heads: Heads) -> int:
    share = Share.of(config, PhaseLayout(Ffn.WS2D, heads), SIZES)
    return max_context(share, Kept(), batch=128, budget_bytes=0.30 * 32 * 2**30)


def test_longest_contexts_are_the_papers_within_two_percent():
    assert longest(PALM, Heads.HEADS) == pytest.approx(660, rel=0.02)
    assert longest(PALM, Heads.BATCH) == pytest.approx(43_000, rel=0.02)
    layer = PALM.layers[0]
    attention = replace(layer.attention, num_heads=64, num_kv_heads=64, head_dim=128, rope=None)
    many = replace(PALM, layers=(replace(layer, attention=attention),) * PALM.num_layers)
    assert longest(many, Heads.HEADS) == pytest.approx(1320, rel=0.02)


@pytest.mark.parametrize("name", ["palm-540b", "palm-62b", "llama-3-70b", "gemma-2-2b"])
def test_parameters_are_those_that_are_declared(name: str):
    config = named_config(name)
    # Norms and biases are the rest.
    assert num_parameters(config) == pytest.approx(declared_parameters(config), rel=1e-3)


def seconds(ffn: Ffn, heads: Heads, batch: int, **others: int) -> float:
    made = Coster.of(PALM, PhaseLayout(ffn, heads), ON, SIZES)
    return float(made.estimate(batch, others.get("new", 1), others.get("context", 0)).time_s)


def test_two_dimensions_win_with_the_devices():
    def sent(ffn: Ffn, on: str, *sizes: int) -> float:
        mesh = dict(zip("xyz", sizes, strict=True))
        step = Step(PALM, PhaseLayout(ffn, Heads.HEADS), 512, 2048)
        return float(estimate(step, slice_of(on), mesh).seconds(Part.COLLECTIVE))

    # x is the nearest to half the root of the devices that the torus has.
    meshes = [("v4:2x2x4", 2, 2, 4), ("v4:4x4x4", 4, 4, 4), ("v4:8x8x8", 8, 8, 8)]
    found = [sent(Ffn.WS1D, *mesh) / sent(Ffn.WS2D, *mesh) for mesh in meshes]
    assert found == sorted(found)
    assert found[0] < 1.1 < 1.5 < found[-1]


def test_gathering_wins_with_the_tokens():
    def best(batch: int) -> Ffn:
        return min(Ffn, key=lambda ffn: seconds(ffn, Heads.BATCH, batch, new=2048))

    assert seconds(Ffn.WS2D, Heads.HEADS, 1, new=2048) < seconds(Ffn.WG_X, Heads.HEADS, 1, new=2048)
    assert best(64) in (Ffn.WG_X, Ffn.WG_XY)
    assert best(512) is Ffn.WG_XYZ


def test_attention_by_batch_wins_with_the_context():
    found = [
        seconds(Ffn.WS2D, Heads.HEADS, 64, context=context)
        / seconds(Ffn.WS2D, Heads.BATCH, 64, context=context)
        for context in (16, 512, 2048, 8192)
    ]
    assert found == sorted(found)
    assert found[0] < 1.05 and found[-1] > 2


def test_attention_by_batch_gains_nothing_of_few_sequences():
    for context in (512, 2048, 8192):
        for batch in (1, 2, 3):
            by_heads, by_batch = (
                seconds(Ffn.WS2D, heads, batch, context=context)
                for heads in (Heads.HEADS, Heads.BATCH)
            )
            assert by_batch > by_heads


def test_a_serial_block_sends_its_activations_twice():
    layer = PALM.layers[0]
    serial = replace(layer, block=BlockKind.SERIAL, mlp_norm=True)
    config = replace(PALM, layers=(serial,) * PALM.num_layers)
    phase = PhaseLayout(Ffn.WS2D, Heads.BATCH)
    times = [
        float(estimate(Step(one, phase, 512, 2048), ON, SIZES).time_s) for one in (PALM, config)
    ]
    # The paper measured 14%.
    assert 1.05 < times[1] / times[0] < 1.25


def test_a_gate_makes_the_best_volume_larger_by_a_fifth():
    """2T sqrt(6EF/n) against 4T sqrt(EF/n): 1.22, where X may be any number."""
    layer = PALM.layers[0]

    def volume(gated: bool, x: float) -> float:
        e, f = PALM.embed_dim, layer.mlp.ffn_dim
        return 2 * e / x + (3 if gated else 2) * f * x / 64

    def best(gated: bool) -> float:
        return min(volume(gated, x / 100) for x in range(100, 3200))

    assert best(True) / best(False) == pytest.approx(1.5**0.5, rel=1e-3)
