"""Communication of a step: what moves between the stages of a block.

    h = comm.move(x, Stage.RESIDUAL, Stage.INPUT)                   # [T, E.xzy] -> [T, E.x]
    q, gate, up = comm.distribute([Part(q, Stage.QUERY), Part(gate, Stage.HIDDEN), ...])

Layers name stages; a `Comm` knows how each lies on the mesh and which collectives lead from one to
the next. On one device nothing lies on a mesh: `LocalComm`. `MeshComm` runs inside `shard_map`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from jaxserve.config import AttentionSpec
from jaxserve.errors import UnsupportedError, UsageError
from jaxserve.partitioning.collective_matmul import gathered_product
from jaxserve.partitioning.layout import HIDDEN_ORDER, PhaseLayout, Stage
from jaxserve.partitioning.placement import Dim, Kind, Move, Placement, moves
from jaxserve.partitioning.stripe import Stripe

Product = Callable[[Array, Array, DTypeLike], Array]
"""From activations, the weight for them and a dtype to their product in it."""

LogicalAxes = Sequence[tuple[str, int]]
"""Names and full sizes of an array's dimensions."""

_LANES = 256
"""A scatter of a last dimension stays one on TPU where its pieces are multiples of this."""

_TILE = 16, 128
"""Rows and columns that lie together in a TPU's memory. A scatter whose pieces have fewer rows
becomes an all-reduce there, which sends twice as much, unless they are laid out in full tiles."""


@dataclass(frozen=True, eq=False)
class Bundle:
    """Results of one product side by side: in each share of its features, a share of each.

    Attributes:
        x: [T, shares * sum(widths)].
        widths: features of a share of each result.
        rest: dimensions of each result behind its first, which is cut into shares.
    """

    x: Array
    widths: tuple[int, ...]
    rest: tuple[tuple[int, ...], ...]

    @property
    def shares(self) -> int:
        """Returns the shares that are here."""
        return self.x.shape[1] // sum(self.widths)

    def split(self, x: Array) -> list[Array]:
        """Returns each result [T, features, *rest] of `x`, or of some rows or shares of it."""
        rows, width = x.shape[0], sum(self.widths)
        if x.shape[1] > width:
            x = x.reshape(rows, -1, width)
        ends = list(accumulate(self.widths))
        cuts = zip(ends, self.widths, self.rest, strict=True)
        return [x[..., end - own : end].reshape(rows, -1, *rest) for end, own, rest in cuts]


class Part(NamedTuple):
    """One result of the first projections on its way.

    Attributes:
        x: [T, features, ...] at `Stage.PROJECTED`.
        target: where it is needed.
        kv_heads: of keys and values, their number of heads in all.
        bias: [features, ...], added once it is there.
        bundle: where it stands beside others, or None.
    """

    x: Array
    target: Stage
    kv_heads: int | None = None
    bias: Array | None = None
    bundle: Bundle | None = None


class Comm(Protocol):
    """Communication of one layout."""

    @property
    def whole(self) -> bool:
        """Returns whether every activation is on this device, whole."""
        ...

    def move(self, x: Array, source: Stage, target: Stage) -> Array:
        """Returns x[T, features, ...] of one stage as another needs it."""
        ...

    def contract(self, x: Array, source: Stage, values: Array, dim: int, product: Product) -> Array:
        """Returns the product of x[T, features, ...], brought to `Stage.CONTRACTED`, and a weight.

        Args:
            values: the weight as the projections use it.
            dim: its dimension that has the features.
        """
        ...

    def distribute(self, parts: Sequence[Part]) -> list[Array]:
        """Returns what the first projections give, each where it is needed."""
        ...

    def weight(self, values: Array, axes: LogicalAxes) -> Array:
        """Returns a stored weight with these logical axes as the projections use it."""
        ...

    def scales(self, values: Array, axes: LogicalAxes, gathered: bool = True) -> Array:
        """Returns the part of a weight's scales, which every device holds whole, beside it.

        Args:
            axes: the weight's outputs.
            gathered: beside the weight as the projections use it; otherwise as it is stored.
        """
        ...

    def vector(self, values: Any, stage: Stage, kv_heads: int | None = None) -> Array:
        """Returns the part of [features, ...], which every device holds whole, for a stage."""
        ...

    def tokens(self, x: Array, stage: Stage) -> Array:
        """Returns the part of [T, ...], which every device holds whole, for a stage."""
        ...

    @property
    def num_shards(self) -> int:
        """Returns how many parts of a batch are attended to apart, each with its own cache."""
        ...

    @property
    def token_multiple(self) -> int:
        """Returns what divides the tokens of a shard's step."""
        ...

    def rows(self, batch: int) -> int:
        """Returns how many of a batch's sequences one device attends to."""
        ...

    def spread_rows(self, x: Array) -> Array:
        """Returns [R, ...] padded, so that `Stage.SAMPLED` can cut it, with its last row."""
        ...

    def gather_rows(self, x: Array) -> Array:
        """Returns the rows of all devices, given those of one at `Stage.SAMPLED`."""
        ...

    def total(self, x: Array, stage: Stage) -> Array:
        """Returns [T, 1], sums over the local features, summed over all features."""
        ...

    def local(self, spec: AttentionSpec) -> AttentionSpec:
        """Returns the attention that one device computes."""
        ...

    @property
    def num_stripes(self) -> int:
        """Returns into how many pieces every page is cut."""
        ...

    def stripe(self, spec: AttentionSpec) -> Stripe | None:
        """Returns the share of every page that is kept here; None where pages are whole."""
        ...

    def lookup(self, table: Array, tokens: Array, scales: Array | None, dtype: DTypeLike) -> Array:
        """Returns the rows of table[V, embed] at tokens int32[T], as the residual stream.

        Args:
            scales: float32[V] of a table of int8.
            dtype: of the result.
        """
        ...

    def take(self, x: Array, rows: Array | None) -> Array:
        """Returns rows int32[R] of the residual stream, or all, as the logits contract them."""
        ...


@dataclass(frozen=True)
class LocalComm:
    """One device holds everything: nothing moves."""

    @property
    def whole(self) -> bool:
        """Returns True."""
        return True

    def move(self, x: Array, source: Stage, target: Stage) -> Array:
        """Returns x."""
        return x

    def contract(self, x: Array, source: Stage, values: Array, dim: int, product: Product) -> Array:
        """Returns the product."""
        return product(x, values, x.dtype)

    def distribute(self, parts: Sequence[Part]) -> list[Array]:
        """Returns the parts with their biases."""
        return [_biased(part.x, part.bias) for part in parts]

    def weight(self, values: Array, axes: LogicalAxes) -> Array:
        """Returns the weight."""
        return values

    def scales(self, values: Array, axes: LogicalAxes, gathered: bool = True) -> Array:
        """Returns the scales."""
        return values

    def vector(self, values: Any, stage: Stage, kv_heads: int | None = None) -> Array:
        """Returns the vector."""
        return jnp.asarray(values)

    def tokens(self, x: Array, stage: Stage) -> Array:
        """Returns x."""
        return x

    @property
    def num_shards(self) -> int:
        """Returns 1."""
        return 1

    @property
    def token_multiple(self) -> int:
        """Returns 1."""
        return 1

    def rows(self, batch: int) -> int:
        """Returns the batch."""
        return batch

    def spread_rows(self, x: Array) -> Array:
        """Returns x."""
        return x

    def gather_rows(self, x: Array) -> Array:
        """Returns x."""
        return x

    def total(self, x: Array, stage: Stage) -> Array:
        """Returns x."""
        return x

    def local(self, spec: AttentionSpec) -> AttentionSpec:
        """Returns the spec."""
        return spec

    @property
    def num_stripes(self) -> int:
        """Returns 1."""
        return 1

    def stripe(self, spec: AttentionSpec) -> Stripe | None:
        """Returns None."""
        return None

    def lookup(self, table: Array, tokens: Array, scales: Array | None, dtype: DTypeLike) -> Array:
        """Returns the rows of the table."""
        return _rows(table, tokens, scales, dtype)

    def take(self, x: Array, rows: Array | None) -> Array:
        """Returns the rows."""
        return x if rows is None else jnp.take(x, rows, axis=0)


@dataclass(frozen=True)
class MeshComm:
    """Communication of a phase's layout on a mesh; for use inside `shard_map`.

    Attributes:
        phase: layout of prefill or decode.
        sizes: devices along each axis of the mesh, as (axis, size).
    """

    phase: PhaseLayout
    sizes: tuple[tuple[str, int], ...]

    @property
    def whole(self) -> bool:
        """Returns False."""
        return False

    def move(self, x: Array, source: Stage, target: Stage) -> Array:
        """Returns x[T, features, ...] of one stage as another needs it; scores go as they are."""
        plan = self._moves(self.placement(source), self.placement(target))
        return self._carry(x, plan, wire=source is not Stage.SCORED)

    def contract(self, x: Array, source: Stage, values: Array, dim: int, product: Product) -> Array:
        """Returns the product of x[T, features, ...], brought to `Stage.CONTRACTED`, and a weight.

        Where a gather over one axis comes last, its pieces may go around beside the product.
        """
        plan = self._moves(self.placement(source), self.placement(Stage.CONTRACTED))
        if not self.phase.goes_around(plan):
            return product(self._carry(x, plan), values, x.dtype)

        def terms(piece: Array, first: Array) -> Array:
            own = lax.dynamic_slice_in_dim(values, first, piece.shape[1], dim)
            return product(piece.astype(x.dtype), own, jnp.dtype("float32"))

        sent = self._sent(self._carry(x, plan[:-1]), Kind.ALL_GATHER)
        return gathered_product(sent, terms, plan[-1].axes[0], self.phase.overlap).astype(x.dtype)

    def distribute(self, parts: Sequence[Part]) -> list[Array]:
        """Returns what the first projections give, each where it is needed.

        Parts that begin with the same scatter share it.
        """
        plans = [
            self._moves(
                self.placement(Stage.PROJECTED, part.kv_heads),
                self.placement(part.target, part.kv_heads),
            )
            for part in parts
        ]
        arrays = [part.x for part in parts]
        firsts = [plan[0] if plan else None for plan in plans]
        for first in dict.fromkeys(firsts):
            if first is None or first.kind is not Kind.REDUCE_SCATTER:
                continue
            members = [i for i, other in enumerate(firsts) if other == first]
            scattered = self._scatter_bundled([parts[i] for i in members], first)
            for i, array in zip(members, scattered, strict=True):
                arrays[i] = array
                plans[i] = plans[i][1:]
        carried = [self._carry(x, plan) for x, plan in zip(arrays, plans, strict=True)]
        return [self._arrived(x, part) for x, part in zip(carried, parts, strict=True)]

    def weight(self, values: Array, axes: LogicalAxes) -> Array:
        """Returns a stored weight with these logical axes as the projections use it.

        [E.x, F.zy] stays so, or is gathered to [E, F.zy], [E, F.z] or [E, F] over x, xy or xyz.
        """
        sizes = dict(self.sizes)
        for dim in reversed(range(len(axes))):
            name, size = axes[dim]
            used = self.phase.used(name, size, sizes)
            stored = self.phase.stored(name, size, sizes)
            over = tuple(axis for axis in stored if axis not in used and sizes[axis] > 1)
            if over:
                values = lax.all_gather(values, over, axis=dim, tiled=True)
                # Or else XLA swaps gathers, or turns the weight around between them.
                values = lax.optimization_barrier(values)
        return values

    def scales(self, values: Array, axes: LogicalAxes, gathered: bool = True) -> Array:
        """Returns the part of a weight's scales, which every device holds whole, beside it."""
        sizes = dict(self.sizes)
        lies = self.phase.used if gathered else self.phase.stored
        for dim, (name, size) in enumerate(axes):
            values = self._cut(values, lies(name, size, sizes), dim)
        return values

    def vector(self, values: Any, stage: Stage, kv_heads: int | None = None) -> Array:
        """Returns the part of [features, ...], which every device holds whole, for a stage."""
        values = jnp.asarray(values)
        features = self.placement(stage, kv_heads).features
        own = self._cut(values, features, 0)
        return own if kv_heads is None else self._own_heads(own[None], kv_heads)[0]

    def tokens(self, x: Array, stage: Stage) -> Array:
        """Returns the part of [T, ...], which every device holds whole, for a stage."""
        return self._cut(x, self.placement(stage).tokens, 0)

    def spread_rows(self, x: Array) -> Array:
        """Returns [R, ...] padded, so that `Stage.SAMPLED` can cut it, with its last row."""
        count = self._count(self.placement(Stage.SAMPLED).tokens)
        pad = [(0, -x.shape[0] % count), *[(0, 0)] * (x.ndim - 1)]
        return jnp.pad(x, pad, mode="edge")

    def gather_rows(self, x: Array) -> Array:
        """Returns the rows of all devices, given those of one at `Stage.SAMPLED`."""
        axes = self.placement(Stage.SAMPLED).tokens
        return lax.all_gather(x, axes, axis=0, tiled=True) if axes else x

    @property
    def num_shards(self) -> int:
        """Returns how many parts of a batch are attended to apart, each with its own cache."""
        return self._count(self.placement(Stage.QUERY).tokens)

    @property
    def token_multiple(self) -> int:
        """Returns what divides the tokens of a shard's step."""
        stages = (Stage.RESIDUAL, Stage.HIDDEN, Stage.QUERY)
        most = max(self._count(self.placement(stage).tokens) for stage in stages)
        return most // math.gcd(most, self.num_shards)

    def rows(self, batch: int) -> int:
        """Returns how many of a batch's sequences one device attends to.

        Raises:
            UsageError: they do not divide over the devices.
        """
        axes = self.placement(Stage.QUERY).tokens
        if batch % self._count(axes):
            raise UsageError(
                f"{batch} sequences do not divide over {'*'.join(axes)}={self._count(axes)}; use a "
                "multiple of that, or attention by heads"
            )
        return batch // self._count(axes)

    def total(self, x: Array, stage: Stage) -> Array:
        """Returns [T, 1], sums over the local features, summed over all features."""
        axes = self.placement(stage).features
        return lax.psum(x, axes) if axes else x

    def local(self, spec: AttentionSpec) -> AttentionSpec:
        """Returns the attention that one device computes."""
        heads = spec.num_heads // self._count(self.placement(Stage.QUERY).features)
        group = spec.num_heads // spec.num_kv_heads
        return replace(spec, num_heads=heads, num_kv_heads=max(1, heads // group))

    @property
    def num_stripes(self) -> int:
        """Returns into how many pieces every page is cut."""
        return self._count(self.phase.stripes)

    def stripe(self, spec: AttentionSpec) -> Stripe | None:
        """Returns the share of every page that is kept here; None where pages are whole.

        Raises:
            UnsupportedError: the attention looks at distances, which a device's keys do not have.
        """
        if self.num_stripes == 1:
            return None
        if spec.window is not None or spec.alibi is not None:
            raise UnsupportedError(
                "attention='sequence' cuts pages over devices and serves neither windows nor "
                "ALiBi; use heads, batch or heads-batch"
            )
        axes = self.phase.stripes
        return Stripe(self.num_stripes, self._index(axes), axes)

    def lookup(self, table: Array, tokens: Array, scales: Array | None, dtype: DTypeLike) -> Array:
        """Returns the rows of table[V.zy, E.x] at tokens int32[T], as the residual stream."""
        if scales is not None:
            scales = self._cut(scales, self.phase.stored("vocab", len(scales), dict(self.sizes)), 0)
        axes = self.placement(Stage.EMBEDDED).partial
        order = tuple(axis for axis in HIDDEN_ORDER if axis in axes)
        index = tokens - self._index(order) * table.shape[0]
        here = (index >= 0) & (index < table.shape[0])
        rows = _rows(table, jnp.clip(index, 0, table.shape[0] - 1), scales, dtype)
        rows = jnp.where(here[:, None], rows, jnp.zeros_like(rows))
        return self.move(rows, Stage.EMBEDDED, Stage.RESIDUAL)

    def take(self, x: Array, rows: Array | None) -> Array:
        """Returns rows int32[R] of the residual stream, or all, as the logits contract them."""
        lies = self.placement(Stage.RESIDUAL)
        if rows is None:
            rows = jnp.arange(x.shape[0] * self._count(lies.tokens), dtype=jnp.int32)
        index = rows - self._index(lies.tokens) * x.shape[0]
        here = (index >= 0) & (index < x.shape[0])
        taken = jnp.take(x, jnp.clip(index, 0, x.shape[0] - 1), axis=0)
        if lies.tokens:
            taken = jnp.where(here[:, None], taken, jnp.zeros_like(taken))
        source = Placement((), lies.features, lies.tokens)
        return self._carry(taken, self._moves(source, self.placement(Stage.ENDS)))

    def _arrived(self, x: Array, part: Part) -> Array:
        """Returns a part with its bias; of keys and values, the heads that are read here."""
        x = x if part.kv_heads is None else self._own_heads(x, part.kv_heads)
        if part.bias is None:
            return x
        return _biased(x, self.vector(part.bias, part.target, part.kv_heads))

    def placement(self, stage: Stage, kv_heads: int | None = None) -> Placement:
        """Returns where a stage lies, axes of one device left out."""
        sizes = dict(self.sizes)
        if kv_heads is None:
            return self.phase.placement(stage).over(sizes)
        return self.phase.kv(stage, kv_heads, sizes).over(sizes)

    def _moves(self, source: Placement, target: Placement) -> list[Move]:
        return moves(source, target, [axis for axis, size in self.sizes if size > 1])

    def _count(self, axes: Sequence[str]) -> int:
        sizes, count = dict(self.sizes), 1
        for axis in axes:
            count *= sizes[axis]
        return count

    def _index(self, axes: Sequence[str]) -> Array:
        """Returns this device's piece of a dimension that `axes` cut."""
        index, sizes = jnp.zeros((), jnp.int32), dict(self.sizes)
        for axis in axes:
            index = index * sizes[axis] + lax.axis_index(axis)
        return index

    def _cut(self, x: Array, axes: Sequence[str], dim: int) -> Array:
        if not axes:
            return x
        size = x.shape[dim] // self._count(axes)
        return lax.dynamic_slice_in_dim(x, self._index(axes) * size, size, dim)

    def _own_heads(self, x: Array, kv_heads: int) -> Array:
        """Returns those of the key or value heads [T, K', H] that this device's queries read.

        There may be more where queries are cut further than these heads.
        """
        extra = self.placement(Stage.QUERY).features[
            len(self.placement(Stage.QUERY, kv_heads).features) :
        ]
        if not extra or x.shape[1] == 1:
            return x
        pieces = self._count(extra)
        size = max(1, x.shape[1] // pieces)
        return lax.dynamic_slice_in_dim(x, self._index(extra) * x.shape[1] // pieces, size, 1)

    def _carry(self, x: Array, plan: Sequence[Move], wire: bool = True) -> Array:
        for move in plan:
            sent = self._sent(x, move.kind) if wire else x
            x = self._one(sent, move).astype(x.dtype)
        return x

    def _sent(self, x: Array, kind: Kind) -> Array:
        """Returns activations in the element type in which they go to other devices."""
        return x.astype(self.phase.sent_as(kind, x.dtype.name))

    def _one(self, x: Array, move: Move) -> Array:
        dim = 0 if move.dim is Dim.TOKENS else 1
        match move.kind:
            case Kind.CUT:
                return self._cut(x, move.axes, dim)
            case Kind.ALL_REDUCE:
                return lax.psum(x, move.axes)
            case Kind.ALL_GATHER:
                return lax.all_gather(x, move.axes, axis=dim, tiled=True)
            case Kind.REDUCE_SCATTER:
                return self._scatter_together([x], move)[0]
            case Kind.ALL_TO_ALL:
                if move.to is Dim.TOKENS:
                    return self._to_tokens(x, move)
                return self._to_features(x, move)
            case Kind.PERMUTE:
                raise ValueError("pieces go around beside a product alone: see `contract`")

    def _scatter_bundled(self, parts: Sequence[Part], move: Move) -> list[Array]:
        """Returns [T, F, ...] {partial} summed and scattered in one collective.

        A bundle all of which is there goes as it is: its shares are the pieces.
        """
        counts = Counter(part.bundle for part in parts)
        own = [
            part.bundle
            if part.bundle is not None
            and counts[part.bundle] == len(part.bundle.widths)
            and (move.dim is Dim.TOKENS or part.bundle.shares == self._count(move.axes))
            else None
            for part in parts
        ]
        whole = list(dict.fromkeys(bundle for bundle in own if bundle is not None))
        alone = [part.x for part, bundle in zip(parts, own, strict=True) if bundle is None]
        arrays = [*(bundle.x for bundle in whole), *alone]
        sums = self._scatter_together([self._sent(x, move.kind) for x in arrays], move)
        found = [out.astype(x.dtype) for out, x in zip(sums, arrays, strict=True)]
        split = {b: iter(b.split(x)) for b, x in zip(whole, found[: len(whole)], strict=True)}
        rest = iter(found[len(whole) :])
        return [next(rest if bundle is None else split[bundle]) for bundle in own]

    def _scatter_together(self, arrays: Sequence[Array], move: Move) -> list[Array]:
        """Returns [T, F, ...] {partial} summed and scattered in one collective."""
        pieces, rows = self._count(move.axes), arrays[0].shape[0]
        if move.dim is Dim.TOKENS:
            flat = [x.reshape(rows, -1) for x in arrays]
            joined = flat[0] if len(flat) == 1 else jnp.concatenate(flat, axis=1)
            joined = joined.reshape(pieces, rows // pieces, -1)
            shapes = [(rows // pieces, *x.shape[1:]) for x in arrays]
        else:
            width = arrays[0].shape[-1] // pieces
            if len(arrays) == 1 and arrays[0].ndim == 2 and width % _LANES == rows % _TILE[0] == 0:
                return [lax.psum_scatter(arrays[0], move.axes, scatter_dimension=1, tiled=True)]
            # Without the barrier XLA would move the shuffle into the weights, in every step.
            flat = [lax.optimization_barrier(x).reshape(rows, pieces, -1) for x in arrays]
            joined = flat[0] if len(flat) == 1 else jnp.concatenate(flat, axis=2)
            joined = jnp.moveaxis(joined, 1, 0)
            shapes = [(rows, x.shape[1] // pieces, *x.shape[2:]) for x in arrays]
        out = _scattered(joined, move.axes)
        ends, found = 0, []
        for shape in shapes:
            width = 1
            for size in shape[1:]:
                width *= size
            found.append(out[:, ends : ends + width].reshape(shape))
            ends += width
        return found

    def _to_tokens(self, x: Array, move: Move) -> Array:
        """Returns [T.ab, F] for [T, F.ab]: tokens cut, features joined."""
        cut = [dict(self.sizes)[axis] for axis in move.token_axes]
        order = [move.token_axes.index(axis) for axis in move.axes]
        rest = (x.shape[0] // self._count(move.axes), *x.shape[1:])
        pieces = x.reshape(*cut, *rest).transpose(*order, *range(len(cut), len(cut) + len(rest)))
        pieces = pieces.reshape(-1, *rest)
        joined = lax.all_to_all(pieces, move.axes, split_axis=0, concat_axis=1)
        return joined.reshape(rest[0], -1, *x.shape[2:])

    def _to_features(self, x: Array, move: Move) -> Array:
        """Returns [T, F.ab] for [T.ab, F]: tokens joined, features cut."""
        count = self._count(move.axes)
        pieces = x.reshape(x.shape[0], count, -1, *x.shape[2:])
        joined = lax.all_to_all(pieces, move.axes, split_axis=1, concat_axis=0)
        rest = joined.shape[1:]
        came = joined.reshape(*(dict(self.sizes)[axis] for axis in move.axes), *rest)
        order = [move.axes.index(axis) for axis in move.token_axes]
        came = came.transpose(*order, *range(len(order), came.ndim))
        return came.reshape(-1, *rest[1:])


def _scattered(pieces: Array, axes: tuple[str, ...]) -> Array:
    """Returns [rows, F] of [pieces, rows, F] {partial}: this device's piece of the sum."""
    count, rows, width = pieces.shape
    tile, columns = _TILE
    if rows % tile and rows * width % (tile * columns) == 0:
        pieces = lax.optimization_barrier(pieces).reshape(count, -1, columns)
    out = lax.psum_scatter(pieces, axes, scatter_dimension=0, tiled=False)
    return out.reshape(rows, width)


def _rows(table: Array, index: Array, scales: Array | None, dtype: DTypeLike) -> Array:
    """Returns the rows of a table, of their scales where it is quantised."""
    parts = _column_parts(table, len(index))
    if parts == 1:
        rows = _by_rows(table, index)
    else:
        cut = partial(_by_columns, parts)
        rows = lax.platform_dependent(table, index, tpu=cut, default=_by_rows)
    if scales is None:
        return rows.astype(dtype)
    return (rows.astype(jnp.float32) * jnp.take(scales, index, axis=0)[:, None]).astype(dtype)


def _by_rows(table: Array, index: Array) -> Array:
    return jnp.take(table, index, axis=0)


def _by_columns(parts: int, table: Array, index: Array) -> Array:
    """Returns rows of a table that is cut into parts of its width."""
    columns = jnp.split(table, parts, axis=1)
    return jnp.concatenate([_by_rows(some, index) for some in columns], axis=1)


def _column_parts(table: Array, num_tokens: int) -> int:
    """Returns into how many parts a table is cut, so that a TPU can look up many tokens.

    A table that fits into fast memory is brought there, and made one of 32 bits by the lookup: 8
    MiB of int8 become 32 there, all that a program may have. A longer table is read where it lies,
    and few tokens are read one by one.
    """
    rounded = table.dtype == jnp.int8
    few, words = (256, 4 << 20) if rounded else (64, 15 << 19)
    if num_tokens <= few or not words < table.size <= (32 << 20) // table.dtype.itemsize:
        return 1
    least, lanes = -(-table.size // (4 << 20)), table.shape[1] / 128
    return next((parts for parts in range(least, int(lanes) + 1) if lanes % parts == 0), 1)


def _biased(x: Array, bias: Array | None) -> Array:
    return x if bias is None else x + jnp.broadcast_to(bias, x.shape)
