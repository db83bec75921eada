"""A mesh and what steps take on it, for all batches and dtypes at once.

    bench = Bench(config, laid, Asked.of(demand, space))
    bench.decode(phase).time_s                  # float64[D, N]: dtypes, batches

A layout is derived and priced once, for every layout of the other phase that goes with it and
every dtype. No JAX.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxserve.config import ModelConfig
from jaxserve.errors import UsageError
from jaxserve.partitioning.demand import Demand, Space
from jaxserve.partitioning.dtypes import Several
from jaxserve.partitioning.efficiency import Efficiency
from jaxserve.partitioning.estimate import Coster, Estimate
from jaxserve.partitioning.layout import PhaseLayout
from jaxserve.partitioning.memory import Kept, memory_of, weights_bytes
from jaxserve.partitioning.meshes import Laid
from jaxserve.partitioning.traffic import Traffic
from jaxserve.partitioning.work import Share, num_parameters


@dataclass(frozen=True)
class Asked:
    """A search's question.

    Attributes:
        demand, space: the question.
        each: dtypes, one after the other.
        kept: all of them at once.
    """

    demand: Demand
    space: Space
    each: tuple[Kept, ...]
    kept: Kept

    @classmethod
    def of(cls, demand: Demand, space: Space) -> Asked:
        """Returns the question with its dtypes."""
        pairs = [(weights, kv) for weights in space.weights for kv in space.kv]
        weights, kv = (Several(tuple(column)) for column in zip(*pairs, strict=True))
        return cls(demand, space, tuple(Kept(*pair) for pair in pairs), Kept(weights, kv))


@dataclass(frozen=True)
class Priced:
    """Steps of one layout: float64[D, N] unless said otherwise.

    Attributes:
        batch, chunk: int64[N], sequences, and tokens of each in the step.
        time_s: seconds.
        other_bytes: memory of a device but for keys and values.
        kv_bytes: those.
    """

    batch: np.ndarray
    chunk: np.ndarray
    time_s: np.ndarray
    other_bytes: np.ndarray
    kv_bytes: np.ndarray

    @classmethod
    def of(cls, found: Estimate, batch: np.ndarray, chunk: np.ndarray, kinds: int) -> Priced:
        """Returns the steps that an estimate is of."""
        memory = found.memory
        columns: list[Any] = [found.time_s, memory.total_bytes - memory.kv_bytes, memory.kv_bytes]
        shape = (kinds, len(batch))
        return cls(batch, chunk, *(np.broadcast_to(one, shape) for one in columns))


class Bench:
    """A mesh, and the layouts that were priced on it; the search alone writes it."""

    def __init__(self, config: ModelConfig, laid: Laid, asked: Asked, stages: int = 1) -> None:
        self.config, self.laid, self.asked, self.stages = config, laid, asked, stages
        self._shares: dict[PhaseLayout, Share | None] = {}
        self._costers: dict[PhaseLayout, Coster] = {}
        self._decodes: dict[PhaseLayout, Priced] = {}
        self._prefills: dict[PhaseLayout, Priced] = {}
        self._parameters = num_parameters(config, active=True)

    @property
    def device_bytes(self) -> float:
        """Returns the memory of a device."""
        return self.laid.network.on.device_hbm_bytes

    def share(self, phase: PhaseLayout) -> Share | None:
        """Returns a device's share; None where the model does not divide."""
        if phase not in self._shares:
            try:
                self._shares[phase] = Share.of(self.config, phase, self.laid.sizes)
            except UsageError:
                self._shares[phase] = None
        return self._shares[phase]

    def coster(self, phase: PhaseLayout) -> Coster:
        """Returns what prices a layout that divides."""
        if phase not in self._costers:
            share = self.share(phase)
            assert share is not None
            self._costers[phase] = Coster(
                share,
                Traffic.of(share.config, phase, self.laid.sizes),
                self.laid.network,
                self.asked.kept,
                Efficiency.read(),
                self._parameters,
            )
        return self._costers[phase]

    def free_of_weights(self, phase: PhaseLayout) -> np.ndarray | None:
        """Returns float64[D], bytes that weights leave; None where the model does not divide."""
        share = self.share(phase)
        if share is None:
            return None
        return self.device_bytes - weights_bytes(share, self.asked.kept)[:, 0]

    def free_at_least(self, decode: PhaseLayout) -> np.ndarray | None:
        """Returns float64[D], bytes that weights and the smallest batch leave; None likewise."""
        share = self.share(decode)
        if share is None:
            return None
        on, context = self.laid.network.on, self.asked.demand.context_tokens
        each = max(self.asked.space.batches[0] // self.stages, 1)
        memory = memory_of(share, on, self.asked.kept, batch=each, context=context)
        return (memory.free_bytes - (self.stages - 1) * memory.kv_bytes)[:, 0]

    def decode(self, phase: PhaseLayout) -> Priced:
        """Returns decode steps of a stage, of every batch that its stages divide."""
        if phase not in self._decodes:
            demand = self.asked.demand
            sizes = [n for n in self.asked.space.batch_sizes if n % self.stages == 0]
            batch = np.array(sizes, np.int64) // self.stages
            middle = demand.input_tokens + demand.output_tokens // 2
            found = self.coster(phase).estimate(batch, 1, middle, demand.context_tokens)
            self._decodes[phase] = self._priced(found, batch, np.ones_like(batch))
        return self._decodes[phase]

    def prefill(self, phase: PhaseLayout) -> Priced:
        """Returns prefill steps, of every group of prompts and chunk."""
        if phase not in self._prefills:
            made, whole = self.coster(phase), self.asked.demand.input_tokens
            groups, sizes = self._groups_and_chunks(made.share)
            found = made.estimate(groups, sizes, (whole - sizes) / 2, whole)
            self._prefills[phase] = self._priced(found, groups, sizes)
        return self._prefills[phase]

    def _priced(self, found: Estimate, batch: np.ndarray, chunk: np.ndarray) -> Priced:
        return Priced.of(found, batch, chunk, len(self.asked.each))

    def _groups_and_chunks(self, share: Share) -> tuple[np.ndarray, np.ndarray]:
        """Returns how many prompts prefill together, and how many tokens of each in a step."""
        cut, space = share.row_cut, self.asked.space
        most = space.batches[1]
        groups = sorted({1, *(n for n in (cut, 4 * cut, 16 * cut, 4, 16) if 1 <= n <= most), most})
        chunks = space.chunk_sizes(self.asked.demand.input_tokens)
        pairs = [(group, chunk) for group in groups for chunk in chunks]
        return np.array([g for g, _ in pairs]), np.array([c for _, c in pairs])
