"""TPU compilers send what the layouts predict: exactly, and over the same axes.

They need libtpu and no TPU. The table of all layouts is in docs/communication.md.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import pytest

from jaxserve.config import (
    Activation,
    AttentionSpec,
    BlockKind,
    ExpertsSpec,
    LayerSpec,
    MlpSpec,
    ModelConfig,
    NormKind,
    NormPlace,
    NormSpec,
    Quantization,
    RopeSpec,
)
from jaxserve.errors import UsageError
from jaxserve.models.named import named_config
from jaxserve.partitioning.cost import Pass, Where, step_collectives
from jaxserve.partitioning.dtypes import WEIGHTS
from jaxserve.partitioning.layout import Ffn, Heads, PhaseLayout, Ring
from jaxserve.partitioning.memory import Kept, weights_bytes
from jaxserve.partitioning.work import Share
from jaxserve.planner.check import Report, check
from jaxserve.planner.lower import Job, argument_bytes
from jaxserve.planner.topology import SLICES

NORM = NormSpec(NormKind.RMS)


def model(
    block: BlockKind = BlockKind.SERIAL,
    *,
    num_heads: int = 16,
    kv_heads: int = 8,
    norm: NormSpec = NORM,
    gated: bool = True,
) -> ModelConfig:
    """Returns four wide layers: shards are of a size that TPUs do not pad."""
    layer = LayerSpec(
        AttentionSpec(num_heads, kv_heads, 128, rope=RopeSpec(128)),
        MlpSpec(4096, Activation.SILU, gated),
        norm,
        block,
    )
    return ModelConfig("llama", 4096, 1024, (layer,) * 4, norm, 512)


def differences(report: Report) -> dict[object, tuple[int | None, int | None]]:
    """Returns (predicted, compiled) where they differ, which a failed test prints."""
    return {
        key: (report.predicted.get(key), report.compiled.get(key))
        for key in report.predicted.keys() | report.compiled.keys()
        if report.predicted.get(key) != report.compiled.get(key)
    }


SERIAL = model()
FALCON = model(BlockKind.PARALLEL, norm=NormSpec(NormKind.LAYER, bias=True), gated=False)
PALM = model(BlockKind.PARALLEL, kv_heads=1)
PADDED = model(BlockKind.PARALLEL, num_heads=12, kv_heads=1)


def cases() -> Iterator[Any]:
    """Yields every layout of projections with every attention; models, steps and slices mixed."""
    for i, ffn in enumerate(Ffn):
        for j, heads in enumerate(Heads):
            config = (SERIAL, PALM, FALCON)[(i + j) % 3]
            length, on = (1, 16)[(i + j) % 2], ("v5e:2x4", "v4:2x2x2")[(i + j // 2) % 2]
            yield pytest.param(config, ffn, heads, length, on, id=f"{ffn}-{heads}")
    yield pytest.param(PADDED, Ffn.WS2D, Heads.HEADS, 1, "v5e:2x4", id="padded")


@pytest.mark.parametrize(("config", "ffn", "heads", "length", "on"), list(cases()))
def test_compiled_communication_is_as_predicted(config, ffn, heads, length, on):
    report = check(Job(config, PhaseLayout(ffn, heads), 64, 128, length), SLICES[on])
    assert differences(report) == {}
    assert report.wire("predicted") == report.wire("compiled") > 0
    assert report.wire("compiled", Where.NESTED) == 0
    assert report.copies == ()
    # Small arrays are padded to the tiles in which they lie.
    assert report.planned_bytes <= report.argument_bytes < report.planned_bytes + 16_384


@pytest.mark.parametrize(
    "changed", [{"norm_place": NormPlace.SUM}, {"post_norms": True}], ids=["sum", "post"]
)
def test_norms_at_other_places_send_what_is_derived(changed):
    layers = tuple(replace(one, **changed) for one in SERIAL.layers)
    job = Job(replace(SERIAL, layers=layers), PhaseLayout(Ffn.WS2D, Heads.BATCH), 64, 128)
    assert differences(check(job, SLICES["v5e:2x4"])) == {}


@pytest.mark.parametrize("ring", [ring for ring in Ring if ring is not Ring.PLAIN])
def test_pieces_that_go_around_are_as_many_bytes_as_a_gather(ring):
    phase, on = PhaseLayout(Ffn.WS2D, Heads.HEADS, ring), SLICES["v4:2x2x2"]
    report = check(Job(SERIAL, phase, 64, 128), on)
    assert differences(report) == {}
    assert ("collective-permute", ("x",), "bf16", Where.LAYER) in report.compiled
    plain = step_collectives(SERIAL, replace(phase, overlap=Ring.PLAIN), on.sizes, Pass(64, 64))
    layer = (one.wire_bytes(on.sizes) for one in plain if one.where is Where.LAYER)
    assert report.wire("compiled") == sum(layer)


@pytest.mark.parametrize(("dtype", "wire"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_sums_are_made_in_the_wires_type_and_copies_go_in_the_narrower(dtype, wire):
    phase = PhaseLayout(Ffn.WS2D, Heads.BATCH, wire=wire)
    report = check(Job(SERIAL, phase, 64, 128, dtype=dtype), SLICES["v5e:2x4"])
    assert differences(report) == {}
    sent = {(kind, name) for kind, _, name, where in report.compiled if where is Where.LAYER}
    assert {("reduce-scatter", {"bfloat16": "bf16", "float32": "f32"}[wire])} <= sent
    assert {name for kind, name in sent if kind in ("all-gather", "all-to-all")} == {"bf16"}


@pytest.mark.parametrize(
    ("ffn", "heads", "quantize"),
    [
        (Ffn.WS2D, Heads.HEADS, None),
        (Ffn.WS1D, Heads.BATCH, None),
        (Ffn.WG_XY, Heads.HEADS_BATCH, None),
        (Ffn.WG_XY, Heads.HEADS_BATCH, Quantization.INT8),
    ],
)
def test_experts_send_what_is_derived(ffn, heads, quantize):
    mlp = MlpSpec(1024, Activation.SILU, True, experts=ExpertsSpec(8, 2))
    config = replace(SERIAL, layers=tuple(replace(one, mlp=mlp) for one in SERIAL.layers))
    phase, on = PhaseLayout(ffn, heads), SLICES["v5e:2x4"]
    job = Job(config, phase, 64, 128, quantize=quantize)
    report = check(job, on)
    assert differences(report) == {}
    # The router's scores.
    summed = report.compiled.get(("all-reduce", ("x",), "f32", Where.LAYER), 0)
    assert (summed >= 64 * 8 * 4) is (ffn is Ffn.WS2D)
    assert report.copies == ()
    kept = Kept(WEIGHTS["bfloat16" if quantize is None else "int8"])
    counted = weights_bytes(Share.of(config, phase, on.sizes), kept)
    held = argument_bytes(replace(job, batch=0, slots=0), on.sizes)
    # A router is never rounded.
    assert held == pytest.approx(counted, rel=1e-6 if quantize is None else 0.003)


@pytest.mark.parametrize(
    ("config", "ffn", "heads", "length", "quantize"),
    [
        (SERIAL, Ffn.WS2D, Heads.BATCH, 1, Quantization.W8A8),
        (PALM, Ffn.WG_XY, Heads.HEADS, 16, Quantization.INT8),
        (FALCON, Ffn.WG_XYZ, Heads.BATCH, 1, Quantization.W8A8),
    ],
)
def test_weights_of_int8_are_gathered_as_bytes(config, ffn, heads, length, quantize):
    phase, on = PhaseLayout(ffn, heads), SLICES["v5e:2x4"]
    job = Job(config, phase, 64, 128, length, quantize=quantize)
    report = check(job, on)
    assert differences(report) == {}
    assert any(dtype == "s8" for _, _, dtype, _ in report.compiled) is phase.gathers
    assert report.copies == ()
    assert report.planned_bytes <= report.argument_bytes < report.planned_bytes + 16_384
    # What the planner counts, which leaves out biases of norms.
    share = Share.of(config, phase, on.sizes)
    counted = weights_bytes(share, Kept(WEIGHTS["int8"]))
    held = replace(job, batch=0, slots=0)
    assert argument_bytes(held, on.sizes) == pytest.approx(counted, rel=0.003)


def test_a_decode_step_of_540_billion_parameters():
    phase = PhaseLayout(Ffn.WS2D, Heads.BATCH)
    report = check(Job(named_config("palm-540b"), phase, 64, 1024), SLICES["v4:4x4x4"])
    assert differences(report) == {}
    assert report.copies == ()
    used = report.argument_bytes + report.temp_bytes
    assert report.planned_bytes <= used <= 1.03 * report.planned_bytes
    # By hand, in bfloat16 but for the norm's statistics, 48 heads of 256 and F = 4E.
    T, E, F, HD, kv = 64, 18432, 73728, 48 * 256, 2 * 256
    over_zy, over_x = 15 / 16, 3 / 4
    elements = 2 * T * E / 4 * over_zy + T * (HD + 2 * F + HD + F) / 16 * over_x
    elements += T * kv * over_x + 2 * T * HD / 64 * over_zy
    assert report.wire("compiled") == 2 * elements + 2 * T * 4 * over_x


def test_pages_as_the_processor_reads_them_are_copied_on_a_tpu():
    job = Job(SERIAL, PhaseLayout(Ffn.WS2D, Heads.HEADS), 16, 512, backend="xla")
    report = check(job, SLICES["v5e:2x4"])
    assert differences(report) == {}
    assert report.copies != ()


def test_a_width_that_does_not_divide_is_refused():
    config = ModelConfig("llama", 4096, 1020, SERIAL.layers, NORM, 512)
    job = Job(config, PhaseLayout(Ffn.WS2D, Heads.HEADS), 16, 128)
    with pytest.raises(UsageError, match="embed_dim=1020 does not divide"):
        check(job, SLICES["v5e:2x4"])


def test_nothing_is_written_for_devices_that_are_not_here(tmp_path):
    from jax.experimental.compilation_cache import compilation_cache

    kept = jax.config.jax_compilation_cache_dir
    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    try:
        check(Job(SERIAL, PhaseLayout(Ffn.WS1D, Heads.HEADS), 16, 128), SLICES["v5e:2x4"])
        assert list(tmp_path.iterdir()) == []
    finally:
        jax.config.update("jax_compilation_cache_dir", kept)
        compilation_cache.reset_cache()
