"""What one device computes, reads and keeps, from the places of a layout.

    share = Share.of(config, PhaseLayout(Ffn.WS2D, Heads.BATCH), {"x": 4, "y": 4, "z": 4})
    [(op.name, op.inner, op.outer) for op in share.ops()]       # its part of every product
    share.kv_elements(share.runs[0])                            # per sequence's token, of a layer

Sizes are those after padding; heads of keys and values that are copied count on every device that
keeps a copy. Counts of tokens may be numpy arrays. No JAX.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from jaxserve.config import AttentionSpec, BlockKind, LayerSpec, MlpSpec, ModelConfig
from jaxserve.partitioning.cost import padded
from jaxserve.partitioning.layout import PhaseLayout, Stage
from jaxserve.partitioning.padding import Padding


@dataclass(frozen=True)
class Product:
    """A device's part of a product [tokens, inner] x [inner, outer], in all layers that have it.

    Attributes:
        name: what it is.
        cut: pieces of the tokens.
        inner, outer: features.
        used: elements of the weight as it is multiplied, gathered where the layout gathers.
        stored: elements that the device keeps.
        inputs, outputs: features that the whole weight contracts, and that it gives.
        turns: layers.
        experts, taken: of a product that has one weight for each expert, these and those that a
            token takes; used and stored elements are then those of all.
    """

    name: str
    cut: int
    inner: int
    outer: int
    used: int
    stored: int
    inputs: int
    outputs: int
    turns: int
    experts: int = 1
    taken: int = 1

    def read(self, tokens: Any) -> Any:
        """Returns the elements that a step of so many tokens reads and writes of the weight.

        A gathered weight is read where it lies, written, and read again. Of experts those are read
        that are taken, of which tokens that choose at random take the most.
        """
        taken = 1.0
        if self.experts > 1:
            taken = 1 - (1 - self.taken / self.experts) ** -(-tokens // self.cut)
        gathered = self.stored + self.used if self.used > self.stored else 0
        return gathered + self.used * taken


@dataclass(frozen=True)
class Run:
    """Layers that are alike."""

    layer: LayerSpec
    turns: int


@dataclass(frozen=True)
class Share:
    """A device's share of a model.

    Attributes:
        config: the model, padded.
        phase: the layout.
        sizes: devices along x, y and z.
    """

    config: ModelConfig
    phase: PhaseLayout
    sizes: Mapping[str, int]

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        phase: PhaseLayout,
        sizes: Mapping[str, int],
        other: PhaseLayout | None = None,
    ) -> Share:
        """Returns a device's share.

        Args:
            other: layout of the other phase, which is served from the same weights.

        Raises:
            UsageError: the width does not divide over the mesh.
        """
        phases = dict.fromkeys((phase, phase if other is None else other))
        padding = Padding(tuple(phases), tuple(sizes.items()))
        padding.check(config)
        # Layers that repeat are padded once.
        pattern = config.pattern
        once = padded(replace(config, layers=pattern), padding)
        layers = once.layers * (config.num_layers // len(pattern))
        return cls(replace(once, layers=layers), phase, sizes)

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """Returns the layers, those alike together."""
        pattern = self.config.pattern
        repeats = self.config.num_layers // len(pattern)
        counts: dict[LayerSpec, int] = {}
        for layer in pattern:
            counts[layer] = counts.get(layer, 0) + repeats
        return tuple(Run(layer, turns) for layer, turns in counts.items())

    @cached_property
    def row_cut(self) -> int:
        """Returns the pieces that sequences are cut into at attention."""
        return self._count(self.phase.placement(Stage.QUERY).tokens)

    @cached_property
    def token_cut(self) -> int:
        """Returns the pieces that the tokens of a step must divide into."""
        stages = (Stage.INPUT, Stage.HIDDEN, Stage.QUERY, Stage.CONTRACTED)
        return math.lcm(*(self._count(self.phase.placement(stage).tokens) for stage in stages))

    @cached_property
    def products(self) -> tuple[Product, ...]:
        """Returns all products of a step but those of attention and the logits."""
        return tuple(op for run in self.runs for op in self._products(run))

    @cached_property
    def logits(self) -> Product:
        """Returns the product that scores the vocabulary; of a tied model it reads the table."""
        lies = self.phase.placement(Stage.SCORED)
        inner = self.config.embed_dim // self._count(self.phase.placement(Stage.ENDS).features)
        outer = self.config.vocab_size // self._count(lies.features)
        stored = self._stored(("vocab", self.config.vocab_size), ("embed", self.config.embed_dim))
        # The table is never gathered: its rows are looked up where they lie.
        whole = self.config.embed_dim, self.config.vocab_size
        return Product("logits", 1, inner, outer, inner * outer, stored, *whole, 1)

    @property
    def tables(self) -> int:
        """Returns how many tables there are, of the embedding and of the output head."""
        return 1 if self.config.tied else 2

    @property
    def vector_elements(self) -> int:
        """Returns the elements of norms and biases, which lie whole on every device."""
        total = self.config.embed_dim
        for run in self.runs:
            norms = 1 + run.layer.mlp_norm + 2 * run.layer.post_norms
            total += run.turns * norms * self.config.embed_dim
        return total

    def local_rows(self, batch: Any) -> Any:
        """Returns the sequences that a device attends for."""
        return -(-batch // self.row_cut)

    def tokens(self, batch: Any, new: Any) -> Any:
        """Returns the tokens of a step, rows that fill up the pieces included."""
        rows = self.local_rows(batch) * self.row_cut
        return -(-(rows * new) // self.token_cut) * self.token_cut

    def heads(self, spec: AttentionSpec) -> int:
        """Returns the query heads that a device attends with."""
        return spec.num_heads // self._count(self.phase.placement(Stage.QUERY).features)

    def kv_elements(self, spec: AttentionSpec) -> int:
        """Returns the elements that a device keeps of one token of one of its sequences."""
        lies = self.phase.kv(Stage.QUERY, spec.num_kv_heads, dict(self.sizes))
        return 2 * spec.num_kv_heads // self._count(lies.features) * spec.head_dim

    @cached_property
    def stripes(self) -> int:
        """Returns the devices that share every page."""
        return self._count(self.phase.stripes)

    def pieces(self, stage: Stage) -> tuple[int, int]:
        """Returns the pieces of tokens and of features at a stage."""
        lies = self.phase.placement(stage)
        return self._count(lies.tokens), self._count(lies.features)

    def _count(self, axes: Any) -> int:
        return math.prod(self.sizes[axis] for axis in axes)

    def _stored(self, *axes: tuple[str, int]) -> int:
        names, shape = [name for name, _ in axes], [size for _, size in axes]
        cuts = self.phase.cuts(names, shape, dict(self.sizes))
        return math.prod(shape) // math.prod(self._count(cut) for cut in cuts)

    def _products(self, run: Run) -> Iterator[Product]:
        spec, mlp, embed = run.layer.attention, run.layer.mlp, self.config.embed_dim
        sizes, phase = dict(self.sizes), self.phase
        tokens, inner = self.pieces(Stage.INPUT)
        outputs = self.pieces(Stage.PROJECTED)[1]
        lies = phase.kv(Stage.PROJECTED, spec.num_kv_heads, sizes)
        width = ("embed", embed)
        head = ("head", spec.head_dim)
        heads, kv_heads = ("heads", spec.num_heads), ("kv_heads", spec.num_kv_heads)
        inputs = embed // inner
        query = spec.num_heads * spec.head_dim // outputs
        keys = 2 * spec.num_kv_heads * spec.head_dim // self._count(lies.features)
        kept = self._stored(width, heads, head) + 2 * self._stored(width, kv_heads, head)
        first = Product(
            "queries, keys, values",
            tokens,
            inputs,
            query + keys,
            inputs * (query + keys),
            kept,
            embed,
            (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim,
            run.turns,
        )
        ways = 2 if mlp.gated else 1
        ffn = ("ffn", mlp.ffn_dim)
        up = ways * mlp.ffn_dim // outputs
        into = Product(
            "MLP in",
            tokens,
            inputs,
            up,
            inputs * up,
            ways * self._stored(width, ffn),
            embed,
            ways * mlp.ffn_dim,
            run.turns,
        )
        into = _of_experts(into, mlp)
        cut, contracted = self.pieces(Stage.CONTRACTED)
        out = embed // self.pieces(Stage.PRODUCED)[1]
        mixed, hidden = spec.num_heads * spec.head_dim // contracted, mlp.ffn_dim // contracted
        whole = spec.num_heads * spec.head_dim
        kept = self._stored(heads, head, width)
        turns = run.turns
        last = Product("attention output", cut, mixed, out, mixed * out, kept, whole, embed, turns)
        kept = self._stored(ffn, width)
        ends = mlp.ffn_dim, embed
        down = Product("MLP out", cut, hidden, out, hidden * out, kept, *ends, turns)
        down = _of_experts(down, mlp)
        if run.layer.block is BlockKind.PARALLEL and mlp.experts is None:
            yield _joined("first projections", first, into)
            yield from (last, down)
            return
        yield from (first, last)
        if mlp.experts is not None:
            count = mlp.experts.count
            kept = self._stored(("experts", count), width)
            yield Product(
                "router", tokens, inputs, count, inputs * count, kept, embed, count, turns
            )
        yield from (into, down)


def num_parameters(config: ModelConfig, *, active: bool = False) -> int:
    """Returns the weights of a model's products, its embedding included; a tied one counts once.

    Args:
        active: of experts count those alone that a token takes.
    """
    total = config.vocab_size * config.embed_dim * (1 if config.tied else 2)
    for layer in config.layers:
        spec, mlp = layer.attention, layer.mlp
        heads = 2 * spec.num_heads + 2 * spec.num_kv_heads
        total += config.embed_dim * spec.head_dim * heads
        one = config.embed_dim * mlp.ffn_dim * (3 if mlp.gated else 2)
        if mlp.experts is None:
            total += one
        else:
            total += one * (mlp.experts.per_token if active else mlp.experts.count)
            total += config.embed_dim * mlp.experts.count
    return total


def _of_experts(op: Product, mlp: MlpSpec) -> Product:
    """Returns a product of the MLP; of all experts, where it has several."""
    if mlp.experts is None:
        return op
    count = mlp.experts.count
    return replace(
        op,
        used=op.used * count,
        stored=op.stored * count,
        outputs=op.outputs * count,
        experts=count,
        taken=mlp.experts.per_token,
    )


def _joined(name: str, one: Product, other: Product) -> Product:
    """Returns one product of the same tokens with the outputs of both."""
    return Product(
        name,
        one.cut,
        one.inner,
        one.outer + other.outer,
        one.used + other.used,
        one.stored + other.stored,
        one.inputs,
        one.outputs + other.outputs,
        one.turns,
    )
