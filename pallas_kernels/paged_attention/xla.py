"""Attention over pages through XLA: a query's bits depend on its own sequence alone.

Keys are reduced in blocks of KEY_BLOCK at fixed positions, in order, whatever the size of a page,
the other sequences or the way a prompt was cut. Within a block every contraction runs over the
last dimension of both operands with two rows or more, which XLA computes row by row in the same
way for every number of rows; that is why values lie transposed. A row of ones beside the values
makes the softmax denominator one of these products. A block of which a query sees nothing changes
nothing: its weights are exact zeros and the factor for what stands is exactly one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from jaxserve.config import AttentionSpec, CacheSpec
from jaxserve.errors import UnsupportedError
from jaxserve.pallas_kernels.attention.scores import alibi_bias, capped
from jaxserve.pallas_kernels.paged_attention.places import (
    Extra,
    column,
    row_of_tokens,
    write_places,
)
from jaxserve.pallas_kernels.paged_attention.rounding import finite, rounded

KEY_BLOCK = 128
"""Keys reduced at once."""

QUERY_BLOCK = 128
"""Queries of one sequence taken at once, where it has several."""

LANES = 16
"""Sequences taken together."""

FEW = 2
"""So few go on alone once the others' keys are all seen."""

MAX_SINGLE = 8
"""Most queries a sequence may have for each of them to be taken alone."""

_LOWEST = float(jnp.finfo(jnp.float32).min)


class Pages(NamedTuple):
    """Keys [P, K, page_size, H] and values [P, K, H + 1, page_size].

    The last row of the values is one wherever a token is kept.

    Attributes:
        scales: of keys and of values, both float32[P, K, page_size]; None where they have none.
    """

    keys: Array
    values: Array
    scales: tuple[Array, Array] | None = None


class _Blocks(NamedTuple):
    """Blocks of keys that items read, in the order they are read.

    Attributes:
        total: int32[I], blocks of each item.
        number: int32[I, N], where a block lies among the sequence's keys; -1 where there is none.
        key_runs, value_runs: int32[I, N, KEY_BLOCK / run], first of the runs of a block's keys and
            values in `Pages`, where a run is a page's share of a block.
    """

    total: Array
    number: Array
    key_runs: Array
    value_runs: Array


class _Items(NamedTuple):
    """Runs of queries, each of one sequence.

    Attributes:
        q, q_sink: [I, K, Q, G, H].
        q_pos: int32[I, Q], -1 where there is none.
        blocks: what they read.
    """

    q: Array
    q_sink: Array | None
    q_pos: Array
    blocks: _Blocks


class _Partial(NamedTuple):
    """Attention over some blocks: maximum and weighted values with their total.

    Attributes:
        top: float32[I, K, Q * G, 1].
        out: float32[I, K, Q * G, H + 1].
    """

    top: Array
    out: Array


class _Call(NamedTuple):
    """What does not change over the items of one call."""

    pages: Pages
    slopes: Array | None
    spec: AttentionSpec
    page_size: int
    pinned_pages: int
    sink_tokens: int

    @property
    def sink_blocks(self) -> int:
        """Returns the blocks that hold sink keys."""
        return -(-self.sink_tokens // KEY_BLOCK)

    @property
    def runs_per_page(self) -> int:
        """Returns the blocks that share a page, 1 where a block takes whole pages."""
        return max(1, self.page_size // KEY_BLOCK)


def init_pages(num_pages: int, page_size: int, spec: CacheSpec) -> Pages:
    """Returns empty pages; see `reference.init_pages`.

    Raises:
        UnsupportedError: pages and blocks of keys do not fit into each other.
    """
    if KEY_BLOCK % page_size and page_size % KEY_BLOCK:
        raise UnsupportedError(
            f"page_size={page_size} neither divides {KEY_BLOCK} nor is a multiple of it; "
            "use 16, 32, 64, 128 or 256"
        )
    _, heads, head = spec.token_shape
    keys = jnp.zeros((num_pages, heads, page_size, head), spec.dtype)
    values = jnp.zeros((num_pages, heads, head + 1, page_size), spec.dtype)
    if not spec.scaled:
        return Pages(keys, values)
    scales = jnp.zeros((num_pages, heads, page_size), jnp.float32)
    return Pages(keys, values, (scales, jnp.zeros_like(scales)))


def write_pages(
    pages: Pages,
    k: Array,
    v: Array,
    page_table: Array,
    row_of_token: Array,
    positions: Array,
    *,
    page_size: int,
    pinned_pages: int = 0,
) -> Pages:
    """Returns the pages with k and v[T, K, H] at their places; see `reference.write_pages`."""
    keys, values, scales = pages
    page, offset = write_places(
        page_table, row_of_token, positions, keys.shape[0], page_size, pinned_pages
    )
    if scales is None:
        k, v = k.astype(keys.dtype), finite(v.astype(values.dtype))
    else:
        (k, k_scales), (v, v_scales) = rounded(k, keys.dtype), rounded(finite(v), values.dtype)
        scales = (
            scales[0].at[page, :, offset].set(k_scales, mode="drop"),
            scales[1].at[page, :, offset].set(v_scales, mode="drop"),
        )
    v = jnp.concatenate([v, jnp.ones((*v.shape[:2], 1), values.dtype)], axis=2)
    return Pages(
        keys.at[page, :, offset].set(k, mode="drop"),
        values.at[page, :, :, offset].set(v, mode="drop"),
        scales,
    )


def write_and_attend(
    q: Array,
    k: Array,
    v: Array,
    pages: Pages,
    page_table: Array,
    row_of_token: Array,
    q_start: Array,
    kv_len: Array,
    q_pos: Array,
    spec: AttentionSpec,
    *,
    page_size: int,
    pinned_pages: int = 0,
    sink_tokens: int = 0,
    q_sink: Array | None = None,
    slopes: Array | None = None,
    max_query: int | None = None,
) -> tuple[Array, Pages]:
    """Returns (attention [T, N, H], the pages with k and v); see `reference.write_and_attend`."""
    places: dict[str, Any] = {"page_size": page_size, "pinned_pages": pinned_pages}
    pages = write_pages(pages, k, v, page_table, row_of_token, q_pos, **places)
    out = paged_attention(
        q, pages, page_table, q_start, kv_len, q_pos, spec,
        sink_tokens=sink_tokens, q_sink=q_sink, slopes=slopes, max_query=max_query, **places,
    )  # fmt: skip
    assert isinstance(out, jax.Array)
    return out, pages


def copy_pages(pages: Pages, source: Array, destination: Array) -> Pages:
    """Returns the pages with pages int32[C] copied, all read before any is written."""
    return jax.tree.map(lambda x: x.at[destination].set(x[source]), pages)


def paged_attention(
    q: Array,
    pages: Pages,
    page_table: Array,
    q_start: Array,
    kv_len: Array,
    q_pos: Array,
    spec: AttentionSpec,
    *,
    page_size: int,
    pinned_pages: int = 0,
    sink_tokens: int = 0,
    q_sink: Array | None = None,
    slopes: Array | None = None,
    sink_logits: Array | None = None,
    mask: Array | None = None,
    scales: tuple[Array, Array] | None = None,
    outputs: Sequence[Extra] = (),
    max_query: int | None = None,
) -> Array | tuple[Array, ...]:
    """Returns softmax(scale q k + bias) v as [T, N, H]; see `reference.paged_attention`.

    Raises:
        UnsupportedError: an option is set that only the reference has.
    """
    options = {"sink_logits": sink_logits, "mask": mask, "scales": scales}
    refused = [name for name, value in options.items() if value is not None]
    refused += [f"outputs={name}" for name in outputs if name is not Extra.LSE]
    if refused:
        raise UnsupportedError(
            f"backend='xla' has no {', '.join(refused)} in paged_attention; use 'reference'"
        )
    q_sink = None if spec.window is None else q_sink
    static = spec, page_size, pinned_pages, sink_tokens, max_query
    out, lse = _attention(q, q_sink, slopes, pages, page_table, q_start, q_pos, *static)
    return (out, *(lse for _ in outputs)) if outputs else out


@partial(jax.jit, static_argnums=(7, 8, 9, 10, 11))
def _attention(
    q: Array,
    q_sink: Array | None,
    slopes: Array | None,
    pages: Pages,
    page_table: Array,
    q_start: Array,
    q_pos: Array,
    spec: AttentionSpec,
    page_size: int,
    pinned_pages: int,
    sink_tokens: int,
    max_query: int | None,
) -> tuple[Array, Array]:
    """Returns (out [T, N, H], lse float32[T, N]); traced once for all layers that are alike."""
    call = _Call(pages, slopes, spec, page_size, pinned_pages, sink_tokens)
    if max_query is not None and max_query <= MAX_SINGLE:
        return _singles(call, q, q_sink, page_table, q_start, q_pos, max_query)
    return _mixed(call, q, q_sink, page_table, q_start, q_pos)


def _singles(
    call: _Call,
    q: Array,
    q_sink: Array | None,
    page_table: Array,
    q_start: Array,
    q_pos: Array,
    max_query: int,
) -> tuple[Array, Array]:
    """Returns (out, lse) with every token an item of its own."""
    tokens = q.shape[0]
    if max_query == 1 and tokens == page_table.shape[0]:
        table = page_table
    else:
        table = page_table[row_of_tokens(q_start, tokens)]
    position = q_pos[:, None]
    blocks = _blocks(call, position, table)
    items = _Items(
        _by_item(q, call),
        None if q_sink is None else _by_item(q_sink, call),
        position,
        blocks,
    )
    out, lse = _attend(call, items)
    return out.reshape(q.shape).astype(q.dtype), lse.reshape(q.shape[:2])


def _mixed(
    call: _Call,
    q: Array,
    q_sink: Array | None,
    page_table: Array,
    q_start: Array,
    q_pos: Array,
) -> tuple[Array, Array]:
    """Returns (out, lse): sequences with one token together, the others in runs of queries."""
    tokens = q.shape[0]
    out, lse = _runs(call, q, q_sink, page_table, q_start, q_pos)
    single = q_start[1:] - q_start[:-1] == 1
    first = jnp.minimum(q_start[:-1], tokens - 1)
    position = jnp.where(single, q_pos[first], -1)[:, None]
    items = _Items(
        _by_item(q[first], call),
        None if q_sink is None else _by_item(q_sink[first], call),
        position,
        _blocks(call, position, page_table),
    )
    one_out, one_lse = _attend(call, items)
    at = jnp.where(single, first, tokens)
    out = out.at[at].set(one_out.reshape(-1, *q.shape[1:]).astype(q.dtype), mode="drop")
    return out, lse.at[at].set(one_lse.reshape(-1, q.shape[1]), mode="drop")


def _runs(
    call: _Call,
    q: Array,
    q_sink: Array | None,
    page_table: Array,
    q_start: Array,
    q_pos: Array,
) -> tuple[Array, Array]:
    """Returns (out, lse) of the sequences with several tokens, one run of queries at a time."""
    tokens, rows = q.shape[0], page_table.shape[0]
    counts = q_start[1:] - q_start[:-1]
    runs = jnp.where(counts > 1, lax.div(counts + QUERY_BLOCK - 1, QUERY_BLOCK), 0)
    ends = jnp.cumsum(runs)
    # Every sequence may end in a run of its own.
    most = tokens // QUERY_BLOCK + min(rows, -(-tokens // 2))
    index = jnp.arange(most, dtype=jnp.int32)
    row = jnp.minimum(jnp.sum(ends[None, :] <= index[:, None], axis=1), rows - 1)
    starts = q_start[row] + (index - (ends[row] - runs[row])) * QUERY_BLOCK
    token = starts[:, None] + jnp.arange(QUERY_BLOCK, dtype=jnp.int32)[None, :]
    inside = token < q_start[row + 1][:, None]
    positions = jnp.where(inside, q_pos[jnp.clip(token, 0, tokens - 1)], -1)
    blocks = _blocks(call, positions, page_table[row])
    pad = ((0, QUERY_BLOCK), (0, 0), (0, 0))
    wide_q = jnp.pad(q, pad)
    wide_sink = None if q_sink is None else jnp.pad(q_sink, pad)

    def cut(x: Array, at: Array) -> Array:
        return lax.dynamic_slice_in_dim(x, at, QUERY_BLOCK)

    def run(index: Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
        start, here, position, some = jax.tree.map(
            lambda x: lax.dynamic_slice_in_dim(x, index, 1), (starts, inside, positions, blocks)
        )
        items = _Items(
            _by_item(cut(wide_q, start[0])[None], call),
            None if wide_sink is None else _by_item(cut(wide_sink, start[0])[None], call),
            position,
            some,
        )
        after = []
        for old, fresh in zip(found, _attend(call, items), strict=True):
            fresh = fresh[0].reshape(QUERY_BLOCK, *old.shape[1:]).astype(old.dtype)
            mask = here[0].reshape(-1, *[1] * (old.ndim - 1))
            fresh = jnp.where(mask, fresh, cut(old, start[0]))
            after.append(lax.dynamic_update_slice_in_dim(old, fresh, start[0], 0))
        return after[0], after[1]

    empty = jnp.zeros_like(wide_q), jnp.full(wide_q.shape[:2], -jnp.inf, jnp.float32)
    out, lse = lax.fori_loop(0, ends[-1], run, empty)
    return out[:tokens], lse[:tokens]


def _by_item(q: Array, call: _Call) -> Array:
    """Returns [I, K, Q, G, H] for q[I, N, H] (one query an item) or [I, Q, N, H]."""
    q = q[:, None] if q.ndim == 3 else q
    items, length, num_heads, head = q.shape
    heads = call.spec.num_kv_heads
    return q.reshape(items, length, heads, num_heads // heads, head).swapaxes(1, 2)


def _attend(call: _Call, items: _Items) -> tuple[Array, Array]:
    """Returns (out float32[I, Q, K, G, H], lse float32[I, Q, K, G])."""
    count, heads, length, group, head = items.q.shape
    spare = -count % LANES if count > LANES else 0
    items = jax.tree.map(lambda x: jnp.pad(x, ((0, spare), *[(0, 0)] * (x.ndim - 1))), items)
    shape = count + spare, heads, length * group
    empty = _Partial(jnp.full((*shape, 1), _LOWEST), jnp.zeros((*shape, head + 1)))
    start = jnp.zeros((), jnp.int32)
    if count > FEW:
        order = jnp.argsort(items.blocks.total, stable=True, descending=True)
        longest_first = jax.tree.map(lambda x: x[order], items)
        found = _turns(call, longest_first, start, empty)
        found = jax.tree.map(lambda x: x[jnp.argsort(order)[:count]], found)
    else:
        found = _turns(call, items, start, empty)
    total = found.out[..., head:]
    out = found.out[..., :head] / jnp.where(total > 0, total, 1.0)
    lse = jnp.where(total > 0, jnp.log(total) + found.top, -jnp.inf)
    return (
        out.reshape(count, heads, length, group, head).swapaxes(1, 2),
        lse.reshape(count, heads, length, group).swapaxes(1, 2),
    )


def _turns(call: _Call, items: _Items, start: Array, so_far: _Partial) -> _Partial:
    """Returns attention with the blocks from the `start`-th of every item on.

    Where there are many items, those with more blocks come first. Each turn takes the next block
    of those that have one left, LANES at a time; the last few go on alone.
    """
    count = items.blocks.total
    size = len(count)
    few = FEW if size > FEW else 0
    lanes = min(LANES, size)
    end = jnp.maximum(count[few], start) if few else jnp.max(count)

    def turn(index: Array, so_far: _Partial) -> _Partial:
        if size == lanes:
            return _add_block(call, items, index, so_far)

        def group(number: Array, so_far: _Partial) -> _Partial:
            at = number * lanes
            some, before = jax.tree.map(
                lambda x: lax.dynamic_slice_in_dim(x, at, lanes), (items, so_far)
            )
            after = _add_block(call, some, index, before)
            return jax.tree.map(
                lambda old, new: lax.dynamic_update_slice_in_dim(old, new, at, 0), so_far, after
            )

        active = jnp.sum(count > index)
        return lax.fori_loop(0, lax.div(active + lanes - 1, lanes), group, so_far)

    so_far = lax.fori_loop(start, end, turn, so_far)
    if not few:
        return so_far
    longest, begun = jax.tree.map(lambda x: x[:few], (items, so_far))
    found = _turns(call, longest, end, begun)
    return jax.tree.map(lambda new, old: jnp.concatenate([new, old[few:]]), found, so_far)


def _blocks(call: _Call, q_pos: Array, table: Array) -> _Blocks:
    """Returns what queries at int32[I, Q] read through page tables int32[I, W]."""
    width = table.shape[1]
    last = jnp.max(q_pos, axis=1)
    count = lax.div(last + KEY_BLOCK, KEY_BLOCK)
    room = -(-width * call.page_size // KEY_BLOCK)
    turn = jnp.arange(room, dtype=jnp.int32)[None, :]
    number = turn
    if call.spec.window is not None:
        # A window that does not begin with a block reaches into one more.
        turn = jnp.arange(room + 1 + call.sink_blocks, dtype=jnp.int32)[None, :]
        far = jnp.iinfo(jnp.int32).max
        oldest = jnp.min(jnp.where(q_pos < 0, far, q_pos), axis=1) - call.spec.window + 1
        sinks = jnp.minimum(call.sink_blocks, count)
        first = jnp.minimum(lax.div(jnp.maximum(oldest, 0), KEY_BLOCK), count)
        first = jnp.maximum(first, sinks)
        number = jnp.where(turn < call.sink_blocks, turn, first[:, None] + turn - call.sink_blocks)
        count = sinks + count - first
    number = jnp.where(turn < count[:, None], number, -1)
    run = min(call.page_size, KEY_BLOCK)
    within = jnp.arange(0, KEY_BLOCK, run, dtype=jnp.int32)[None, None, :]
    place = jnp.maximum(number, 0)[:, :, None] * KEY_BLOCK + within
    columns = column(lax.div(place, call.page_size), width, call.pinned_pages)
    page = jnp.take_along_axis(table[:, None, :], columns, axis=2, mode="clip")
    part = lax.rem(lax.div(place, KEY_BLOCK), call.runs_per_page)
    _, heads, rows, _ = call.pages.values.shape
    runs = [page * (runs * call.runs_per_page) + part for runs in (heads, heads * rows)]
    return _Blocks(count, number, *runs)


def _add_block(call: _Call, items: _Items, turn: Array, so_far: _Partial) -> _Partial:
    """Returns attention with one more block of keys, the `turn`-th of every item that has it."""
    count, heads, length, group, _ = items.q.shape
    number, *runs = (lax.dynamic_index_in_dim(x, turn, 1, False) for x in items.blocks[1:])
    keys, values, k_scales = _block_of(call, items.q.dtype, *runs)
    k_pos = number[:, None] * KEY_BLOCK + jnp.arange(KEY_BLOCK, dtype=jnp.int32)[None, :]
    scores = _scores(items.q, keys, k_scales)
    seen = (k_pos[:, None] <= items.q_pos[:, :, None]) & (k_pos >= 0)[:, None]
    if call.spec.window is not None:
        sinks = k_pos < call.sink_tokens
        near = items.q_pos[:, :, None] - k_pos[:, None] < call.spec.window
        seen = seen & (near | sinks[:, None])
        if items.q_sink is not None:
            turned = _scores(items.q_sink, keys, k_scales)
            scores = jnp.where(sinks[:, None, None, None], turned, scores)
    scores = capped(scores * call.spec.score_scale, call.spec)
    if call.spec.alibi is not None:
        bias = alibi_bias(call.spec.alibi, heads * group, k_pos, call.slopes)
        scores = scores + bias.reshape(count, heads, 1, group, KEY_BLOCK)
    seen = seen[:, None, :, None]
    scores = jnp.where(seen, scores, _LOWEST)
    top = jnp.max(scores, axis=-1).reshape(so_far.top.shape)
    top = jnp.maximum(top, so_far.top)
    weights = jnp.exp(scores - top.reshape(*scores.shape[:-1], 1))
    weights = jnp.where(seen, weights, 0.0).astype(values.dtype)
    added = _dot(weights.reshape(count, heads, length * group, KEY_BLOCK), values)
    # One rounding or two: in a fused multiply-add, XLA's choice, which varies with the shapes.
    kept = lax.optimization_barrier(so_far.out * jnp.exp(so_far.top - top))
    return _Partial(top, kept + added)


def _scores(q: Array, keys: Array, scales: Array | None) -> Array:
    """Returns float32[I, K, Q, G, KEY_BLOCK]; `scales` float32[I, K, KEY_BLOCK] are the keys'."""
    count, heads, length, group, head = q.shape
    flat = q.reshape(count, heads, length * group, head)
    found = _dot(flat, keys.astype(q.dtype)).reshape(*q.shape[:-1], KEY_BLOCK)
    return found if scales is None else found * scales[:, :, None, None, :]


def _dot(x: Array, y: Array) -> Array:
    """Returns float32[I, K, M, J], x[I, K, M, C] times y[I, K, J, C]; never with a single row."""
    rows = x.shape[2]
    x = jnp.concatenate([x, x], axis=2) if rows == 1 else x
    out = lax.dot_general(
        x,
        y,
        (((3,), (3,)), ((0, 1), (0, 1))),
        precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    return out[:, :, :rows]


def _block_of(
    call: _Call, dtype: DTypeLike, key_runs: Array, value_runs: Array
) -> tuple[Array, Array, Array | None]:
    """Returns (keys [I, K, KEY_BLOCK, H], values [I, K, H + 1, KEY_BLOCK], scales of the keys).

    They are those of one block an item. Values that have scales are of `dtype`, by their scales.
    """
    keys, values, scales = call.pages
    heads, head, rows = keys.shape[1], keys.shape[3], values.shape[2]
    run = KEY_BLOCK // key_runs.shape[1]
    head_index = jnp.arange(heads, dtype=jnp.int32) * call.runs_per_page
    row_index = jnp.arange(heads * rows, dtype=jnp.int32) * call.runs_per_page
    key_runs = key_runs[:, None] + head_index[None, :, None]
    value_runs = value_runs[:, None] + row_index[None, :, None]
    # XLA fuses what stands before and after into the gather, whose loop then computes indices
    # for every element; kept apart it copies whole runs, more than ten times faster.
    key_runs, value_runs = lax.optimization_barrier((key_runs, value_runs))
    k = keys.reshape(-1, run * head).at[key_runs].get(mode="promise_in_bounds")
    v = values.reshape(-1, run).at[value_runs].get(mode="promise_in_bounds")
    both = [x.reshape(-1, run).at[key_runs].get(mode="promise_in_bounds") for x in scales or ()]
    k, v, *both = lax.optimization_barrier((k, v, *both))
    shape = len(key_runs), heads
    k, v = k.reshape(*shape, KEY_BLOCK, head), v.reshape(*shape, rows, KEY_BLOCK)
    if scales is None:
        return k, v, None
    k_scales, v_scales = (x.reshape(*shape, KEY_BLOCK) for x in both)
    real = jnp.arange(rows)[:, None] < rows - 1  # the row of ones stays
    wide = v.astype(jnp.float32) * jnp.where(real, v_scales[:, :, None, :], 1.0)
    return k, wide.astype(dtype), k_scales
