"""What a search finds, and what it says where nothing will do."""

import time
from dataclasses import replace

import pytest

from jaxserve.errors import UsageError
from jaxserve.models.named import named_config
from jaxserve.partitioning.demand import Demand, Objective, Serving, Space
from jaxserve.partitioning.dtypes import KV, WEIGHTS
from jaxserve.partitioning.found import Candidate, Found, Verdict, stage_of
from jaxserve.partitioning.hardware import ChipSlice, slice_of
from jaxserve.partitioning.layout import Ffn, Heads, PhaseLayout
from jaxserve.partitioning.memory import RESERVED_SHARE, Kept
from jaxserve.partitioning.meshes import layouts, meshes
from jaxserve.partitioning.search import ranked, search

LLAMA = named_config("llama-3-70b")
SMALL = slice_of("v5e:4x4")


def found(demand: Demand, space: Space | None = None, on: str = "v5e:4x4") -> Found:
    return search(LLAMA, slice_of(on), demand, space)


@pytest.mark.parametrize(
    ("batch", "new", "weights", "wanted", "margin", "decided"),
    [
        (1, 2048, "int8", PhaseLayout(Ffn.WS2D, Heads.HEADS), 0.375, True),
        (64, 1, "int8", PhaseLayout(Ffn.WS2D, Heads.BATCH), 0.173, True),
        # WG-XY is within the band of 15%: by its volumes the paper's layout leads by 14%, too.
        (512, 2048, "bfloat16", PhaseLayout(Ffn.WG_XYZ, Heads.BATCH), 0.051, False),
        (512, 1, "bfloat16", PhaseLayout(Ffn.WS2D, Heads.BATCH), 0.336, True),
    ],
)
def test_the_papers_choices_are_found(
    batch: int, new: int, weights: str, wanted: PhaseLayout, margin: float, decided: bool
):
    """By how much the next layout is slower, and whether that is more than the band.

    Source: Pope et al. 2022, table 2; among the layouts that the paper has.
    """
    cube = next(
        laid for laid in meshes(slice_of("v4:4x4x4")) if laid.sizes == {"x": 4, "y": 4, "z": 4}
    )
    phases = [PhaseLayout(ffn, heads) for ffn in Ffn for heads in (Heads.HEADS, Heads.BATCH)]
    context = 0 if new > 1 else 2080
    order = ranked(
        named_config("palm-540b"),
        cube,
        phases,
        Kept(WEIGHTS[weights]),
        batch=batch,
        new=new,
        context=context,
    )
    assert order[0][0] == wanted, [(str(phase), float(e.time_s)) for phase, e in order[:3]]
    found = float(order[1][1].time_s) / float(order[0][1].time_s) - 1
    assert found == pytest.approx(margin, abs=0.01)
    assert (found > order[0][1].band) is decided


@pytest.mark.parametrize(
    ("batches", "weights", "objective", "prefill", "decode"),
    [
        ((1, 512), "bfloat16", "throughput", "wg-xyz/batch", "ws2d/batch"),
        ((1, 512), "int8", "throughput", "wg-xyz/batch", "ws2d/batch"),
        ((1, 1), "int8", "latency", "ws2d/heads", "ws2d/heads"),
    ],
)
def test_a_whole_search_makes_the_papers_choices(
    batches: tuple[int, int], weights: str, objective: str, prefill: str, decode: str
):
    """Of all meshes, groups and chunks; prompts are 64 tokens shorter than the paper's."""
    demand = Demand(1984, 64, objective=Objective(objective))
    space = Space(batches=batches, weights=(WEIGHTS[weights],), max_replicas=1)
    best = search(named_config("palm-540b"), slice_of("v4:4x4x4"), demand, space).best[0]
    assert (str(best.option.prefill), str(best.option.decode)) == (prefill, decode)
    assert best.batch == batches[1]


def test_the_best_keeps_its_limits_and_fits():
    answer = found(Demand(4000, 500, tpot_s=0.05))
    assert answer.verdict is Verdict.OK
    for one in (*answer.best, *answer.front):
        assert one.tpot_s <= 0.05 and one.free_bytes >= 0
    rates = [one.tokens_per_s for one in answer.best]
    assert rates == sorted(rates, reverse=True)


def test_a_candidate_is_what_its_steps_take():
    demand = Demand(4000, 500, tpot_s=0.05)
    answer = found(demand)
    best = answer.best[0]
    steps = best.steps(LLAMA, demand)
    turns = -(-4000 // best.chunk)
    prompt_s = turns * float(steps["prefill"].time_s)
    step_s = float(steps["decode"].time_s)
    # Sizes that both phases pad to may be a little larger than those of one.
    assert best.tpot_s == pytest.approx(step_s + best.batch * prompt_s / best.group / 500, rel=0.02)
    assert best.ttft_s == pytest.approx(prompt_s + (turns - 1) * step_s, rel=0.02)


def test_a_pipeline_is_what_its_stages_take():
    demand = Demand(1000, 200)
    gpus, space = slice_of("h100:2x8"), Space(max_replicas=1, max_stages=2)
    answer = search(LLAMA, gpus, demand, space)
    best = answer.best[0]
    # Between hosts activations of a token are less to send than its sums.
    assert best.option.stages == 2 and best.option.part.shape == (1, 8)
    assert best.option.not_run() == ["layers in 2 stages"]
    assert best.requests_per_s > 1.1 * found_on(gpus, demand).requests_per_s
    steps = best.steps(LLAMA, demand)
    turns = -(-1000 // best.chunk)
    stage_s, chunk_s = (float(steps[name].time_s) for name in ("decode", "prefill"))
    request_s = turns * chunk_s / best.group + 200 * stage_s / (best.batch / 2)
    assert best.requests_per_s == pytest.approx(1 / request_s, rel=0.02)
    assert best.tpot_s > 2 * stage_s
    assert best.ttft_s == pytest.approx((turns + 1) * chunk_s + (turns - 1) * stage_s, rel=0.02)
    # Of 80 layers a stage has 40, and keys and values of both batches.
    assert stage_of(LLAMA, 2).num_layers == 40
    memory = steps["decode"].memory
    assert memory.kv_bytes == best.batch * 1200 * 2 * 8 * 128 * 2 * 40 / 8
    assert best.free_bytes <= memory.free_bytes


def found_on(on: ChipSlice, demand: Demand) -> Candidate:
    """Returns the best without stages."""
    return search(LLAMA, on, demand, Space(max_replicas=1)).best[0]


@pytest.mark.parametrize(("layers", "stages", "longest"), [(80, 4, 20), (118, 4, 30), (42, 4, 12)])
def test_layers_are_dealt_out_pattern_by_pattern(layers, stages, longest):
    name = {80: "llama-3-70b", 118: "palm-540b", 42: "gemma-2-9b"}[layers]
    config = named_config(name)
    assert config.num_layers == layers
    assert stage_of(config, stages).num_layers == longest


def test_no_layout_of_any_mesh_is_better():
    """Without leaving out meshes that only rename chips, the best is the same."""
    demand = Demand(1000, 200)
    space = Space(batches=(1, 16), max_replicas=1)
    answer = search(named_config("llama-3-8b"), slice_of("v5e:2x4"), demand, space)
    best = 0.0
    config = named_config("llama-3-8b")
    for x in (1, 2, 4, 8):
        for y in (1, 2, 4, 8):
            if 8 % (x * y):
                continue
            one = answer.best[0]
            option = one.option
            for heads in Heads:
                from jaxserve.partitioning.estimate import Coster

                sizes = {"x": x, "y": y, "z": 8 // x // y}
                phase = PhaseLayout(Ffn.WS2D, heads)
                made = Coster.of(config, phase, option.part, sizes)
                step = float(made.estimate(16, 1, 1100, 1200).time_s)
                prompt = float(made.estimate(16, 1000, 0, 1000).time_s)
                best = max(best, 1 / (prompt / 16 + 200 * step / 16))
    assert answer.best[0].requests_per_s >= best * (1 - 1e-9)


def test_the_front_has_no_point_that_another_beats():
    front = found(Demand(1000, 200)).front
    assert len(front) > 3
    tpots = [one.tpot_s for one in front]
    rates = [one.tokens_per_s for one in front]
    assert tpots == sorted(tpots) and rates == sorted(rates)


def test_what_does_not_fit_is_short_of_bytes():
    answer = search(named_config("palm-540b"), SMALL, Demand(1000, 200))
    assert answer.verdict is Verdict.DOES_NOT_FIT
    # 540 billion weights in two bytes over 16 chips of 16 GB, and a little more.
    assert answer.short["bytes"] == pytest.approx(540.35e9 * 2 / 16 - 16e9, rel=0.05)
    assert "GB short" in answer.why and "fits, but" not in answer.why


def test_what_is_too_slow_is_short_of_milliseconds():
    answer = found(Demand(4000, 500, ttft_s=0.01, tpot_s=0.05))
    assert answer.verdict is Verdict.TOO_SLOW
    assert answer.nearest is not None
    over = answer.nearest.ttft_s - 0.01
    assert answer.short["ttft_ms"] == pytest.approx(over * 1e3)
    assert "ms too late" in answer.why and "GB" not in answer.why


def test_a_rate_beyond_capacity_is_short_of_requests():
    answer = found(Demand(4000, 500, rate=100.0))
    assert answer.verdict is Verdict.TOO_SLOW
    assert 90 < answer.short["requests_per_s"] < 100


def test_waiting_grows_with_the_load():
    times = [
        found(Demand(1000, 200, rate=rate, objective=Objective.LATENCY)).best[0].ttft_s
        for rate in (0.1, 1.0)
    ]
    assert times[0] < times[1]


def test_latency_and_throughput_are_opposed():
    fast, many = (
        found(Demand(1000, 200, objective=objective)).best[0]
        for objective in (Objective.LATENCY, Objective.THROUGHPUT)
    )
    assert fast.tpot_s < many.tpot_s and fast.tokens_per_s < many.tokens_per_s
    assert fast.batch < many.batch


def test_smaller_weights_serve_more():
    rates = [
        found(Demand(4000, 500, tpot_s=0.05), Space(weights=(WEIGHTS[name],))).best[0].tokens_per_s
        for name in ("bfloat16", "int8", "int4")
    ]
    assert rates == sorted(rates)


@pytest.mark.parametrize(
    ("weights", "kv", "lacking"),
    [
        ("bfloat16", "bfloat16", []),
        ("int8", "bfloat16", []),
        ("int4", "bfloat16", ["weights in int4"]),
        ("int8", "float8_e4m3fn", []),
        ("int8", "int4", ["keys and values in int4"]),
    ],
)
def test_what_the_runtime_lacks_is_said(weights: str, kv: str, lacking: list[str]):
    space = Space(weights=(WEIGHTS[weights],), kv=(KV[kv],), max_replicas=1)
    assert found(Demand(1000, 200), space).best[0].option.not_run() == lacking


def test_prefill_may_have_chips_of_its_own():
    space = Space(serving=(Serving.DISAGGREGATED,))
    answer = search(LLAMA, slice_of("v4:4x4x4"), Demand(4000, 500, tpot_s=0.05), space)
    best = answer.best[0]
    option = best.option
    chips = option.replicas * option.part.num_chips
    chips += option.prefill_replicas * option.prefill_part.num_chips
    assert chips <= 64
    assert option.not_run() == ["prefill on chips of its own"]
    # Decode does not wait for prompts.
    step = best.steps(LLAMA, answer.demand)["decode"]
    assert best.tpot_s == pytest.approx(float(step.time_s), rel=1e-6)


def test_copies_of_the_model_share_the_load():
    small = search(named_config("llama-3-8b"), SMALL, Demand(1000, 200)).best[0]
    assert small.option.replicas > 1
    assert small.option.replicas * small.option.part.num_chips == 16


def test_cost_follows_from_the_price():
    best = found(Demand(4000, 500, objective=Objective.COST)).best[0]
    dollars_per_s = 16 * 1.20 / 3600
    assert best.usd_per_million == pytest.approx(dollars_per_s / best.tokens_per_s * 1e6)


def test_pruned_layouts_are_copies_of_others():
    for laid in meshes(slice_of("v5e:4x4")):
        kinds = list(layouts(laid, Space()))
        assert len(kinds) == len(set(kinds))
        if laid.sizes["x"] == 1:
            assert all(heads.heads is not Heads.SEQUENCE for pair in kinds for heads in pair)


def test_256_chips_are_searched_in_seconds():
    began = time.process_time()
    answer = found(Demand(4000, 500, tpot_s=0.05), on="v5e:16x16")
    assert answer.verdict is Verdict.OK
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    ("demand", "on", "message"),
    [
        (Demand(8000, 500), "v5e:4x4", "the model's context is 8192; ask for fewer"),
        (Demand(100, 10, objective=Objective.COST), "b200:8", "no price is known of b200"),
    ],
)
def test_what_cannot_be_asked_is_refused(demand: Demand, on: str, message: str):
    with pytest.raises(UsageError, match=message):
        found(demand, on=on)


def test_a_choice_without_a_meaning_there_is_refused():
    space = Space(heads=(Heads.BATCH,))
    with pytest.raises(UsageError, match=r"on v5e:1x1 none of .*batch differs"):
        search(named_config("llama-3.2-1b"), slice_of("v5e:1x1"), Demand(100, 10), space)


def test_what_does_not_fit_is_short_of_all_that_is_needed():
    """With as many bytes more, it fits."""
    answer = search(LLAMA, slice_of("v5e:2x2"), Demand(4000, 500), Space(batches=(1, 1)))
    assert answer.verdict is Verdict.DOES_NOT_FIT
    chip = slice_of("v5e:2x2").chip
    needed = answer.short["device_bytes"] + answer.short["bytes"]
    # A share of a larger memory is left free, too.
    whole = (needed - RESERVED_SHARE * answer.short["device_bytes"]) / (1 - RESERVED_SHARE)
    for more, verdict in ((0.999, Verdict.DOES_NOT_FIT), (1.001, Verdict.OK)):
        size = replace(chip.values["hbm_bytes"], number=more * whole * chip.devices)
        large = replace(chip, values={**chip.values, "hbm_bytes": size})
        on = ChipSlice(large, (2, 2))
        assert search(LLAMA, on, Demand(4000, 500), Space(batches=(1, 1))).verdict is verdict


def test_a_rate_that_is_carried_asks_for_no_more():
    config, demand = named_config("llama-3-8b"), Demand(1000, 200, rate=2.0)
    cheap = search(config, slice_of("v5e:2x4"), replace(demand, objective=Objective.COST)).best[0]
    assert cheap.ttft_s < 2


def test_a_width_that_never_divides_is_refused():
    odd = replace(LLAMA, embed_dim=8191)
    with pytest.raises(UsageError, match="embed_dim=8191 divides over no mesh"):
        search(odd, slice_of("v5e:2x2"), Demand(100, 10), Space(max_replicas=1))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"input_tokens": 0}, "input_tokens=0 must be at least 1"),
        ({"ttft_s": 0.0}, "ttft_s=0.0 must be positive"),
        ({"rate": -1.0}, "rate=-1.0 must be positive"),
    ],
)
def test_a_contradictory_demand_is_refused(fields: dict[str, float], message: str):
    with pytest.raises(UsageError, match=message):
        Demand(**({"input_tokens": 10, "output_tokens": 10} | fields))  # type: ignore[arg-type]
