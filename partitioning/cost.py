"""What a step sends between devices, derived from its layout before anything is compiled.

    sizes = {"x": 4, "y": 4, "z": 4}
    phase = PhaseLayout(Ffn.WS2D, Heads.BATCH)
    sent = step_collectives(named_config("palm-540b"), phase, sizes, Pass(tokens=64, rows=64))
    sum(one.wire_bytes(sizes) for one in sent if one.where is Where.LAYER)

It applies the moves that `MeshComm` carries out to shapes, so nothing is fitted and no layout is
named here. Convention: over K devices, the bytes that one receives are (K-1)/K times the full
tensor: the result of an all-gather, the operand of a reduce-scatter or an all-to-all, and twice the
tensor of an all-reduce. Split over axes, such figures add up to that of the whole. A permute
counts what it brings. No JAX.

Source: Pope et al. 2022, section 3 and appendix A.1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from jaxserve.config import (
    AttentionSpec,
    BlockKind,
    LayerSpec,
    MlpSpec,
    ModelConfig,
    NormKind,
    NormPlace,
    NormSpec,
    dtype_bytes,
)
from jaxserve.partitioning.layout import PhaseLayout, Stage
from jaxserve.partitioning.padding import Padding
from jaxserve.partitioning.placement import Kind, Move, Placement, moves


class Where(StrEnum):
    """Part of a program: the loop over layers, or what stands before and after it."""

    ENDS = "ends"
    LAYER = "layer"
    NESTED = "nested"  # in a loop inside a layer, so its number is not known
    BRANCH = "branch"  # at the ends, in a branch that a step may leave out

    @property
    def inner(self) -> Where:
        """Returns where the body of a loop is that stands here."""
        if self is Where.BRANCH:
            return self
        return Where.LAYER if self is Where.ENDS else Where.NESTED

    @property
    def branch(self) -> Where:
        """Returns where a branch of a choice is that stands here."""
        return Where.BRANCH if self is Where.ENDS else self


@dataclass(frozen=True)
class Collective:
    """Data that moves between the devices along some axes.

    Attributes:
        kind: a `Kind`, or what else a compiler made.
        axes: in the order of the mesh.
        dtype: as XLA prints it, such as "bf16".
        bytes: of the full tensor, see above; of permutes, what a device receives.
        where: part of the program.
    """

    kind: str
    axes: tuple[str, ...]
    dtype: str
    bytes: int
    where: Where = Where.LAYER

    def wire_bytes(self, sizes: Mapping[str, int]) -> float:
        """Returns the bytes that one device receives."""
        if self.kind == Kind.PERMUTE:
            return float(self.bytes)
        count = math.prod(sizes[axis] for axis in self.axes)
        passes = 2 if self.kind == Kind.ALL_REDUCE else 1
        return passes * self.bytes * (count - 1) / count


@dataclass(frozen=True)
class Pass:
    """One step.

    Attributes:
        tokens: T, of all sequences.
        rows: R, tokens whose logits are wanted.
        dtype: of activations and, unless those are quantised, weights.
        logits: where the scores are wanted.
        weights: dtype of quantised weights, whose scales are whole on every device; None for none.
    """

    tokens: int
    rows: int
    dtype: str = "bfloat16"
    logits: Stage = Stage.WHOLE
    weights: str | None = None


Key = tuple[str, tuple[str, ...], str, Where]
"""Kind, axes, dtype, part of the program."""


def totals(found: Iterable[Collective]) -> dict[Key, int]:
    """Returns bytes of full tensors by kind, axes, dtype and part of the program."""
    sums: dict[Key, int] = {}
    for one in found:
        key = str(one.kind), one.axes, one.dtype, one.where
        sums[key] = sums.get(key, 0) + one.bytes
    return sums


def padded(config: ModelConfig, padding: Padding) -> ModelConfig:
    """Returns a model of the sizes that are computed on a mesh."""
    layers = tuple(
        replace(
            layer,
            attention=padding.attention(layer.attention),
            mlp=replace(layer.mlp, ffn_dim=padding.ffn(layer.mlp.ffn_dim)),
        )
        for layer in config.layers
    )
    return replace(config, layers=layers, vocab_size=padding.vocab(config.vocab_size))


def step_collectives(
    config: ModelConfig, phase: PhaseLayout, sizes: dict[str, int], step: Pass
) -> list[Collective]:
    """Returns what a step sends: of every layer of `config.pattern` once, and at the ends.

    Args:
        config: its sizes divide over the mesh; see `padded`.
    """
    meter = _meter(phase, sizes, step)
    found = list(_start(config, meter))
    for layer in config.pattern:
        found += layer_collectives(layer, config.embed_dim, phase, sizes, step)
    return [*found, *_end(config, meter, step)]


def layer_collectives(
    layer: LayerSpec, embed_dim: int, phase: PhaseLayout, sizes: dict[str, int], step: Pass
) -> list[Collective]:
    """Returns what one layer sends."""
    meter = _meter(phase, sizes, step)
    if layer.block is BlockKind.PARALLEL:
        return list(_side_by_side(layer, embed_dim, meter))
    return [*_attention(layer, embed_dim, meter), *_mlp(layer, embed_dim, meter)]


def mlp_collectives(
    layer: LayerSpec, embed_dim: int, phase: PhaseLayout, sizes: dict[str, int], step: Pass
) -> list[Collective]:
    """Returns what the MLP of a serial layer sends, which the paper's volumes are about."""
    return list(_mlp(layer, embed_dim, _meter(phase, sizes, step)))


def gathered_bytes(
    config: ModelConfig, phase: PhaseLayout, sizes: dict[str, int], dtype: str = "bfloat16"
) -> int:
    """Returns the bytes of a layer's weights as they are gathered, every step on the way counted.

    A program that gathers ahead holds all of it at once, beside weights and cache.
    """
    meter = _Meter(phase, sizes, dtype, tokens=0)
    return max(
        sum(
            one.bytes
            for weights in (_attention_weights, _mlp_weights)
            for one in weights(layer, config.embed_dim, meter)
        )
        for layer in config.pattern
    )


@dataclass(frozen=True)
class _Part:
    """A result of the first projections: features in all, target, key and value heads."""

    features: int
    target: Stage
    kv_heads: int | None = None


@dataclass(frozen=True)
class _Meter:
    """Applies moves to shapes."""

    phase: PhaseLayout
    sizes: dict[str, int]
    dtype: str
    tokens: int
    weights: str | None = None

    def placement(self, stage: Stage, kv_heads: int | None = None) -> Placement:
        if kv_heads is None:
            return self.phase.placement(stage).over(self.sizes)
        return self.phase.kv(stage, kv_heads, self.sizes).over(self.sizes)

    def count(self, axes: Iterable[str]) -> int:
        return math.prod(self.sizes[axis] for axis in axes)

    def moves(self, source: Placement, target: Placement) -> list[Move]:
        return moves(source, target, [axis for axis, size in self.sizes.items() if size > 1])

    def local(self, tokens: int, features: int, lies: Placement) -> int:
        """Returns the elements that a device holds of [tokens, features]."""
        return tokens * features // self.count((*lies.tokens, *lies.features))

    def carry(
        self,
        elements: int,
        plan: Sequence[Move],
        dtype: str | None = None,
        where: Where = Where.LAYER,
    ) -> Iterator[Collective]:
        """Yields what moving an array of `elements` on each device sends."""
        for move in plan:
            pieces = self.count(move.axes)
            elements *= pieces if move.kind is Kind.ALL_GATHER else 1
            if move.kind is not Kind.CUT:
                yield self.one(move.kind, move.axes, elements, dtype, where)
            if move.kind in (Kind.REDUCE_SCATTER, Kind.CUT):
                elements //= pieces

    def one(
        self,
        kind: Kind,
        axes: Iterable[str],
        elements: int,
        dtype: str | None = None,
        where: Where = Where.LAYER,
    ) -> Collective:
        dtype = dtype or self.phase.sent_as(kind, self.dtype)
        lies = tuple(axis for axis in self.sizes if axis in set(axes))
        return Collective(kind.value, lies, xla_name(dtype), elements * dtype_bytes(dtype), where)

    def move(
        self, features: int, source: Stage, target: Stage, where: Where = Where.LAYER
    ) -> Iterator[Collective]:
        """Yields what `Comm.move` of [T, features] sends."""
        lies = self.placement(source)
        plan = self.moves(lies, self.placement(target))
        yield from self.carry(self.local(self.tokens, features, lies), plan, where=where)

    def contract(self, features: int, source: Stage) -> Iterator[Collective]:
        """Yields what `Comm.contract` of [T, features] sends: pieces go around where they may."""
        lies = self.placement(source)
        plan = self.moves(lies, self.placement(Stage.CONTRACTED))
        sent = list(self.carry(self.local(self.tokens, features, lies), plan))
        if self.phase.goes_around(plan):
            *sent, whole = sent
            received = int(whole.wire_bytes(self.sizes))
            sent.append(replace(whole, kind=Kind.PERMUTE.value, bytes=received))
        yield from sent

    def distribute(self, parts: Sequence[_Part]) -> Iterator[Collective]:
        """Yields what `Comm.distribute` sends: parts that begin with one scatter share it."""
        shared: dict[Move, int] = {}
        rest: list[tuple[int, list[Move]]] = []
        for part in parts:
            lies = self.placement(Stage.PROJECTED, part.kv_heads)
            plan = self.moves(lies, self.placement(part.target, part.kv_heads))
            elements = self.local(self.tokens, part.features, lies)
            if plan and plan[0].kind is Kind.REDUCE_SCATTER:
                shared[plan[0]] = shared.get(plan[0], 0) + elements
                elements //= self.count(plan[0].axes)
                plan = plan[1:]
            rest.append((elements, plan))
        for move, elements in shared.items():
            yield from self.carry(elements, [move])
        for elements, plan in rest:
            yield from self.carry(elements, plan)

    def weight(self, *axes: tuple[str, int], dtype: str | None = None) -> Iterator[Collective]:
        """Yields what `Comm.weight` of an array with these logical axes sends.

        Args:
            dtype: None is that of weights, which may be rounded.
        """
        cuts = self.phase.cuts([name for name, _ in axes], [size for _, size in axes], self.sizes)
        elements = math.prod(size for _, size in axes)
        elements //= self.count(axis for cut in cuts for axis in cut)
        for (name, size), cut in reversed(list(zip(axes, cuts, strict=True))):
            used = self.phase.used(name, size, self.sizes)
            if over := tuple(axis for axis in cut if axis not in used):
                elements *= self.count(over)
                kept = dtype or self.weights or self.dtype
                yield self.one(Kind.ALL_GATHER, over, elements, kept)

    def norm(
        self, spec: NormSpec, stage: Stage, where: Where = Where.LAYER
    ) -> Iterator[Collective]:
        """Yields the statistics of a norm: float32[T, 1], twice for a mean and a variance."""
        lies = self.placement(stage)
        if not lies.features:
            return
        tokens = self.tokens // self.count(lies.tokens)
        for _ in range(2 if spec.kind is NormKind.LAYER else 1):
            yield self.one(Kind.ALL_REDUCE, lies.features, tokens, "float32", where)


def _meter(phase: PhaseLayout, sizes: dict[str, int], step: Pass) -> _Meter:
    return _Meter(phase, sizes, step.dtype, step.tokens, step.weights)


def xla_name(dtype: str) -> str:
    """Returns how XLA prints a dtype."""
    return {"bfloat16": "bf16", "float32": "f32", "float16": "f16", "int8": "s8"}[dtype]


def _attention_parts(spec: AttentionSpec) -> list[_Part]:
    kv = _Part(spec.num_kv_heads * spec.head_dim, Stage.QUERY, spec.num_kv_heads)
    return [_Part(spec.num_heads * spec.head_dim, Stage.QUERY), kv, kv]


def _mlp_parts(layer: LayerSpec) -> list[_Part]:
    return [_Part(_hidden(layer.mlp), Stage.HIDDEN)] * (2 if layer.mlp.gated else 1)


def _hidden(mlp: MlpSpec) -> int:
    """Returns the hidden features of a token, those of all experts that it takes."""
    return mlp.ffn_dim * (1 if mlp.experts is None else mlp.experts.per_token)


def _attention_weights(layer: LayerSpec, embed: int, meter: _Meter) -> Iterator[Collective]:
    spec = layer.attention
    width, head = ("embed", embed), ("head", spec.head_dim)
    for _ in range(2):
        yield from meter.weight(width, ("kv_heads", spec.num_kv_heads), head)
    yield from meter.weight(width, ("heads", spec.num_heads), head)
    yield from meter.weight(("heads", spec.num_heads), head, width)


def _mlp_weights(layer: LayerSpec, embed: int, meter: _Meter) -> Iterator[Collective]:
    width, ffn = ("embed", embed), ("ffn", layer.mlp.ffn_dim)
    first = 2 if layer.mlp.gated else 1
    if layer.mlp.experts is None:
        for _ in range(first):
            yield from meter.weight(width, ffn)
        yield from meter.weight(ffn, width)
        return
    # Every expert's weights, whichever are taken, with their outputs before their inputs.
    experts = ("experts", layer.mlp.experts.count)
    for _ in range(first):
        yield from meter.weight(experts, ffn, width)
    yield from meter.weight(experts, width, ffn)


def _routed(layer: LayerSpec, embed: int, meter: _Meter) -> Iterator[Collective]:
    """Yields what it takes to score the experts: float32[T, E], summed where the width is cut."""
    if layer.mlp.experts is None:
        return
    count, lies = layer.mlp.experts.count, meter.placement(Stage.INPUT)
    yield from meter.weight(("experts", count), ("embed", embed), dtype=meter.dtype)
    if lies.features:
        elements = meter.tokens // meter.count(lies.tokens) * count
        yield meter.one(Kind.ALL_REDUCE, lies.features, elements, "float32")


def _fed(layer: LayerSpec, meter: _Meter) -> Iterator[Collective]:
    """Yields what brings the hidden features to the last projection; those of experts at once."""
    if layer.mlp.experts is None:
        yield from meter.contract(layer.mlp.ffn_dim, Stage.HIDDEN)
    else:
        yield from meter.move(_hidden(layer.mlp), Stage.HIDDEN, Stage.CONTRACTED)


def _attended(spec: AttentionSpec, meter: _Meter) -> Iterator[Collective]:
    if axes := tuple(axis for axis in meter.phase.stripes if meter.sizes[axis] > 1):
        # The largest score of each head, then the weighted values and their total.
        heads = meter.local(meter.tokens, spec.num_heads, meter.placement(Stage.QUERY))
        for elements in (heads, heads * (spec.head_dim + 1)):
            yield meter.one(Kind.ALL_REDUCE, axes, elements, "float32")
    yield from meter.contract(spec.num_heads * spec.head_dim, Stage.QUERY)


def _side_by_side(layer: LayerSpec, embed: int, meter: _Meter) -> Iterator[Collective]:
    yield from meter.move(embed, Stage.RESIDUAL, Stage.INPUT)
    # A second norm of the same input has the same statistics.
    yield from meter.norm(layer.norm, Stage.INPUT)
    yield from _attention_weights(layer, embed, meter)
    yield from _routed(layer, embed, meter)
    yield from _mlp_weights(layer, embed, meter)
    yield from meter.distribute([*_attention_parts(layer.attention), *_mlp_parts(layer)])
    yield from _attended(layer.attention, meter)
    yield from _fed(layer, meter)
    yield from meter.move(embed, Stage.PRODUCED, Stage.RESIDUAL)


def _attention(layer: LayerSpec, embed: int, meter: _Meter) -> Iterator[Collective]:
    yield from meter.move(embed, Stage.RESIDUAL, Stage.INPUT)
    yield from _normed(layer, NormPlace.INPUT, Stage.INPUT, meter)
    yield from _attention_weights(layer, embed, meter)
    yield from meter.distribute(_attention_parts(layer.attention))
    yield from _attended(layer.attention, meter)
    yield from _added(layer, embed, meter)


def _mlp(layer: LayerSpec, embed: int, meter: _Meter) -> Iterator[Collective]:
    yield from meter.move(embed, Stage.RESIDUAL, Stage.INPUT)
    yield from _normed(layer, NormPlace.INPUT, Stage.INPUT, meter)
    yield from _routed(layer, embed, meter)
    yield from _mlp_weights(layer, embed, meter)
    yield from meter.distribute(_mlp_parts(layer))
    yield from _fed(layer, meter)
    yield from _added(layer, embed, meter)


def _added(layer: LayerSpec, embed: int, meter: _Meter) -> Iterator[Collective]:
    yield from meter.move(embed, Stage.PRODUCED, Stage.RESIDUAL)
    if layer.post_norms:
        yield from meter.norm(layer.norm, Stage.RESIDUAL)
    yield from _normed(layer, NormPlace.SUM, Stage.RESIDUAL, meter)


def _normed(
    layer: LayerSpec, place: NormPlace, stage: Stage, meter: _Meter
) -> Iterator[Collective]:
    """Yields the statistics of the norm of a part, if it stands here."""
    if layer.norm_place is place:
        yield from meter.norm(layer.norm, stage)


def _start(config: ModelConfig, meter: _Meter) -> Iterator[Collective]:
    yield from meter.move(config.embed_dim, Stage.EMBEDDED, Stage.RESIDUAL, Where.ENDS)


def _end(config: ModelConfig, meter: _Meter, step: Pass) -> Iterator[Collective]:
    if config.final_norm is not None:
        yield from meter.norm(config.final_norm, Stage.RESIDUAL, Where.ENDS)
    lies = meter.placement(Stage.RESIDUAL)
    # Rows are taken on the devices that hold them; all others add zeros.
    taken = Placement((), lies.features, lies.tokens)
    plan = meter.moves(taken, meter.placement(Stage.ENDS))
    yield from meter.carry(meter.local(step.rows, config.embed_dim, taken), plan, where=Where.ENDS)
    scored = meter.placement(Stage.SCORED)
    plan = meter.moves(scored, meter.placement(step.logits))
    elements = meter.local(step.rows, config.vocab_size, scored)
    yield from meter.carry(elements, plan, "float32", Where.ENDS)
