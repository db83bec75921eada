"""Keeps, of all deployments that a search prices, those that its answer needs.

    judge = Judge(demand, device_bytes, top=5)
    judge.take(points)                      # again and again
    judge.best, judge.front, judge.nearest

The best of every option, Pareto's front and the deployment that misses its limits by the least are
kept as deployments come, so millions of them need no memory. Of equals the first is kept. No JAX.
"""

from __future__ import annotations

import bisect
import math
from typing import Any

import numpy as np

from jaxserve.partitioning.demand import FULL, Demand, Objective
from jaxserve.partitioning.points import Point, Points


class Judge:
    """What was found so far; the search alone writes it.

    Args:
        top: options that are wanted.

    Attributes:
        priced: deployments that were judged.
        least_short: fewest bytes that anything lacked, below zero where something fits.
        best: the best of the best options, with their scores.
        front: those that no other beats in both time per token and rate, the fastest first.
        nearest: what misses by the least, among all that fit.
    """

    def __init__(self, demand: Demand, top: int) -> None:
        self.demand, self.top = demand, top
        self.priced = 0
        self.fits = False
        self.least_short: float | None = None
        self.best: list[tuple[float, Point]] = []
        self.front: list[Point] = []
        self.nearest: Point | None = None
        self._nearest_miss = math.inf

    def seen(self, free: Any) -> None:
        """Notes what was left free, below zero where something did not fit."""
        short = float(-np.max(free))
        if self.least_short is None or short < self.least_short:
            self.least_short = short

    def needs(self, tpot_s: np.ndarray, ttft_s: np.ndarray, rate: np.ndarray) -> np.ndarray:
        """Returns bool[D]: whether deployments within such bounds may change the answer.

        Args:
            tpot_s, ttft_s, rate: float64[D], lowest times and highest rate of each option.
        """
        if len(self.best) < self.top:
            return np.ones(len(rate), bool)
        demand, kept = self.demand, np.zeros(len(rate), bool)
        if demand.tpot_s is not None:
            kept |= tpot_s > demand.tpot_s
        if demand.ttft_s is not None:
            kept |= ttft_s > demand.ttft_s
        if demand.rate is not None:
            kept |= FULL * rate < demand.rate
        better = score(demand, ttft_s, tpot_s, rate) < self.best[-1][0]
        return ~kept & (better | self._leads(tpot_s, rate))

    def take(self, points: Points) -> None:
        """Judges deployments."""
        self.priced += points.count
        fits = points.free >= 0
        if not fits.any():
            return
        self.fits = True
        worst = np.where(fits, misses(points, self.demand), np.inf)
        good = worst <= 0
        if not good.any():
            at = int(np.argmin(worst))
            if (miss := float(worst.flat[at])) < self._nearest_miss:
                self._nearest_miss, self.nearest = miss, points.at(at)
            return
        self._take_best(points, good)
        self._take_front(points, good)

    def _take_best(self, points: Points, good: np.ndarray) -> None:
        each = np.where(good, score(self.demand, points.ttft_s, points.tpot_s, points.rate), np.inf)
        each = each.reshape(len(points.options), -1)
        places = each.argmin(axis=1)
        for row, place in enumerate(places.tolist()):
            value = float(each[row, place])
            full = len(self.best) == self.top
            if value == math.inf or (full and value >= self.best[-1][0]):
                continue
            entry = value, points.at(row * each.shape[1] + place)
            bisect.insort(self.best, entry, key=lambda one: one[0])
            del self.best[self.top :]

    def _take_front(self, points: Points, good: np.ndarray) -> None:
        at = np.flatnonzero(good)
        tpot, rate = points.tpot_s.ravel()[at], points.rate.ravel()[at]
        leads = self._leads(tpot, rate)
        if not leads.any():
            return
        at = at[leads]
        # Of the new ones those that lead; then they and the old ones, of which equals come first.
        order = np.lexsort((-rate[leads], tpot[leads]))
        new = [points.at(int(at[i])) for i in _rising(rate[leads][order], order)]
        every = sorted([*self.front, *new], key=lambda one: (one.tpot_s, -one.rate))
        self.front = [every[i] for i in _rising([p.rate for p in every], range(len(every)))]

    def _leads(self, tpot_s: np.ndarray, rate: np.ndarray) -> np.ndarray:
        """Returns whether nothing on the front is as fast and has as high a rate."""
        times = np.array([one.tpot_s for one in self.front])
        rates = np.array([-math.inf, *(one.rate for one in self.front)])
        return rate > rates[np.searchsorted(times, tpot_s, side="right")]


def misses(points: Points, demand: Demand) -> np.ndarray:
    """Returns by what share the worst of all limits is missed; at most zero where all are met."""
    worst: np.ndarray = np.full(points.free.shape, -1.0)
    if demand.ttft_s is not None:
        worst = np.maximum(worst, points.ttft_s / demand.ttft_s - 1)
    if demand.tpot_s is not None:
        worst = np.maximum(worst, points.tpot_s / demand.tpot_s - 1)
    if demand.rate is not None:
        worst = np.maximum(worst, demand.rate / (FULL * points.rate) - 1)
    return worst


def score(demand: Demand, ttft_s: Any, tpot_s: Any, rate: Any) -> Any:
    """Returns what is to be least: a slice is paid for whole, so most tokens cost the least.

    Where it carries the rate that is asked for, more would be for nothing: then it is the time.
    """
    carried = demand.rate is not None and demand.objective is Objective.COST
    if demand.objective is Objective.LATENCY or carried:
        return ttft_s + demand.output_tokens * tpot_s
    return -rate


def _rising(values: Any, labels: Any) -> list[int]:
    """Returns the labels of values above all before them."""
    found, most = [], -math.inf
    for value, label in zip(values, labels, strict=True):
        if value > most:
            found.append(int(label))
            most = value
    return found
