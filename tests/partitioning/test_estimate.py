"""Terms of a step against sums done by hand."""

import math
from dataclasses import replace

import numpy as np
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
    NormSpec,
)
from jaxserve.errors import UsageError
from jaxserve.partitioning.dtypes import KV, WEIGHTS, stored
from jaxserve.partitioning.efficiency import Efficiency
from jaxserve.partitioning.estimate import Coster, Part, Step, estimate, picked
from jaxserve.partitioning.hardware import Origin, slice_of
from jaxserve.partitioning.layout import Ffn, Heads, PhaseLayout
from jaxserve.partitioning.memory import Kept, kv_bytes, max_context, memory_of, weights_bytes
from jaxserve.partitioning.work import Share, num_parameters

E, F, N, K, H, V, L = 1024, 4096, 8, 2, 128, 2048, 4
ONE = {"x": 1, "y": 1, "z": 1}
IDEAL = Efficiency(1.0, 1.0, 0.0, 0.0)
STATIONARY = PhaseLayout(Ffn.WS2D, Heads.HEADS)


def model(
    *, gated: bool = True, window: int | None = None, block: BlockKind = BlockKind.SERIAL
) -> ModelConfig:
    layer = LayerSpec(
        AttentionSpec(N, K, H, window=window),
        MlpSpec(F, Activation.SILU, gated),
        NormSpec(NormKind.RMS),
        block,
    )
    return ModelConfig("llama", V, E, (layer,) * L, layer.norm, 4096)


def amounts(step: Step, part: Part, on: str = "v4:1x1x1") -> dict[str, float]:
    found = estimate(step, slice_of(on), ONE, IDEAL)
    return {term.name: float(term.amount) for term in found.terms if term.part is part}


def test_products_take_two_operations_a_weight_and_token():
    found = amounts(Step(model(), STATIONARY, batch=8, context=0), Part.COMPUTE)
    assert found["queries, keys, values"] == 2 * 8 * E * (N + 2 * K) * H * L
    assert found["attention output"] == 2 * 8 * E * N * H * L
    assert found["MLP in"] == 2 * 8 * E * 2 * F * L
    assert found["MLP out"] == 2 * 8 * E * F * L
    assert found["logits"] == 2 * 8 * E * V


def test_few_rows_fill_no_tile():
    one, eight = (
        amounts(Step(model(), STATIONARY, batch=batch), Part.COMPUTE)["MLP in"] for batch in (1, 8)
    )
    assert one == eight


def test_an_ungated_mlp_has_half_the_way_up():
    gated, plain = (
        amounts(Step(model(gated=gated), STATIONARY, batch=8), Part.COMPUTE)["MLP in"]
        for gated in (True, False)
    )
    assert gated == 2 * plain


def test_a_parallel_block_has_one_first_projection():
    found = amounts(Step(model(block=BlockKind.PARALLEL), STATIONARY, 8), Part.COMPUTE)
    assert found["first projections"] == 2 * 8 * E * ((N + 2 * K) * H + 2 * F) * L


@pytest.mark.parametrize(
    ("new", "context", "window", "seen"),
    [
        (1, 100, None, 101),
        (1, 100, 64, 64),
        (4, 0, None, 1 + 2 + 3 + 4),
        (4, 0, 3, 1 + 2 + 3 + 3),
        (4, 10, 12, 11 + 12 + 12 + 12),
        (4, 10, None, 11 + 12 + 13 + 14),
    ],
)
def test_a_token_sees_what_came_before_within_its_window(new, context, window, seen):
    step = Step(model(window=window), STATIONARY, batch=3, new=new, context=context)
    assert amounts(step, Part.COMPUTE)["attention"] == 4 * N * H * 3 * seen * L


@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", 2), ("int8", 1 + 4 / H)])
def test_keys_and_values_are_read_once(dtype: str, size: float):
    step = Step(model(), STATIONARY, batch=3, context=99, kept=Kept(kv=KV[dtype]))
    found = amounts(step, Part.KV)
    assert found["keys and values read"] == pytest.approx(3 * 100 * 2 * K * H * size * L)
    assert found["keys and values written"] == pytest.approx(3 * 2 * K * H * size * L)


@pytest.mark.parametrize(
    ("dtype", "size"),
    [("float32", 4), ("bfloat16", 2), ("int8", 1 + 4 / E), ("int4", 0.5 + 2 / 128)],
)
def test_weights_are_read_with_their_scales(dtype: str, size: float):
    step = Step(model(), STATIONARY, batch=8, kept=Kept(WEIGHTS[dtype]))
    assert amounts(step, Part.WEIGHTS)["MLP in"] == pytest.approx(2 * E * F * L * size)


def test_terms_add_up_and_carry_their_origin():
    found = estimate(Step(model(), STATIONARY, 64, 100), slice_of("v4:2x2x2"), dict(x=2, y=2, z=2))
    assert found.time_s == pytest.approx(sum(term.seconds for term in found.terms))
    origins = {term.part: term.origin for term in found.terms}
    assert origins[Part.COMPUTE] is Origin.FITTED
    assert origins[Part.COLLECTIVE] is Origin.SPEC
    assert origins[Part.HOST] is Origin.ASSUMED
    peak = 8 * 275e12
    assert found.mfu == pytest.approx(2 * num_parameters(model()) * 64 / found.time_s / peak)


def test_many_batches_at_once_are_each_alone():
    made = Coster.of(model(), STATIONARY, slice_of("v4:2x2x2"), dict(x=2, y=2, z=2))
    batches = np.array([1, 16, 256])
    whole = made.estimate(batches, 1, 100)
    for index, batch in enumerate(batches.tolist()):
        alone = made.estimate(batch, 1, 100)
        assert picked(whole, index).time_s == pytest.approx(float(alone.time_s))
        assert picked(whole, index).memory.total_bytes == pytest.approx(alone.memory.total_bytes)


def test_memory_is_the_sum_of_shards():
    sizes = {"x": 2, "y": 2, "z": 2}
    share = Share.of(model(), STATIONARY, sizes)
    # Keys and values of 2 heads are cut over z alone, then copied over y.
    layers = L * (2 * E * N * H // 8 + 2 * E * K * H // 4 + 3 * E * F // 8)
    tables, norms = 2 * V * E // 8, (2 * L + 1) * E
    assert weights_bytes(share, Kept()) == 2 * (layers + tables + norms)
    assert kv_bytes(share, Kept(), 4, 100) == 4 * 100 * L * 2 * H * 2


def test_a_window_bounds_what_is_kept():
    share = Share.of(model(window=64), STATIONARY, ONE)
    assert kv_bytes(share, Kept(), 1, 1000) == kv_bytes(share, Kept(), 1, 64)


def test_sequences_fill_up_the_devices_that_keep_them():
    share = Share.of(model(), PhaseLayout(Ffn.WS2D, Heads.BATCH), {"x": 2, "y": 2, "z": 2})
    assert [share.local_rows(batch) for batch in (1, 8, 9)] == [1, 1, 2]
    assert share.tokens(9, 1) == 16


def test_what_is_short_is_said_in_bytes():
    share = Share.of(model(), STATIONARY, ONE)
    on = slice_of("v4:1x1x1")
    small, large = (memory_of(share, on, Kept(), batch=b, context=4096) for b in (1, 10**5))
    assert small.free_bytes > 0
    assert large.free_bytes < 0
    assert large.total_bytes + large.free_bytes == pytest.approx(32 * 2**30)


def test_the_longest_context_is_exact():
    share = Share.of(model(), STATIONARY, ONE)
    token = 2 * K * H * 2 * L
    assert max_context(share, Kept(), batch=3, budget_bytes=3 * 500 * token) == 500
    assert max_context(share, Kept(), batch=3, budget_bytes=3 * 500 * token - 1) == 499


def test_curves_that_were_measured_stand_in_for_peaks():
    on = slice_of("v4:1x1x1")
    chip = replace(on.chip, curves={"hbm": ((1e6, 1e9), (1e9, 4e9)), "matmul": ((1, 1e9),)})
    found = estimate(Step(model(), STATIONARY, 8), replace(on, chip=chip), ONE)
    term = next(t for t in found.terms if t.part is Part.WEIGHTS and t.name == "MLP in")
    assert term.origin is Origin.MEASURED
    # Each layer's weight is read by itself.
    share = math.log(term.amount / L / 1e6) / math.log(1e3)
    assert term.amount / term.seconds == pytest.approx(1e9 + share * 3e9)


def test_short_names_of_dtypes_are_known():
    assert stored("bf16", "weights").name == "bfloat16"
    assert stored("fp8", "kv").bits == 8
    with pytest.raises(UsageError, match="weights='int3' is not known; use one of float32"):
        stored("int3", "weights")


def test_experts_are_read_as_far_as_they_are_taken():
    layer = model().layers[0]
    several = replace(layer, mlp=replace(layer.mlp, experts=ExpertsSpec(8, 2)))
    config = replace(model(), layers=(several,) * L)
    for batch in (1, 16):
        step = Step(config, STATIONARY, batch=batch)
        one = 2 * 2 * E * F * L
        share = 1 - (1 - 2 / 8) ** batch
        assert amounts(step, Part.WEIGHTS)["MLP in"] == pytest.approx(8 * one * share)
    # Two experts for each of 16 tokens.
    assert amounts(step, Part.COMPUTE)["MLP in"] == 2 * 32 * E * 2 * F * L
    assert num_parameters(config) - num_parameters(config, active=True) == 6 * 3 * E * F * L
    # Over four devices each has a quarter of every expert.
    cut = estimate(step, slice_of("v4:2x2x1"), {"x": 1, "y": 2, "z": 2}).terms
    read = {term.name: term.amount for term in cut if term.part is Part.WEIGHTS}
    assert read["MLP in"] == pytest.approx(8 * one * share / 4)
    # Gathered whole, all experts are moved whichever are taken: read, written; those taken read.
    gathered = replace(step, phase=PhaseLayout(Ffn.WG_XYZ, Heads.BATCH))
    terms = estimate(gathered, slice_of("v4:2x2x1"), {"x": 1, "y": 2, "z": 2}).terms
    read = {term.name: term.amount for term in terms if term.part is Part.WEIGHTS}
    own = 1 - (1 - 2 / 8) ** 4
    assert read["MLP in"] == pytest.approx(8 * one * (1 / 4 + 1 + own))
