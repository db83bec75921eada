"""How long a step takes, term by term.

    job = Step(config, PhaseLayout(Ffn.WS2D, Heads.BATCH), batch=64, context=2048)
    found = estimate(job, slice_of("v4:4x4x4"), {"x": 4, "y": 4, "z": 4})
    found.time_s, found.mfu, found.memory.free_bytes
    for term in found.terms: print(term)

All is an estimate, and says so: each term has the origin of its rate, and the whole a band. The
time is the sum of the terms; the one called "overlap" is negative. Batches may be numpy arrays, so
that a search prices many at once. Communication comes from `cost` alone. No JAX.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from typing import Any

import numpy as np

from jaxserve.config import AttentionSpec, ModelConfig
from jaxserve.partitioning.efficiency import HOST_S, Efficiency, fitted
from jaxserve.partitioning.hardware import ChipSlice, Curve, Origin
from jaxserve.partitioning.layout import PhaseLayout, Stage
from jaxserve.partitioning.memory import Kept, Memory, memory_of
from jaxserve.partitioning.network import Network
from jaxserve.partitioning.traffic import Traffic
from jaxserve.partitioning.work import Product, Share, num_parameters

_ROWS = 8
"""Rows that a matrix unit takes at least."""

_SAMPLER_PASSES = 34
"""Times that the sampler reads the scores: it bisects thresholds, 32 sums over the vocabulary."""


class Part(StrEnum):
    """Kind of a term."""

    COMPUTE = "compute"
    WEIGHTS = "weights"
    KV = "kv"
    ACTIVATIONS = "activations"
    COLLECTIVE = "collective"
    FIXED = "fixed"
    HOST = "host"
    OVERLAP = "overlap"


@dataclass(frozen=True)
class Term:
    """A part of a step's time, on one device.

    Attributes:
        name: what it is.
        part: its kind.
        amount: operations, bytes or times, as `unit` says.
        seconds: by itself.
        origin: of the rate that made seconds of it.
        note: of a collective, the axes and how they lie.
        ahead: it waits for no activation, so it may run beside others.
        count, hops_s: of collectives, how many they are, and the seconds of their ways alone.
    """

    name: str
    part: Part
    amount: Any
    unit: str
    seconds: Any
    origin: Origin
    note: str = ""
    ahead: bool = False
    count: int = 0
    hops_s: float = 0.0

    @property
    def remark(self) -> str:
        """Returns the note; of collectives also how many they are."""
        if not self.count:
            return self.note
        return f"{self.note}, {self.count} in all, hops {self.hops_s * 1e3:.3g} ms"


@dataclass(frozen=True)
class Step:
    """A step to be estimated.

    Attributes:
        config: the model.
        phase: its layout.
        batch: sequences.
        context: tokens of each that are cached before the step.
        new: tokens of each in the step; 1 decodes.
        kept: dtypes.
        other: layout of the other phase, if it is served from the same weights.
        longest: tokens that there is memory for; by default those after the step.
    """

    config: ModelConfig
    phase: PhaseLayout
    batch: Any
    context: Any = 0
    new: Any = 1
    kept: Kept = field(default_factory=Kept)
    other: PhaseLayout | None = None
    longest: int | None = None


@dataclass(frozen=True)
class Estimate:
    """What a step is estimated to take.

    Attributes:
        terms: parts of the time; they add up to it.
        memory: of one device.
        tokens: of all sequences.
        parameters: of the model, unpadded.
        on: the slice.
        sizes: devices along x, y and z.
    """

    terms: tuple[Term, ...]
    memory: Memory
    tokens: Any
    parameters: int
    on: ChipSlice
    sizes: Mapping[str, int]

    @cached_property
    def time_s(self) -> Any:
        """Returns the seconds of the step."""
        return sum(term.seconds for term in self.terms)

    @property
    def mfu(self) -> Any:
        """Returns the share of the chips' peak that the model's own products take.

        Two operations a parameter and token; padding and attention are not counted.
        """
        peak = self.on.num_chips * self.on.chip.flops.number
        return 2 * self.parameters * self.tokens / (peak * self.time_s)

    @property
    def fits(self) -> Any:
        """Returns whether memory suffices."""
        return self.memory.free_bytes >= 0

    @property
    def band(self) -> float:
        """Returns the share by which the time may be off; see `docs/plan.md`."""
        return band(self.on)

    def seconds(self, part: Part) -> Any:
        """Returns the seconds of all terms of a kind."""
        return sum(term.seconds for term in self.terms if term.part is part)


def band(on: ChipSlice) -> float:
    """Returns the share by which an estimate for a slice may be off.

    On the chip that was fitted, the worst error of a row left out; elsewhere the worst of all
    published rows, or for a chip with no row at all twice that.
    """
    bands = fitted().get("band", {})
    return float(bands.get(on.chip.name, bands.get("other", 1.0)))


@dataclass(frozen=True)
class Coster:
    """A layout on a slice, ready to price steps of any batch.

    Attributes:
        share: what a device computes.
        traffic: what the step sends.
        network: how that travels.
        kept: dtypes.
        efficiency: what share of the peaks is reached.
        parameters: of the model, unpadded.
    """

    share: Share
    traffic: Traffic
    network: Network
    kept: Kept
    efficiency: Efficiency
    parameters: int

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        phase: PhaseLayout,
        on: ChipSlice,
        sizes: Mapping[str, int],
        kept: Kept | None = None,
        other: PhaseLayout | None = None,
        efficiency: Efficiency | None = None,
    ) -> Coster:
        """Returns a layout on a slice.

        Raises:
            UsageError: the mesh does not fill the slice, or the model does not divide over it.
        """
        network = Network.of(on, sizes)
        share = Share.of(config, phase, sizes, other)
        return cls(
            share,
            Traffic.of(share.config, phase, sizes),
            network,
            kept or Kept(),
            efficiency or Efficiency.read(),
            num_parameters(config, active=True),
        )

    @property
    def on(self) -> ChipSlice:
        """Returns the slice."""
        return self.network.on

    def estimate(self, batch: Any, new: Any, context: Any, longest: int | None = None) -> Estimate:
        """Returns what a step takes; see `Step`."""
        terms = list(self._terms(batch, new, context))
        ahead = [
            sum(term.seconds for term in terms if term.ahead and term.part in parts)
            for parts in (
                (Part.COMPUTE,),
                (Part.WEIGHTS, Part.KV, Part.ACTIVATIONS),
                (Part.COLLECTIVE,),
            )
        ]
        hidden = self.efficiency.hidden(*ahead)
        terms.append(
            Term("overlap", Part.OVERLAP, hidden, "s", -hidden, Origin.FITTED, "side by side")
        )
        most = int(np.max(context + new)) if longest is None else longest
        memory = memory_of(self.share, self.on, self.kept, batch=batch, context=most, new=new)
        tokens = batch * new
        sizes = dict(self.network.sizes)
        return Estimate(tuple(terms), memory, tokens, self.parameters, self.on, sizes)

    def _terms(self, batch: Any, new: Any, context: Any) -> Iterator[Term]:
        tokens = self.share.tokens(batch, new)
        yield self._lookup(tokens)
        for op in self.share.products:
            yield from self._product(op, tokens)
        yield from self._attention(batch, new, context)
        yield from self._collectives(tokens, batch)
        yield from self._ends(batch)
        layers = self.share.config.num_layers
        each, origin = self._own("layer_s", self.efficiency.layer_s, Origin.FITTED)
        yield Term("layers", Part.FIXED, layers, "layers", layers * each, origin)
        yield Term("host", Part.HOST, 1, "steps", *self._own("host_s", HOST_S, Origin.ASSUMED))

    def _own(self, name: str, seconds: float, origin: Origin) -> tuple[float, Origin]:
        """Returns a time that was measured on the chip, or one for all chips."""
        own = self.on.chip.values.get(name)
        return (seconds, origin) if own is None else (own.number, own.origin)

    def _product(self, op: Product, tokens: Any) -> Iterator[Term]:
        rows = -(-tokens // op.cut) * op.taken
        flops, rate, origin = self._flops(op, rows)
        yield Term(op.name, Part.COMPUTE, flops, "flop", flops / rate, origin, ahead=True)
        each = self.kept.weights.per_element(op.inputs)
        yield self._memory(op.name, Part.WEIGHTS, op.read(tokens) * each, op.turns)
        size = rows * (op.inner + op.outer) * self.kept.activation_bytes
        yield self._memory(op.name, Part.ACTIVATIONS, size, op.turns)

    def _flops(self, op: Product, rows: Any) -> tuple[Any, Any, Origin]:
        """Returns (operations of a product with its tiles full, their rate, its origin)."""
        chip = self.on.chip
        up = [-(-side // chip.tile) * chip.tile for side in (op.inner, op.outer)]
        flops = 2.0 * (-(-rows // _ROWS) * _ROWS) * up[0] * up[1] * op.turns
        if curve := chip.curves.get("matmul"):
            return flops, _at(curve, rows) / chip.devices, Origin.MEASURED
        return flops, chip.flops.number / chip.devices * self.efficiency.matmul, Origin.FITTED

    def _memory(self, name: str, part: Part, each: Any, turns: int = 1) -> Term:
        """Returns the term of bytes that so many layers move, `each` at a time."""
        chip, size = self.on.chip, each * turns
        if curve := chip.curves.get("hbm"):
            rate, origin = _at(curve, each) / chip.devices, Origin.MEASURED
        else:
            rate, origin = chip.hbm.number / chip.devices * self.efficiency.hbm, Origin.FITTED
        return Term(name, part, size, "bytes", size / rate, origin, ahead=True)

    def _attention(self, batch: Any, new: Any, context: Any) -> Iterator[Term]:
        rows = self.share.local_rows(batch)
        flops: Any = 0.0
        read: Any = 0.0
        written: Any = 0.0
        for run in self.share.runs:
            spec = run.layer.attention
            seen = _seen(spec, new, context) / self.share.stripes
            heads = self.share.heads(spec) * spec.head_dim
            flops = flops + run.turns * 4.0 * heads * rows * seen
            size = run.turns * self.share.kv_elements(spec)
            size = size * self.kept.kv.per_element(spec.head_dim)
            written = written + size * rows * new / self.share.stripes
            read = read + size * rows * _read(spec, new, context) / self.share.stripes
        peak = self.on.chip.flops.number / self.on.chip.devices * self.efficiency.matmul
        origin = Origin.FITTED
        if curve := self.on.chip.curves.get("matmul"):
            peak, origin = _at(curve, rows * new) / self.on.chip.devices, Origin.MEASURED
        yield Term("attention", Part.COMPUTE, flops, "flop", flops / peak, origin, ahead=True)
        layers = self.share.config.num_layers
        yield self._memory("keys and values read", Part.KV, read / layers, layers)
        yield self._memory("keys and values written", Part.KV, written / layers, layers)

    def _collectives(self, tokens: Any, rows: Any) -> Iterator[Term]:
        for flow in self.traffic.flows:
            per_byte, hops_s = self.network.rates(flow.kind, flow.axes)
            lanes = self.network.lanes(flow.axes)
            note = _lies(flow.axes, [lane.ring for lane in lanes], lanes[0].switch)
            gathered = flow.weights * self.kept.weights.bits / 8
            size = flow.per_token * tokens + flow.per_row * rows + gathered
            origin = self._origin
            name = f"{flow.kind} of weights" if flow.gathers_weights else flow.kind
            if flow.dtype == "f32" and flow.kind == "all-reduce":
                name = f"{flow.kind} of statistics"
            hops_s = flow.count * hops_s
            seconds = size * per_byte + hops_s
            if curve := self.on.chip.curves.get("gather"):
                # Rates of a size have its way in them; less than the way alone nothing takes.
                slower = self.on.axes[-1].bandwidth / _at(curve, size / flow.count)
                seconds, origin = np.maximum(size * per_byte * slower, hops_s), Origin.MEASURED
            yield Term(
                name,
                Part.COLLECTIVE,
                size,
                "bytes",
                seconds,
                origin,
                note,
                flow.gathers_weights,
                flow.count,
                hops_s,
            )

    @property
    def _origin(self) -> Origin:
        found = self.on.chip.values.get("link")
        return Origin.ASSUMED if found is None else found.origin

    def _lookup(self, tokens: Any) -> Term:
        embed = self.share.config.embed_dim
        pieces = math.prod(self.share.pieces(Stage.EMBEDDED))
        size = 2 * tokens * embed / pieces * self.kept.activation_bytes
        return self._memory("embedding", Part.ACTIVATIONS, size)

    def _ends(self, batch: Any) -> Iterator[Term]:
        op = self.share.logits
        flops, rate, origin = self._flops(op, batch)
        yield Term("logits", Part.COMPUTE, flops, "flop", flops / rate, origin, ahead=True)
        each = self.kept.tables.per_element(op.inputs)
        yield self._memory("logits", Part.WEIGHTS, op.used * each)
        rows = -(-batch // math.prod(self.share.sizes.values()))
        size = 4 * self.share.config.vocab_size * rows * _SAMPLER_PASSES
        yield self._memory("sampling", Part.ACTIVATIONS, size)


def estimate(
    step: Step, on: ChipSlice, sizes: Mapping[str, int], efficiency: Efficiency | None = None
) -> Estimate:
    """Returns what a step is estimated to take.

    Args:
        efficiency: constants; by default those that were fitted.

    Raises:
        UsageError: the mesh does not fill the slice, or the model does not divide over it.
    """
    made = Coster.of(step.config, step.phase, on, sizes, step.kept, step.other, efficiency)
    return made.estimate(step.batch, step.new, step.context, step.longest)


def picked(whole: Estimate, index: int) -> Estimate:
    """Returns the estimate of one batch of many."""

    def one(value: Any) -> Any:
        return value if np.ndim(value) == 0 else value[index].item()

    terms = tuple(
        replace(term, amount=one(term.amount), seconds=one(term.seconds)) for term in whole.terms
    )
    memory = Memory(*(one(value) for value in vars(whole.memory).values()))
    return replace(whole, terms=terms, memory=memory, tokens=one(whole.tokens))


def _seen(spec: AttentionSpec, new: Any, context: Any) -> Any:
    """Returns the keys that the tokens of a sequence see in all: causal, within the window."""
    if spec.window is None:
        return new * context + new * (new + 1) / 2
    room = spec.window + spec.sink_tokens
    # Tokens before the window is full see all before them.
    growing = np.clip(room - context, 0, new)
    return growing * context + growing * (growing + 1) / 2 + (new - growing) * room


def _read(spec: AttentionSpec, new: Any, context: Any) -> Any:
    """Returns the keys of a sequence that are read, each once."""
    whole = context + new
    return whole if spec.window is None else np.minimum(whole, spec.window + spec.sink_tokens + new)


def _at(curve: Curve, size: Any) -> Any:
    """Returns a rate between the points of a curve, by the logarithm of the size."""
    sizes, rates = zip(*curve, strict=True)
    return np.interp(np.log(np.maximum(size, 1)), np.log(sizes), rates)


def _lies(axes: tuple[str, ...], rings: list[bool], switch: bool) -> str:
    how = "switch" if switch else "ring" if all(rings) else "line" if not any(rings) else "mixed"
    return f"over {' '.join(axes)} ({how})"
