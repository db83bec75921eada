"""The questions that a planner answers, in names and plain numbers.

search("llama-3-70b", "v5e:4x4", input_tokens=4000, output_tokens=500, tpot_s=0.05)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxserve.config import ModelConfig
from jaxserve.errors import UnsupportedError, UsageError
from jaxserve.partitioning.demand import Demand, Objective, Serving, Space
from jaxserve.partitioning.dtypes import stored
from jaxserve.partitioning.estimate import Coster
from jaxserve.partitioning.found import Verdict
from jaxserve.partitioning.hardware import ChipSlice, chips, shapes, slice_of
from jaxserve.partitioning.layout import Ffn, Heads, PhaseLayout
from jaxserve.partitioning.memory import Kept
from jaxserve.partitioning.memory import max_context as longest_context
from jaxserve.partitioning.meshes import meshes
from jaxserve.partitioning.plan import MeshPlan
from jaxserve.partitioning.search import search as search_slice
from jaxserve.partitioning.work import Share
from jaxserve.planner.answers import Plan, Room, StepPlan
from jaxserve.planner.model import plan_config

Model = str | Path | ModelConfig


def search(
    model: Model,
    on: str | ChipSlice,
    *,
    input_tokens: int,
    output_tokens: int,
    ttft_s: float | None = None,
    tpot_s: float | None = None,
    rate: float | None = None,
    objective: str = "throughput",
    batch: tuple[int, int] = (1, 512),
    weights: Sequence[str] = ("bfloat16",),
    kv: Sequence[str] = ("bfloat16",),
    attention: Sequence[str] = (),
    layout: Sequence[str] = (),
    disaggregate: bool = False,
    max_replicas: int = 256,
    max_stages: int = 1,
    top: int = 5,
    hardware: Path | None = None,
) -> Plan:
    """Returns the best ways to serve a load on a slice, as estimates.

    Args:
        model: a name, a directory or config.json, or an architecture.
        on: the slice, as "v5e:4x4".
        input_tokens, output_tokens: of a request.
        ttft_s, tpot_s, rate, objective: see `Demand`.
        batch, weights, kv, max_replicas, max_stages: see `Space`.
        attention, layout: names to choose from; all by default. A layout is that of prefill.
        disaggregate: prefill may have chips of its own.
        top: answers.
        hardware: a file of more chips.

    Raises:
        UsageError: a name is not known, or the question contradicts itself.
    """
    config = plan_config(model)
    where = _slice(on, hardware)
    demand = Demand(
        input_tokens, output_tokens, ttft_s, tpot_s, rate, _named(Objective, objective, "objective")
    )
    space = _space(batch, weights, kv, attention, layout, disaggregate, max_replicas, max_stages)
    return Plan(str(_label(model)), search_slice(config, where, demand, space, top))


def size(
    model: Model,
    *,
    rate: float,
    input_tokens: int,
    output_tokens: int,
    chip: Sequence[str] | str = (),
    ttft_s: float | None = None,
    tpot_s: float | None = None,
    max_chips: int = 64,
    weights: Sequence[str] = ("bfloat16",),
    kv: Sequence[str] = ("bfloat16",),
    batch: tuple[int, int] = (1, 512),
    hardware: Path | None = None,
) -> list[Plan]:
    """Returns plans of slices that carry a rate within its limits, the cheapest first.

    Of every chip the smallest slice that does is given; chips without a price are left out.

    Raises:
        UsageError: no slice does.
    """
    config, known = plan_config(model), chips(hardware)
    names = [chip] if isinstance(chip, str) else list(chip) or list(known)
    demand = Demand(input_tokens, output_tokens, ttft_s, tpot_s, rate, Objective.COST)
    space = _space(batch, weights, kv, (), (), False, 256)
    found: list[Plan] = []
    others: list[Plan] = []
    for name in names:
        if name not in known:
            raise UsageError(f"chip {name!r} is not known; known: {', '.join(known)}")
        if known[name].usd_hour is None:
            if len(names) == 1:
                raise UsageError(f"no price is known of {name}; add usd_hour with --hardware FILE")
            continue
        for on in shapes(known[name], max_chips):
            plan = Plan(str(_label(model)), search_slice(config, on, demand, space, 3))
            others.append(plan)
            if plan.found.verdict is Verdict.OK:
                found.append(plan)
                break
    if not found:
        nearest = min(others, key=lambda plan: plan.found.worst_miss, default=None)
        why = "" if nearest is None else f"; nearest is {nearest.found.on}: {nearest.found.why}"
        raise UsageError(f"no slice of up to {max_chips} chips carries {rate} requests/s{why}")
    return sorted(found, key=lambda plan: plan.found.on.usd_hour or 0.0)


def estimate(
    model: Model,
    on: str | ChipSlice,
    *,
    phase: str = "decode",
    batch: int = 1,
    context: int = 2048,
    weights: str = "bfloat16",
    kv: str = "bfloat16",
    layout: str | None = None,
    attention: str = "heads",
    mesh: str | None = None,
    hardware: Path | None = None,
) -> StepPlan:
    """Returns the estimated time and memory of one step, term by term.

    Args:
        phase: "decode", one token after `context` others; or "prefill", `context` tokens at once.
        layout: "ws1d", "ws2d", ...; by default the fastest.
        mesh: devices along x, y and z; by default those with which the step is fastest.

    Raises:
        UsageError: a name is not known, or the model does not divide over the mesh.
    """
    config, where = plan_config(model), _slice(on, hardware)
    if phase not in ("prefill", "decode"):
        raise UsageError(f"phase={phase!r} is not known; use prefill or decode")
    for name, value in (("batch", batch), ("context", context)):
        if value < 1:
            raise UsageError(f"{name}={value} must be at least 1")
    kept = Kept(stored(weights, "weights"), stored(kv, "kv"))
    ffns = list(Ffn) if layout is None else [_named(Ffn, layout, "layout")]
    heads = _named(Heads, attention, "attention")
    new, before = (context, 0) if phase == "prefill" else (1, context)
    best: StepPlan | None = None
    refused: UsageError | None = None
    for sizes in _meshes(where, mesh):
        for ffn in ffns:
            try:
                made = Coster.of(config, PhaseLayout(ffn, heads), where, sizes, kept)
            except UsageError as error:
                refused = error
                continue
            found = StepPlan(str(_label(model)), config, made, phase, batch, new, before)
            if best is None or found.rank < best.rank:
                best = found
    if best is None:
        assert refused is not None
        raise refused
    return best


def max_context(
    model: Model,
    on: str | ChipSlice,
    *,
    batch: int,
    attention: str = "heads",
    kv: str = "bfloat16",
    hbm_fraction: float = 0.3,
    mesh: str | None = None,
    hardware: Path | None = None,
) -> Room:
    """Returns the longest context whose keys and values take a share of the memory.

    Args:
        hbm_fraction: that share.
        mesh: devices along x, y and z; by default those that keep the most.

    Raises:
        UsageError: a name is not known, or the share is not between 0 and 1.
    """
    config, where = plan_config(model), _slice(on, hardware)
    if not 0 < hbm_fraction <= 1:
        raise UsageError(f"hbm_fraction={hbm_fraction} must be above 0 and at most 1")
    if batch < 1:
        raise UsageError(f"batch={batch} must be at least 1")
    heads = _named(Heads, attention, "attention")
    kept, budget = Kept(kv=stored(kv, "kv")), hbm_fraction * where.device_hbm_bytes
    rooms: list[Room] = []
    refused: UsageError | None = None
    for sizes in _meshes(where, mesh):
        try:
            share = Share.of(config, PhaseLayout(Ffn.WS2D, heads), sizes)
        except UsageError as error:
            refused = error
            continue
        tokens = longest_context(share, kept, batch=batch, budget_bytes=budget)
        rooms.append(Room(where, MeshPlan(**sizes), heads, batch, hbm_fraction, budget, tokens))
    if not rooms:
        assert refused is not None
        raise refused
    return max(rooms, key=lambda room: room.max_context_tokens)


def _meshes(on: ChipSlice, mesh: str | None) -> list[dict[str, int]]:
    if mesh is None:
        return [laid.sizes for laid in meshes(on)]
    return [dict(MeshPlan.of(mesh).sizes)]


def _space(
    batch: tuple[int, int],
    weights: Sequence[str],
    kv: Sequence[str],
    attention: Sequence[str],
    layout: Sequence[str],
    disaggregate: bool,
    max_replicas: int,
    max_stages: int = 1,
) -> Space:
    heads = tuple(_named(Heads, name, "attention") for name in attention) or tuple(Heads)
    prefill = tuple(_named(Ffn, name, "layout") for name in layout) or tuple(Ffn)
    return Space(
        batches=batch,
        weights=tuple(stored(name, "weights") for name in weights),
        kv=tuple(stored(name, "kv") for name in kv),
        prefill=prefill,
        heads=heads,
        serving=tuple(Serving) if disaggregate else (Serving.COLOCATED,),
        max_replicas=max_replicas,
        max_stages=max_stages,
    )


def check_expert(expert: int) -> None:
    """Raises an UnsupportedError for an axis that is neither carried out nor priced."""
    if expert != 1:
        raise UnsupportedError(
            f"expert={expert} is not supported: the mesh has the axis in name alone, and what it "
            "would send is not known before a layout carries it out; leave it at 1: a model with "
            "experts is planned with a part of each on every device, which is how it is served"
        )


def _slice(on: str | ChipSlice, hardware: Path | None) -> ChipSlice:
    return on if isinstance(on, ChipSlice) else slice_of(on, chips(hardware))


def _label(model: Model) -> str | Path:
    return model.family if isinstance(model, ModelConfig) else model


def _named(kind: Any, value: str, option: str) -> Any:
    try:
        return kind(value)
    except ValueError:
        raise UsageError(f"{option}={value!r} is not known; use one of {', '.join(kind)}") from None
