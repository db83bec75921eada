"""Which layout serves a load best on a slice.

    found = search(config, slice_of("v5e:4x4"), Demand(4000, 500, tpot_s=0.05))
    found.verdict, found.short                     # what is missing where nothing will do
    found.best[0].decode, found.best[0].tpot_s     # the best few, and found.front: Pareto's

Every mesh of the slice and of its equal parts, every pair of layouts, dtype, batch, chunk and group
of prompts is judged: layouts are priced once, all their batches and dtypes at once. What cannot fit
is left out before its communication is derived, and what a bound rules out before its batches and
groups are paired. The times are estimates; see `estimate`. No JAX.

A replica may be a pipeline: P stages of layers, on chips of their own, with P batches on their way.
A token then takes P steps of a stage, and the slowest stage, priced with table and head, sets the
pace.

A replica that runs `batch` sequences spends its time on decoding and on the prompts of those that
come after: a request costs S/g + O d/B seconds of it, with S for a group of g prompts, O output
tokens and d for a decode step. Waiting before prefill is that of a queue with random arrivals and
equal service times: r S / 2 (1 - r) at load r.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from jaxserve.config import ModelConfig
from jaxserve.errors import UsageError
from jaxserve.partitioning.bench import Asked, Bench
from jaxserve.partitioning.demand import FULL, Demand, Objective, Serving, Space
from jaxserve.partitioning.disaggregate import disaggregated
from jaxserve.partitioning.estimate import Coster, Estimate
from jaxserve.partitioning.found import Candidate, Found, Verdict, stage_of
from jaxserve.partitioning.hardware import ChipSlice, Fabric
from jaxserve.partitioning.judge import Judge
from jaxserve.partitioning.layout import PhaseLayout
from jaxserve.partitioning.memory import Kept
from jaxserve.partitioning.meshes import Laid, layouts, meshes
from jaxserve.partitioning.points import Option, Point, Points

_ROUNDING = 1e-9
"""By how much sums in another order may differ."""


def search(
    config: ModelConfig,
    on: ChipSlice,
    demand: Demand,
    space: Space | None = None,
    top: int = 5,
) -> Found:
    """Returns the best ways to serve a load on a slice.

    Raises:
        UsageError: requests are longer than the model's context, the model's width divides over no
            mesh of the slice, or no price is known where cost is the objective.
    """
    space = space or Space()
    demand.check(config)
    if top < 1:
        raise UsageError(f"top={top} must be at least 1")
    if demand.objective is Objective.COST and on.usd_hour is None:
        raise UsageError(
            f"no price is known of {on.chip.name}; add usd_hour to its table with --hardware FILE, "
            "or ask for another objective"
        )
    judge, asked = Judge(demand, top), Asked.of(demand, space)
    store: dict[tuple[int, int], list[Bench]] = {}
    if Serving.COLOCATED in space.serving:
        _colocated(config, on, asked, judge, store)
    if Serving.DISAGGREGATED in space.serving:
        disaggregated(
            config, on, asked, judge, lambda pieces: _benches(config, on, asked, store, pieces, 1)
        )
    if judge.least_short is None:
        every = (laid for _, _, part in _parts(on, space) for laid in meshes(part))
        if not any(True for laid in every for _ in layouts(laid, space)):
            names = ", ".join([*space.prefill, *space.heads])
            raise UsageError(
                f"on {on.name} none of {names} differs from simpler layouts; leave --layout and "
                "--attention out, or use a larger slice"
            )
        raise UsageError(
            f"embed_dim={config.embed_dim} divides over no mesh of {on.name}; use another slice"
        )
    return _judged(config, on, demand, judge)


def _benches(
    config: ModelConfig,
    on: ChipSlice,
    asked: Asked,
    store: dict[tuple[int, int], list[Bench]],
    pieces: int,
    stages: int,
) -> list[Bench]:
    """Returns the meshes of an equal part of a slice, made when they are first asked for."""
    if (pieces, stages) not in store:
        part = on.part(pieces)
        made = [] if part is None else meshes(part)
        one = stage_of(config, stages)
        store[pieces, stages] = [Bench(one, laid, asked, stages) for laid in made]
    return store[pieces, stages]


def _colocated(
    config: ModelConfig,
    on: ChipSlice,
    asked: Asked,
    judge: Judge,
    store: dict[tuple[int, int], list[Bench]],
) -> None:
    """Judges deployments whose chips all prefill and decode."""
    for replicas, stages, part in _parts(on, asked.space):
        for bench in _benches(config, on, asked, store, replicas * stages, stages):
            for prefill, decode in layouts(bench.laid, asked.space):
                free = bench.free_at_least(decode)
                if free is None:
                    continue
                if (free < 0).any():
                    judge.seen(free[free < 0])
                rows = np.flatnonzero(free >= 0)
                if not len(rows):
                    continue
                options = [
                    Option(
                        replicas,
                        part,
                        bench.laid.network,
                        prefill,
                        decode,
                        asked.each[row],
                        Serving.COLOCATED,
                        stages=stages,
                    )
                    for row in rows.tolist()
                ]
                _judge_pair(bench, options, rows, judge)


def _parts(on: ChipSlice, space: Space) -> Iterator[tuple[int, int, ChipSlice]]:
    """Yields (replicas, stages of each, the slice of a stage)."""
    for replicas in _powers(min(on.num_chips, space.max_replicas)):
        for stages in _powers(min(on.num_chips // replicas, space.max_stages)):
            if (part := on.part(replicas * stages)) is not None:
                yield replicas, stages, part


def _powers(most: int) -> list[int]:
    return [2**i for i in range(most.bit_length())]


def _handed_s(part: ChipSlice, config: ModelConfig, kept: Kept, tokens: Any) -> Any:
    """Returns the seconds that activations take to the next stage, a share from each chip."""
    sides = part.axes
    if not sides:  # one chip
        link, hop_s = part.chip.number("link"), part.chip.number("hop_s")
    else:
        link, hop_s = min(side.bandwidth for side in sides), max(side.hop_s for side in sides)
    if part.chip.fabric is Fabric.SWITCH:
        link = part.chip.number("dcn")
    return tokens * config.embed_dim * kept.activation_bytes / part.num_chips / link + hop_s


def ranked(
    config: ModelConfig,
    laid: Laid,
    phases: Iterable[PhaseLayout],
    kept: Kept,
    *,
    batch: int,
    new: int = 1,
    context: int = 0,
) -> list[tuple[PhaseLayout, Estimate]]:
    """Returns layouts of one step on one mesh, the fastest first; memory is not asked."""
    found = []
    for phase in phases:
        try:
            made = Coster.of(config, phase, laid.network.on, laid.sizes, kept)
        except UsageError:
            continue
        found.append((phase, made.estimate(batch, new, context)))
    return sorted(found, key=lambda pair: float(pair[1].time_s))


def _judge_pair(bench: Bench, options: list[Option], rows: np.ndarray, judge: Judge) -> None:
    """Judges all batches, groups and chunks of two layouts.

    Args:
        rows: int64[D], the dtypes of the options among those that were asked for.
    """
    first, demand = options[0], bench.asked.demand
    made, done = bench.prefill(first.prefill), bench.decode(first.decode)
    if not len(done.batch):
        return
    stages, replicas = bench.stages, first.replicas
    whole = done.batch * stages
    steps = -(-demand.input_tokens // made.chunk)
    handed = [
        _handed_s(first.part, bench.config, first.kept, tokens) if stages > 1 else 0.0
        for tokens in (done.batch, made.batch * made.chunk)
    ]
    stage_s, chunk_s = done.time_s[rows] + handed[0], made.time_s[rows] + handed[1]
    # Of one stage, which sets the pace; a prompt's last piece then goes through the others.
    prompt_s = steps * chunk_s
    step_s = stages * stage_s
    # What no batch and no group can beat.
    least_s = (prompt_s / made.batch).min(axis=1)
    request_s = least_s + demand.output_tokens * (step_s / whole).min(axis=1)
    most = (1 + _ROUNDING) / request_s * replicas
    wanted = judge.needs(step_s.min(axis=1), prompt_s.min(axis=1), most)
    if not wanted.any():
        judge.priced += len(rows) * whole.size * made.batch.size
        return
    sequences, group = whole[:, None], made.batch
    prompt_s, chunk_s = prompt_s[:, None, :], chunk_s[:, None, :]
    step_s, stage_s = step_s[:, :, None], stage_s[:, :, None]
    request_s = prompt_s / group + demand.output_tokens * step_s / sequences
    tpot_s = step_s + sequences * prompt_s / group / demand.output_tokens
    ttft_s = prompt_s + (stages - 1) * chunk_s + (steps - 1) * stage_s
    capacity = 1 / request_s
    if demand.rate is not None:
        load = np.minimum(demand.rate / replicas / capacity, 0.999)
        ttft_s = ttft_s + load * prompt_s / (2 * (1 - load))
        # A group of prompts waits for its last.
        ttft_s = ttft_s + (group - 1) / 2 / (demand.rate / replicas)
    # Steps run one after another: the larger one's temporaries are what is needed.
    taken = np.maximum(done.other_bytes[rows][:, :, None], made.other_bytes[rows][:, None, :])
    free = bench.device_bytes - taken - stages * done.kv_bytes[rows][:, :, None]
    usable = group <= sequences
    judge.seen(np.where(usable, free, -np.inf))
    judge.take(
        Points.of(
            options,
            np.where(usable, free, -1.0),
            sequences,
            group,
            made.chunk,
            ttft_s,
            tpot_s,
            capacity * replicas,
        )
    )


def _judged(config: ModelConfig, on: ChipSlice, demand: Demand, judge: Judge) -> Found:
    def found(verdict: Verdict, **fields: Any) -> Found:
        every: dict[str, Any] = {"best": (), "front": (), "short": {}, "nearest": None}
        return Found(config, on, demand, verdict, **(every | fields), priced=judge.priced)

    def candidate(point: Point) -> Candidate:
        return _candidate(point, on, demand)

    if not judge.fits:
        short = {"bytes": judge.least_short or 0.0, "device_bytes": on.device_hbm_bytes}
        return found(Verdict.DOES_NOT_FIT, short=short)
    if not judge.best:
        assert judge.nearest is not None
        short = _short(judge.nearest, demand)
        return found(Verdict.TOO_SLOW, short=short, nearest=candidate(judge.nearest))
    best = tuple(candidate(point) for _, point in judge.best)
    return found(Verdict.OK, best=best, front=tuple(map(candidate, judge.front)))


def _short(point: Point, demand: Demand) -> dict[str, float]:
    found = {}
    if demand.ttft_s is not None and (over := point.ttft_s - demand.ttft_s) > 0:
        found["ttft_ms"] = over * 1e3
    if demand.tpot_s is not None and (over := point.tpot_s - demand.tpot_s) > 0:
        found["tpot_ms"] = over * 1e3
    if demand.rate is not None and (over := demand.rate - FULL * point.rate) > 0:
        found["requests_per_s"] = over
    return found


def _candidate(point: Point, on: ChipSlice, demand: Demand) -> Candidate:
    tokens = point.rate * demand.output_tokens
    usd = None if on.usd_hour is None else on.usd_hour / 3600 / tokens * 1e6
    return Candidate(
        point.option,
        point.batch,
        point.group,
        point.chunk,
        point.ttft_s,
        point.tpot_s,
        tokens,
        point.rate,
        usd,
        point.free,
    )
