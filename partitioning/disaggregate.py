"""Prefill and decode on chips of their own.

A share of the slice prefills, in copies of the model that hand keys and values on to others that
decode; each side has its own mesh and layout, so attention may be cut differently too. Keys and
values cross the network between hosts once a request. No JAX.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from jaxserve.config import ModelConfig
from jaxserve.errors import UsageError
from jaxserve.partitioning.demand import Demand, Serving, Space
from jaxserve.partitioning.efficiency import Efficiency
from jaxserve.partitioning.estimate import Coster
from jaxserve.partitioning.hardware import ChipSlice
from jaxserve.partitioning.layout import PhaseLayout
from jaxserve.partitioning.memory import Kept, kept_tokens, weights_bytes
from jaxserve.partitioning.meshes import Laid, layouts, meshes
from jaxserve.partitioning.points import Option, Points
from jaxserve.partitioning.traffic import Traffic
from jaxserve.partitioning.work import Share, num_parameters

EIGHTHS = (1, 2, 4, 6, 7)
"""Shares of the slice that prefill, in eighths."""

_KEPT = 4
"""Best sides of each kind that are paired with each other."""


def disaggregated(
    config: ModelConfig,
    on: ChipSlice,
    demand: Demand,
    space: Space,
    seen: Callable[[Any], None],
) -> Iterator[Points]:
    """Yields the pairs of a side that prefills and one that decodes.

    Args:
        seen: is told what was left free.
    """
    for weights in space.weights:
        for kv in space.kv:
            kept = Kept(weights, kv)
            sides = list(_sides(config, on, demand, space, kept, seen))
            prefills = [side for side in sides if side.prefills]
            decodes = [side for side in sides if not side.prefills]
            yield from _pairs(config, on, demand, prefills, decodes, kept)


class _Side:
    """One phase on a part of the slice: columns over its batches.

    Attributes:
        prefills: the phase.
        coster: what prices it.
        batch, chunk: sequences, tokens of each in a step.
        time_s: of a prompt's prefill, or of a decode step.
        rate: requests per second of a replica.
        free: bytes left on a device.
    """

    def __init__(
        self,
        prefills: bool,
        coster: Coster,
        batch: np.ndarray,
        chunk: np.ndarray,
        time_s: np.ndarray,
        rate: np.ndarray,
        free: np.ndarray,
    ) -> None:
        self.prefills, self.coster = prefills, coster
        good = free >= 0
        self.batch, self.chunk = batch[good], chunk[good]
        self.time_s, self.rate, self.free = time_s[good], rate[good], free[good]


def _sides(
    config: ModelConfig,
    on: ChipSlice,
    demand: Demand,
    space: Space,
    kept: Kept,
    seen: Callable[[Any], None],
) -> Iterator[_Side]:
    pieces = 2
    while pieces <= on.num_chips:
        part = on.part(pieces)
        pieces *= 2
        if part is None:
            continue
        for laid in meshes(part):
            pairs = list(layouts(laid, space))
            for phase in dict.fromkeys(prefill for prefill, _ in pairs):
                if (made := _coster(config, phase, laid, kept, seen)) is not None:
                    yield _prefill(made, demand, space, seen)
            for phase in dict.fromkeys(decode for _, decode in pairs):
                if (made := _coster(config, phase, laid, kept, seen)) is not None:
                    yield _decode(made, demand, space, seen)


def _coster(
    config: ModelConfig,
    phase: PhaseLayout,
    laid: Laid,
    kept: Kept,
    seen: Callable[[Any], None],
) -> Coster | None:
    try:
        share = Share.of(config, phase, laid.sizes)
    except UsageError:
        return None
    free = laid.network.on.device_hbm_bytes - weights_bytes(share, kept)
    if free < 0:
        seen(free)
        return None
    traffic = Traffic.of(share.config, phase, laid.sizes)
    return Coster(
        share, traffic, laid.network, kept, Efficiency.read(), num_parameters(config, active=True)
    )


def _prefill(made: Coster, demand: Demand, space: Space, seen: Callable[[Any], None]) -> _Side:
    cut = made.share.row_cut
    groups = sorted({1, *(n for n in (cut, 4 * cut) if n <= space.batches[1])})
    pairs = [(g, c) for g in groups for c in space.chunk_sizes(demand.input_tokens)]
    group, chunk = (np.array(column) for column in zip(*pairs, strict=True))
    whole = demand.input_tokens
    found = made.estimate(group, chunk, (whole - chunk) / 2, whole)
    time_s = -(-whole // chunk) * np.asarray(found.time_s)
    free = np.broadcast_to(np.asarray(found.memory.free_bytes), time_s.shape)
    seen(free)
    return _Side(True, made, group, chunk, time_s, group / time_s, free)


def _decode(made: Coster, demand: Demand, space: Space, seen: Callable[[Any], None]) -> _Side:
    batch = np.array(space.batch_sizes)
    middle = demand.input_tokens + demand.output_tokens // 2
    found = made.estimate(batch, 1, middle, demand.context_tokens)
    time_s = np.asarray(found.time_s)
    free = np.broadcast_to(np.asarray(found.memory.free_bytes), time_s.shape)
    seen(free)
    rate = batch / (time_s * demand.output_tokens)
    return _Side(False, made, batch, np.ones_like(batch), time_s, rate, free)


def _pairs(
    config: ModelConfig,
    on: ChipSlice,
    demand: Demand,
    prefills: list[_Side],
    decodes: list[_Side],
    kept: Kept,
) -> Iterator[Points]:
    """Yields pairs of good sides for every share of the slice that prefills."""
    handed = _handed_bytes(config, demand, kept)
    for eighths in EIGHTHS:
        if eighths * on.num_chips % 8:
            continue
        chips = eighths * on.num_chips // 8
        for first in _good(prefills, chips):
            for later in _good(decodes, on.num_chips - chips):
                counts = [
                    share // side.coster.on.num_chips
                    for side, share in ((first, chips), (later, on.num_chips - chips))
                ]
                option = Option(
                    counts[1],
                    later.coster.on,
                    later.coster.network,
                    first.coster.share.phase,
                    later.coster.share.phase,
                    kept,
                    Serving.DISAGGREGATED,
                    counts[0],
                    first.coster.network,
                )
                move_s = handed / (on.chip.number("dcn") * first.coster.on.num_chips)
                yield _points(option, first, later, counts, move_s, demand)


def _good(sides: list[_Side], chips: int) -> list[_Side]:
    """Returns the sides with the highest rate, and with the shortest time, on so many chips."""
    usable = [s for s in sides if s.coster.on.num_chips <= chips and len(s.rate)]

    def rate(side: _Side) -> float:
        return -float(side.rate.max()) * (chips // side.coster.on.num_chips)

    fastest = sorted(usable, key=lambda side: float(side.time_s.min()))[:_KEPT]
    return list(dict.fromkeys([*sorted(usable, key=rate)[:_KEPT], *fastest]))


def _points(
    option: Option,
    first: _Side,
    later: _Side,
    counts: list[int],
    move_s: float,
    demand: Demand,
) -> Points:
    fill, empty = counts[0] * first.rate[None, :], counts[1] * later.rate[:, None]
    rate = np.minimum(fill, empty)
    ttft = np.broadcast_to(first.time_s[None, :] + move_s, rate.shape)
    if demand.rate is not None:
        load = np.minimum(demand.rate / fill, 0.999)
        ttft = ttft + load * first.time_s[None, :] / (2 * (1 - load))
    shape = rate.shape
    return Points.of(
        option,
        np.minimum(*np.broadcast_arrays(later.free[:, None], first.free[None, :])),
        np.broadcast_to(later.batch[:, None], shape),
        np.broadcast_to(first.batch[None, :], shape),
        np.broadcast_to(first.chunk[None, :], shape),
        ttft,
        np.broadcast_to(later.time_s[:, None], shape),
        rate,
    )


def _handed_bytes(config: ModelConfig, demand: Demand, kept: Kept) -> float:
    """Returns the bytes of a prompt's keys and values."""
    total = 0.0
    for layer in config.layers:
        spec = layer.attention
        element = kept.kv.per_element(spec.head_dim)
        tokens = kept_tokens(spec, demand.input_tokens)
        total += 2 * spec.num_kv_heads * spec.head_dim * tokens * element
    return total
