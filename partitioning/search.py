"""Which layout serves a load best on a slice.

    found = search(config, slice_of("v5e:4x4"), Demand(4000, 500, tpot_s=0.05))
    found.verdict, found.short                     # what is missing where nothing will do
    found.best[0].decode, found.best[0].tpot_s     # the best few, and found.front: Pareto's

Every mesh of the slice and of its equal parts, every pair of layouts, dtype, batch, chunk and group
of prompts is priced: layouts once, all their batches at once. What cannot fit is left out before
its communication is derived. The times are estimates; see `estimate`. No JAX.

A replica may be a pipeline: P stages of layers, on chips of their own, with P batches on their way.
A token then takes P steps of a stage, and the slowest stage, priced with table and head, sets the
pace.

A replica that runs `batch` sequences spends its time on decoding and on the prompts of those that
come after: a request costs S/g + O d/B seconds of it, with S for a group of g prompts, O output
tokens and d for a decode step. Waiting before prefill is that of a queue with random arrivals and
equal service times: r S / 2 (1 - r) at load r.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import numpy as np

from jaxserve.config import ModelConfig
from jaxserve.errors import UsageError
from jaxserve.partitioning.demand import Demand, Objective, Serving, Space
from jaxserve.partitioning.disaggregate import disaggregated
from jaxserve.partitioning.efficiency import Efficiency
from jaxserve.partitioning.estimate import Coster, Estimate
from jaxserve.partitioning.hardware import ChipSlice, Fabric
from jaxserve.partitioning.layout import PhaseLayout
from jaxserve.partitioning.memory import Kept, memory_of
from jaxserve.partitioning.meshes import Laid, layouts, meshes
from jaxserve.partitioning.points import Option, Points, joined
from jaxserve.partitioning.traffic import Traffic
from jaxserve.partitioning.work import Share, num_parameters

FULL = 0.9
"""Share of its capacity at which a deployment is taken to be full (assumed)."""


class Verdict(StrEnum):
    """Whether a load can be served, and if not, why."""

    OK = "ok"
    DOES_NOT_FIT = "does not fit"
    TOO_SLOW = "too slow"


@dataclass(frozen=True)
class Candidate:
    """A deployment and what it is estimated to do.

    Attributes:
        option: replicas, mesh, layouts and dtypes.
        batch: sequences of a replica; of the decoding ones where they are apart.
        group, chunk: prompts that prefill together, and tokens of each in a step.
        ttft_s, tpot_s: to the first token, and from one to the next, waiting included.
        tokens_per_s, requests_per_s: of the whole slice when it is full.
        usd_per_million: dollars for a million output tokens; None where prices are not known.
        free_bytes: of a device.
    """

    option: Option
    batch: int
    group: int
    chunk: int
    ttft_s: float
    tpot_s: float
    tokens_per_s: float
    requests_per_s: float
    usd_per_million: float | None
    free_bytes: float

    def steps(self, config: ModelConfig, demand: Demand) -> dict[str, Estimate]:
        """Returns the estimates of a prefill and of a decode step, of a stage where there are."""
        option = self.option
        config = stage_of(config, option.stages)
        both = option.serving is Serving.COLOCATED
        first = Coster.of(
            config,
            option.prefill,
            option.prefill_part,
            option.prefill_sizes,
            option.kept,
            option.decode if both else None,
        )
        later = Coster.of(
            config,
            option.decode,
            option.part,
            option.sizes,
            option.kept,
            option.prefill if both else None,
        )
        middle = demand.input_tokens + demand.output_tokens // 2
        before = (demand.input_tokens - self.chunk) // 2
        whole = demand.context_tokens
        decode = later.estimate(self.batch // option.stages, 1, middle, whole)
        prefill = first.estimate(self.group, self.chunk, before, demand.input_tokens)
        # The batches that are in other stages have keys and values here, too; and while some
        # prompts are read, all other sequences have theirs.
        kept = option.stages * decode.memory.kv_bytes
        decode = replace(decode, memory=replace(decode.memory, kv_bytes=kept))
        if both:
            prefill = replace(prefill, memory=replace(prefill.memory, kv_bytes=kept))
        return {"prefill": prefill, "decode": decode}


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        config, on, demand: what was asked.
        verdict: whether there is an answer.
        best: the best few, the best first.
        front: of all that will do, those that no other beats in both time per token and tokens
            per second, the fastest first.
        short: where there is no answer, what is missing: bytes of a device, or milliseconds, or
            requests per second.
        nearest: where there is no answer, the one that misses by the least.
        priced: deployments that were priced.
    """

    config: ModelConfig = field(repr=False)
    on: ChipSlice
    demand: Demand
    verdict: Verdict
    best: tuple[Candidate, ...]
    front: tuple[Candidate, ...]
    short: dict[str, float]
    nearest: Candidate | None
    priced: int

    @property
    def why(self) -> str:
        """Returns in words what is missing."""
        match self.verdict:
            case Verdict.OK:
                return ""
            case Verdict.DOES_NOT_FIT:
                missing, has = self.short["bytes"], self.short["device_bytes"]
                return (
                    f"does not fit: at best {(has + missing) / 1e9:,.2f} GB are needed on a device "
                    f"of {self.on.name}, which has {has / 1e9:,.2f} GB: {missing / 1e9:,.2f} GB "
                    "short; use more or larger chips, fewer tokens, or smaller dtypes"
                )
        parts = []
        if "ttft_ms" in self.short:
            parts.append(f"the first token comes {self.short['ttft_ms']:,.1f} ms too late")
        if "tpot_ms" in self.short:
            parts.append(f"a token takes {self.short['tpot_ms']:,.1f} ms too long")
        if "requests_per_s" in self.short:
            parts.append(f"{self.short['requests_per_s']:,.3f} requests/s short")
        return f"too slow, at best: {', '.join(parts)}; it fits, but not within these limits"


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
    tally = _Tally(on.device_hbm_bytes)
    found: list[Points] = []
    if Serving.COLOCATED in space.serving:
        found += _colocated(config, on, demand, space, tally)
    if Serving.DISAGGREGATED in space.serving:
        found += disaggregated(config, on, demand, space, tally.seen)
    if not found and tally.least_short is None:
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
    points = joined(found)
    return _judged(config, on, demand, points, tally, top)


@dataclass
class _Tally:
    """What was too large, gathered by the search alone.

    Attributes:
        device_bytes: memory of a device.
        least_short: fewest bytes that anything lacked.
    """

    device_bytes: float
    least_short: float | None = None

    def seen(self, free: Any) -> None:
        """Notes what was left free, below zero where something did not fit."""
        short = float(-np.max(free))
        if self.least_short is None or short < self.least_short:
            self.least_short = short


def _colocated(
    config: ModelConfig, on: ChipSlice, demand: Demand, space: Space, tally: _Tally
) -> Iterator[Points]:
    for replicas, stages, part in _parts(on, space):
        config_of_stage = stage_of(config, stages)
        for laid in meshes(part):
            bench = _Bench(config_of_stage, laid, stages)
            for prefill, decode in layouts(laid, space):
                for kept in _kept(space):
                    if not bench.may_fit(decode, kept, demand, space, tally):
                        continue
                    option = Option(
                        replicas,
                        part,
                        laid.network,
                        prefill,
                        decode,
                        kept,
                        Serving.COLOCATED,
                        stages=stages,
                    )
                    first, later = (bench.coster(phase, kept) for phase in (prefill, decode))
                    yield _priced(option, first, later, demand, space, tally)


def _parts(on: ChipSlice, space: Space) -> Iterator[tuple[int, int, ChipSlice]]:
    """Yields (replicas, stages of each, the slice of a stage)."""
    for replicas in _powers(min(on.num_chips, space.max_replicas)):
        for stages in _powers(min(on.num_chips // replicas, space.max_stages)):
            if (part := on.part(replicas * stages)) is not None:
                yield replicas, stages, part


def _powers(most: int) -> list[int]:
    return [2**i for i in range(most.bit_length())]


def stage_of(config: ModelConfig, stages: int) -> ModelConfig:
    """Returns the longest stage of a model whose layers are dealt out, pattern by pattern."""
    period = len(config.pattern)
    turns = -(-config.num_layers // period // stages)
    return replace(config, layers=config.layers[: turns * period])


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


def _kept(space: Space) -> list[Kept]:
    return [Kept(weights, kv) for weights in space.weights for kv in space.kv]


class _Bench:
    """A mesh, and the layouts that were made ready on it; the search alone writes it."""

    def __init__(self, config: ModelConfig, laid: Laid, stages: int = 1) -> None:
        self.config, self.laid, self.stages = config, laid, stages
        self._shares: dict[PhaseLayout, Share | None] = {}
        self._costers: dict[PhaseLayout, Coster] = {}

    def share(self, phase: PhaseLayout) -> Share | None:
        """Returns a device's share; None where the model does not divide."""
        if phase not in self._shares:
            try:
                self._shares[phase] = Share.of(self.config, phase, self.laid.sizes)
            except UsageError:
                self._shares[phase] = None
        return self._shares[phase]

    def coster(self, phase: PhaseLayout, kept: Kept) -> Coster:
        """Returns what prices a layout that divides."""
        if phase not in self._costers:
            share = self.share(phase)
            assert share is not None
            traffic = Traffic.of(share.config, phase, self.laid.sizes)
            parameters = num_parameters(self.config, active=True)
            self._costers[phase] = Coster(
                share, traffic, self.laid.network, Kept(), Efficiency.read(), parameters
            )
        return replace(self._costers[phase], kept=kept)

    def may_fit(
        self, decode: PhaseLayout, kept: Kept, demand: Demand, space: Space, tally: _Tally
    ) -> bool:
        """Returns whether weights and the smallest batch go into a device."""
        share = self.share(decode)
        if share is None:
            return False
        on, context = self.laid.network.on, demand.context_tokens
        each = max(space.batches[0] // self.stages, 1)
        memory = memory_of(share, on, kept, batch=each, context=context)
        free = memory.free_bytes - (self.stages - 1) * memory.kv_bytes
        if free < 0:
            tally.seen(free)
        return bool(free >= 0)


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
    bench = _Bench(config, laid)
    found = [
        (phase, bench.coster(phase, kept).estimate(batch, new, context))
        for phase in phases
        if bench.share(phase) is not None
    ]
    return sorted(found, key=lambda pair: float(pair[1].time_s))


def _priced(
    option: Option,
    prefill: Coster,
    decode: Coster,
    demand: Demand,
    space: Space,
    tally: _Tally,
) -> Points:
    """Returns all batches, groups and chunks of a layout."""
    stages = option.stages
    whole = np.array([size for size in space.batch_sizes if size % stages == 0])
    batches = whole // stages
    groups, sizes = _groups_and_chunks(prefill, space, demand.input_tokens)
    steps = -(-demand.input_tokens // sizes)
    middle = demand.input_tokens + demand.output_tokens // 2
    later = decode.estimate(batches, 1, middle, demand.context_tokens)
    first = prefill.estimate(groups, sizes, (demand.input_tokens - sizes) / 2, demand.input_tokens)
    handed = [
        _handed_s(option.part, decode.share.config, option.kept, tokens) if stages > 1 else 0.0
        for tokens in (batches, groups * sizes)
    ]
    stage_s = (np.asarray(later.time_s) + handed[0])[:, None]
    chunk_s = np.asarray(first.time_s) + handed[1]
    # Of one stage, which sets the pace; a prompt's last piece then goes through the others.
    prompt_s = (steps * chunk_s)[None, :]
    sequences, group = whole[:, None], groups[None, :]
    step_s = stages * stage_s
    request_s = prompt_s / group + demand.output_tokens * step_s / sequences
    tpot_s = step_s + sequences * prompt_s / group / demand.output_tokens
    ttft_s = prompt_s + (stages - 1) * chunk_s[None, :] + (steps[None, :] - 1) * stage_s
    capacity = 1 / request_s
    if demand.rate is not None:
        load = np.minimum(demand.rate / option.replicas / capacity, 0.999)
        ttft_s = ttft_s + load * prompt_s / (2 * (1 - load))
        # A group of prompts waits for its last.
        ttft_s = ttft_s + (group - 1) / 2 / (demand.rate / option.replicas)
    # Steps run one after another: the larger one's temporaries are what is needed.
    temporary = [e.memory.total_bytes - e.memory.kv_bytes for e in (later, first)]
    taken = np.maximum(np.asarray(temporary[0])[:, None], np.asarray(temporary[1])[None, :])
    free = option.part.device_hbm_bytes - taken
    free = free - stages * np.asarray(later.memory.kv_bytes)[:, None]
    usable = group <= sequences
    tally.seen(np.where(usable, free, -np.inf))
    return Points.of(
        option,
        np.where(usable, free, -1.0),
        np.broadcast_to(sequences, free.shape),
        np.broadcast_to(group, free.shape),
        np.broadcast_to(sizes[None, :], free.shape),
        ttft_s,
        tpot_s,
        capacity * option.replicas,
    )


def _groups_and_chunks(
    prefill: Coster, space: Space, input_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns how many prompts prefill together, and how many tokens of each in a step."""
    cut = prefill.share.row_cut
    most = space.batches[1]
    groups = sorted({1, *(n for n in (cut, 4 * cut, 16 * cut, 4, 16) if 1 <= n <= most), most})
    pairs = [(group, chunk) for group in groups for chunk in space.chunk_sizes(input_tokens)]
    return np.array([g for g, _ in pairs]), np.array([c for _, c in pairs])


def _judged(
    config: ModelConfig, on: ChipSlice, demand: Demand, points: Points, tally: _Tally, top: int
) -> Found:
    def found(verdict: Verdict, **fields: Any) -> Found:
        every: dict[str, Any] = {"best": (), "front": (), "short": {}, "nearest": None}
        return Found(config, on, demand, verdict, **(every | fields), priced=points.count)

    def candidate(index: int) -> Candidate:
        return _candidate(points, index, on, demand)

    fits = points.free >= 0
    if not fits.any():
        short = {"bytes": tally.least_short or 0.0, "device_bytes": on.device_hbm_bytes}
        return found(Verdict.DOES_NOT_FIT, short=short)
    misses = _misses(points, demand)
    worst = np.where(fits, np.max(list(misses.values()), axis=0), np.inf)
    good = worst <= 0
    if not good.any():
        index = int(np.argmin(worst))
        short = _short(points, index, demand)
        return found(Verdict.TOO_SLOW, short=short, nearest=candidate(index))
    score = _score(points, demand)
    order = np.argsort(np.where(good, score, np.inf), kind="stable")[: int(good.sum())]
    chosen: dict[int, int] = {}
    for index in order.tolist():
        chosen.setdefault(int(points.option[index]), index)
        if len(chosen) == top:
            break
    best = tuple(candidate(index) for index in chosen.values())
    front = tuple(candidate(index) for index in _front(points, good))
    return found(Verdict.OK, best=best, front=front)


def _misses(points: Points, demand: Demand) -> dict[str, np.ndarray]:
    """Returns by what share each limit is missed; at most zero where it is met."""
    found = {"none": np.full(points.free.shape, -1.0)}
    if demand.ttft_s is not None:
        found["ttft"] = points.ttft_s / demand.ttft_s - 1
    if demand.tpot_s is not None:
        found["tpot"] = points.tpot_s / demand.tpot_s - 1
    if demand.rate is not None:
        found["rate"] = demand.rate / (FULL * points.rate) - 1
    return found


def _short(points: Points, index: int, demand: Demand) -> dict[str, float]:
    found = {}
    if demand.ttft_s is not None and (over := points.ttft_s[index] - demand.ttft_s) > 0:
        found["ttft_ms"] = float(over) * 1e3
    if demand.tpot_s is not None and (over := points.tpot_s[index] - demand.tpot_s) > 0:
        found["tpot_ms"] = float(over) * 1e3
    if demand.rate is not None and (over := demand.rate - FULL * points.rate[index]) > 0:
        found["requests_per_s"] = float(over)
    return found


def _score(points: Points, demand: Demand) -> np.ndarray:
    """Returns what is to be least: a slice is paid for whole, so most tokens cost the least.

    Where it carries the rate that is asked for, more would be for nothing: then it is the time.
    """
    carried = demand.rate is not None and demand.objective is Objective.COST
    if demand.objective is Objective.LATENCY or carried:
        return points.ttft_s + demand.output_tokens * points.tpot_s
    return -points.rate


def _front(points: Points, good: np.ndarray) -> list[int]:
    indices = np.flatnonzero(good)
    order = indices[np.lexsort((-points.rate[indices], points.tpot_s[indices]))]
    kept, most = [], -math.inf
    for index in order.tolist():
        if points.rate[index] > most:
            kept.append(index)
            most = points.rate[index]
    return kept


def _candidate(points: Points, index: int, on: ChipSlice, demand: Demand) -> Candidate:
    rate = float(points.rate[index])
    tokens = rate * demand.output_tokens
    usd = None if on.usd_hour is None else on.usd_hour / 3600 / tokens * 1e6
    return Candidate(
        points.options[int(points.option[index])],
        int(points.batch[index]),
        int(points.group[index]),
        int(points.chunk[index]),
        float(points.ttft_s[index]),
        float(points.tpot_s[index]),
        tokens,
        rate,
        usd,
        float(points.free[index]),
    )
