"""Prefill and decode on chips of their own.

A share of the slice prefills, in copies of the model that hand keys and values on to others that
decode; each side has its own mesh and layout, so attention may be cut differently too. Keys and
values cross the network between hosts once a request. No JAX.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxserve.config import ModelConfig
from jaxserve.partitioning.bench import Asked, Bench, Priced
from jaxserve.partitioning.demand import Demand, Serving
from jaxserve.partitioning.hardware import ChipSlice
from jaxserve.partitioning.judge import Judge
from jaxserve.partitioning.layout import PhaseLayout
from jaxserve.partitioning.memory import Kept, kept_tokens
from jaxserve.partitioning.meshes import layouts
from jaxserve.partitioning.network import Network
from jaxserve.partitioning.points import Option, Points

EIGHTHS = (1, 2, 4, 6, 7)
"""Shares of the slice that prefill, in eighths."""

_KEPT = 4
"""Best sides of each kind that are paired with each other."""


def disaggregated(
    config: ModelConfig,
    on: ChipSlice,
    asked: Asked,
    judge: Judge,
    benches: Callable[[int], list[Bench]],
) -> None:
    """Judges the pairs of a side that prefills and one that decodes.

    Args:
        benches: the meshes of a slice's part, one of so many.
    """
    prefills, decodes = _sides(on, asked, judge, benches)
    for row, kept in enumerate(asked.each):
        handed = _handed_bytes(config, asked.demand, kept)
        for eighths in EIGHTHS:
            if eighths * on.num_chips % 8:
                continue
            chips = eighths * on.num_chips // 8
            for first in prefills.good(row, chips):
                for later in decodes.good(row, on.num_chips - chips):
                    counts = chips // first.chips, (on.num_chips - chips) // later.chips
                    _judge_pair((first, later), counts, kept, row, handed, asked.demand, judge)


@dataclass(frozen=True)
class _Side:
    """One phase on a part of the slice, for all dtypes.

    Attributes:
        network, phase: where and how.
        priced: steps.
        time_s: float64[D, N], of a prompt's prefill, or of a decode step.
        rate: float64[D, N], requests per second of a replica.
        free: float64[D, N], bytes left on a device.
    """

    network: Network
    phase: PhaseLayout
    priced: Priced
    time_s: np.ndarray
    rate: np.ndarray
    free: np.ndarray

    @property
    def chips(self) -> int:
        """Returns the chips of a replica."""
        return self.network.on.num_chips


class _Sides:
    """The sides of one phase, and what each does best with each of the dtypes."""

    def __init__(self, sides: list[_Side]) -> None:
        self.sides = sides
        fits = [side.free >= 0 for side in sides]
        self._rate = np.array(
            [np.where(f, s.rate, 0.0).max(axis=1) for f, s in zip(fits, sides, strict=True)]
        )
        self._time = np.array(
            [np.where(f, s.time_s, np.inf).min(axis=1) for f, s in zip(fits, sides, strict=True)]
        )
        self._chips = np.array([side.chips for side in sides], np.int64)

    def good(self, row: int, chips: int) -> list[_Side]:
        """Returns the sides with the highest rate, and with the shortest time, on so many chips."""
        if not self.sides:
            return []
        rate = self._rate[:, row] * (chips // self._chips)
        usable = np.flatnonzero((self._chips <= chips) & (rate > 0))
        most = usable[np.argsort(-rate[usable], kind="stable")[:_KEPT]]
        fastest = usable[np.argsort(self._time[usable, row], kind="stable")[:_KEPT]]
        places = dict.fromkeys([*most.tolist(), *fastest.tolist()])
        return [self.sides[place] for place in places]


def _sides(
    on: ChipSlice, asked: Asked, judge: Judge, benches: Callable[[int], list[Bench]]
) -> tuple[_Sides, _Sides]:
    """Returns the sides that prefill, and those that decode."""
    prefills: list[_Side] = []
    decodes: list[_Side] = []
    pieces = 2
    while pieces <= on.num_chips:
        for bench in benches(pieces):
            pairs = list(layouts(bench.laid, asked.space))
            for phase in dict.fromkeys(prefill for prefill, _ in pairs):
                if _may_fit(bench, phase, judge):
                    prefills.append(_prefill(bench, phase, judge))
            for phase in dict.fromkeys(decode for _, decode in pairs):
                if _may_fit(bench, phase, judge):
                    decodes.append(_decode(bench, phase, judge))
        pieces *= 2
    return _Sides(prefills), _Sides(decodes)


def _may_fit(bench: Bench, phase: PhaseLayout, judge: Judge) -> bool:
    free = bench.free_of_weights(phase)
    if free is None:
        return False
    if (free < 0).any():
        judge.seen(free[free < 0])
    return bool((free >= 0).any())


def _prefill(bench: Bench, phase: PhaseLayout, judge: Judge) -> _Side:
    every, cut = bench.prefill(phase), bench.coster(phase).share.row_cut
    few = np.isin(every.batch, (1, cut, 4 * cut))
    made = Priced(
        every.batch[few],
        every.chunk[few],
        every.time_s[:, few],
        every.other_bytes[:, few],
        every.kv_bytes[:, few],
    )
    time_s = -(-bench.asked.demand.input_tokens // made.chunk) * made.time_s
    return _side(bench, phase, judge, made, time_s, made.batch / time_s)


def _decode(bench: Bench, phase: PhaseLayout, judge: Judge) -> _Side:
    made = bench.decode(phase)
    rate = made.batch / (made.time_s * bench.asked.demand.output_tokens)
    return _side(bench, phase, judge, made, made.time_s, rate)


def _side(
    bench: Bench,
    phase: PhaseLayout,
    judge: Judge,
    made: Priced,
    time_s: np.ndarray,
    rate: np.ndarray,
) -> _Side:
    free = bench.device_bytes - made.other_bytes - made.kv_bytes
    judge.seen(free)
    return _Side(bench.laid.network, phase, made, time_s, rate, free)


def _judge_pair(
    sides: tuple[_Side, _Side],
    counts: tuple[int, int],
    kept: Kept,
    row: int,
    handed: float,
    demand: Demand,
    judge: Judge,
) -> None:
    first, later = sides
    link = first.network.on.chip.number("dcn")
    move_s = handed / (link * first.chips)
    # Columns over the batches that fit.
    fitting = [side.free[row] >= 0 for side in sides]
    ours, theirs = fitting
    prompt_s, step_s = first.time_s[row][None, ours], later.time_s[row][theirs, None]
    fill = counts[0] * first.rate[row][None, ours]
    rate = np.minimum(fill, counts[1] * later.rate[row][theirs, None])
    least = prompt_s.min() + move_s
    bounds = (np.array([one]) for one in (step_s.min(), least, rate.max()))
    if not judge.needs(*bounds)[0]:
        judge.priced += rate.size
        return
    option = Option(
        counts[1],
        later.network.on,
        later.network,
        first.phase,
        later.phase,
        kept,
        Serving.DISAGGREGATED,
        counts[0],
        first.network,
    )
    ttft = prompt_s + move_s
    if demand.rate is not None:
        load = np.minimum(demand.rate / fill, 0.999)
        ttft = ttft + load * prompt_s / (2 * (1 - load))
    columns = np.broadcast_arrays(
        np.minimum(later.free[row][theirs, None], first.free[row][None, ours]),
        later.priced.batch[theirs, None],
        first.priced.batch[None, ours],
        first.priced.chunk[None, ours],
        ttft,
        step_s,
        rate,
    )
    judge.take(Points.of([option], *(one[None] for one in columns)))


def _handed_bytes(config: ModelConfig, demand: Demand, kept: Kept) -> float:
    """Returns the bytes of a prompt's keys and values."""
    total: Any = 0.0
    for layer in config.layers:
        spec = layer.attention
        element = kept.kv.per_element(spec.head_dim)
        tokens = kept_tokens(spec, demand.input_tokens)
        total += 2 * spec.num_kv_heads * spec.head_dim * tokens * element
    return total
