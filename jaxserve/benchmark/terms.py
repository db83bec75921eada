"""Runs the terms of a step one by one, each at the size that a device has.

    made = Terms(llm.program, coster, Load(batch=8, new=1, context=80), dtype, seconds=0.05)
    [(line.name, line.measured_s) for line in made.lines()]

What runs is what the model runs: its kernels, the engine's cache, sampler and collectives. A device
runs alone here; those of one processor share it in the step itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from jaxserve.partitioning.estimate import Coster, Estimate, Part
from jaxserve.partitioning.layout import Stage
from jaxserve.partitioning.placement import Kind
from jaxserve.partitioning.work import Product, Run
from jaxserve.serving.generation import Program

PAGE_SIZE = 16
"""Tokens of a page, as engines have it unless they are told otherwise."""


@dataclass(frozen=True)
class Line:
    """A term of a step, estimated and measured in seconds.

    Attributes:
        name: what it is.
        kind: "product", "attention", "embedding", "sampling", "collective", "layers", "overlap",
            "host" or "step".
        phase: "decode" or "prefill".
        measured_s: None where it cannot be measured by itself; `note` then says why.
    """

    name: str
    kind: str
    phase: str
    estimated_s: float
    measured_s: float | None
    note: str = ""


@dataclass(frozen=True)
class Load:
    """A step: sequences, tokens of each in it, and of each before it."""

    batch: int
    new: int
    context: int

    @property
    def phase(self) -> str:
        """Returns "decode" or "prefill"."""
        return "decode" if self.new == 1 else "prefill"


@dataclass(frozen=True)
class Terms:
    """The terms of one step.

    Attributes:
        program: what the step is built from, with the communication of its phase.
        coster: what estimates it.
        load: the step.
        sampling: int32[NUM_COLUMNS], the parameters of a request as slots have them.
        seconds: that a term may take.
    """

    program: Program
    coster: Coster
    load: Load
    sampling: Any
    seconds: float

    @property
    def estimate(self) -> Estimate:
        """Returns the estimate of the step."""
        return self.coster.estimate(self.load.batch, self.load.new, self.load.context)

    def lines(self) -> Iterator[Line]:
        """Yields the terms in the order in which a step has them; of host and step none."""
        yield self._embedding()
        for op in self.coster.share.products:
            rows = -(-self._tokens // op.cut)
            yield self._line(op.name, "product", op.turns * self._product(op, rows))
        yield self._attention()
        yield from self._collectives()
        head = replace(self.coster.share.logits, name="logits")
        yield self._line("logits", "product", self._product(head, self.load.batch))
        yield self._sampling()
        yield self._aside("layers", "what a step takes beyond its terms is theirs")
        if (hidden := self._expected("overlap")) != 0:
            note = "terms ran one after another"
            yield Line("overlap", "overlap", self.load.phase, hidden, None, note)

    @property
    def _tokens(self) -> int:
        return int(self.coster.share.tokens(self.load.batch, self.load.new))

    @property
    def _dtype(self) -> Any:
        import jax.numpy as jnp

        return jnp.dtype(self.program.model.declare.dtype)

    def _expected(self, *names: str) -> float:
        terms = self.estimate.terms
        return sum(
            float(t.seconds) for t in terms if t.name in names and t.part is not Part.COLLECTIVE
        )

    def _line(self, name: str, kind: str, took: float) -> Line:
        return Line(name, kind, self.load.phase, self._expected(name), took)

    def _aside(self, name: str, note: str) -> Line:
        return Line(name, name, self.load.phase, self._expected(name), None, note)

    def _best(self, run: Callable[[], Any]) -> float:
        from jaxserve.planner.calibrate import best_time

        return best_time(run, self.seconds)

    def _embedding(self) -> Line:
        """Measures the rows of a device's part of the table."""
        import jax
        import jax.numpy as jnp

        from jaxserve.partitioning.collectives import LocalComm

        share = self.coster.share
        cut, pieces = share.pieces(Stage.EMBEDDED)
        columns = share.config.embed_dim // pieces
        rows = share.logits.stored // columns
        table, scales = self._weight((rows, columns), rows)
        index = jnp.arange(-(-self._tokens // cut), dtype=jnp.int32) % rows
        run = jax.jit(LocalComm().lookup, static_argnums=3)
        took = self._best(lambda: run(table, index, scales, self._dtype))
        return self._line("embedding", "embedding", took)

    def _weight(self, shape: tuple[int, ...], outputs: int) -> tuple[Any, Any]:
        """Returns a weight as it is stored, and its scales float32[outputs], None of most."""
        import jax.numpy as jnp

        if self.program.model.declare.quantize is None:
            return jnp.ones(shape, self._dtype), None
        return jnp.ones(shape, jnp.int8), jnp.ones(outputs, jnp.float32)

    def _product(self, op: Product, rows: int) -> float:
        """Returns the seconds of one layer's product of so many rows."""
        import jax
        import jax.numpy as jnp

        from jaxserve.layers.linear import mode_for

        declare, kernels = self.program.model.declare, self.program.kernels
        if op.experts > 1:
            return self._experts(op, rows)
        quantize = None if op.name in ("logits", "router") else declare.quantize
        dtype = jnp.dtype("float32") if op.name in ("logits", "router") else self._dtype
        order = "out_in" if op.name == "logits" else declare.orientation.value
        shape = (op.outer, op.inner) if order == "out_in" else (op.inner, op.outer)
        x = jnp.ones((rows, op.inner), self._dtype)
        if op.name == "router":
            weight, scales = jnp.ones(shape, self._dtype), None
        else:
            weight, scales = self._weight(shape, op.outer)

        def run(x: Any, weight: Any, scales: Any) -> Any:
            if scales is None:
                return kernels.matmul(x, weight, 1, order, dtype)
            return kernels.int8_matmul(x, weight, scales, 1, order, dtype, mode=mode_for(quantize))

        step = jax.jit(run)
        return self._best(lambda: step(x, weight, scales))

    def _experts(self, op: Product, rows: int) -> float:
        """Returns the seconds of the product of rows that are spread evenly over the experts."""
        import jax
        import jax.numpy as jnp

        from jaxserve.layers.linear import mode_for

        x = jnp.ones((rows * op.taken, op.inner), self._dtype)
        weight, scales = self._weight((op.experts, op.outer, op.inner), op.outer)
        if scales is not None:
            scales = jnp.ones((op.experts, op.outer), jnp.float32)
        each, more = divmod(rows * op.taken, op.experts)
        sizes = jnp.array([each + (i < more) for i in range(op.experts)], jnp.int32)
        mode = mode_for(self.program.model.declare.quantize)

        def run(x: Any, weight: Any, scales: Any) -> Any:
            return self.program.kernels.ragged_matmul(
                x, weight, sizes, self._dtype, scales=scales, mode=mode
            )

        step = jax.jit(run)
        return self._best(lambda: step(x, weight, scales))

    def _attention(self) -> Line:
        """Measures the engine's cache: new keys and values are kept, and all are attended to."""
        took = sum(run.turns * self._attend(run) for run in self.coster.share.runs)
        names = "attention", "keys and values read", "keys and values written"
        name = "attention, keys and values"
        return Line(name, "attention", self.load.phase, self._expected(*names), took)

    def _attend(self, layers: Run) -> float:
        import jax
        import jax.numpy as jnp

        from jaxserve.config import cache_spec
        from jaxserve.layers.cache import At
        from jaxserve.serving.kv_cache import CacheGeometry, GroupGeometry, PagedCache

        kernels, declare = self.program.kernels, self.program.model.declare
        share, load = self.coster.share, self.load
        spec = self.program.comm.local(layers.layer.attention)
        kept = cache_spec(spec, declare.cache_dtype)
        rows, stripes = int(share.local_rows(load.batch)), share.stripes
        size = max(PAGE_SIZE // stripes, 1)
        keys = -(-(load.context + load.new) // stripes)
        width = -(-keys // size)
        group = GroupGeometry(kept, (0,), rows * width, width)
        each = (load.context + jnp.arange(load.new, dtype=jnp.int32)) // stripes
        row = jnp.arange(rows, dtype=jnp.int32)
        cache = PagedCache(
            [],
            (jnp.arange(rows * width, dtype=jnp.int32).reshape(rows, width),),
            jnp.repeat(row, load.new),
            jnp.arange(rows + 1, dtype=jnp.int32) * load.new,
            jnp.full(rows, keys, jnp.int32),
            CacheGeometry(size, (group,)),
            load.new == 1,
            jnp.tile(each, rows),
        )
        tokens = rows * load.new
        q, k = (
            jnp.ones((tokens, heads, spec.head_dim), self._dtype)
            for heads in (spec.num_heads, spec.num_kv_heads)
        )
        slopes = None if spec.alibi is None else jnp.ones(spec.num_heads, jnp.float32)

        def attend(pages: Any, cache: PagedCache, q: Any, k: Any) -> tuple[Any, Any]:
            held = replace(cache, pages=[pages])
            out, after = held.attend(At(0), q, k, k, spec, kernels, slopes=slopes)
            return out, after.pages[0]

        step = jax.jit(attend, donate_argnums=0)
        pages = kernels.init_pages(rows * width, size, kept)

        def run() -> Any:
            nonlocal pages
            out, pages = step(pages, cache, q, k)
            return out

        return self._best(run)

    def _sampling(self) -> Line:
        """Measures how a device draws the next tokens of its rows, within the likeliest ones."""
        import jax.numpy as jnp
        import numpy as np

        from jaxserve.serving.options import history_tokens
        from jaxserve.serving.slot_sampler import sample_slots
        from jaxserve.serving.slot_state import Needs, SlotState, admit

        config = self.program.model.config
        rows = -(-self.load.batch // math.prod(self.coster.share.sizes.values()))
        logits = jnp.zeros((rows, config.vocab_size), jnp.float32)
        slots = jnp.arange(rows, dtype=jnp.int32)
        state = SlotState.create(rows, history_tokens(config))
        state = admit(state, slots, jnp.asarray(np.stack([self.sampling] * rows)))
        at = jnp.full(rows, self.load.context + self.load.new, jnp.int32)
        needs = jnp.int32(int(Needs.DRAW | Needs.FILTER))
        took = self._best(lambda: sample_slots(logits, at, state, slots, needs))
        return self._line("sampling", "sampling", took)

    def _collectives(self) -> Iterator[Line]:
        tokens, rows = self._tokens, self.load.batch
        each = self.coster.kept.weights.bits / 8
        terms = [term for term in self.estimate.terms if term.part is Part.COLLECTIVE]
        for flow, term in zip(self.coster.traffic.flows, terms, strict=True):
            full = flow.per_token * tokens + flow.per_row * rows + each * flow.weights
            full /= flow.count
            run = collective(flow.kind, flow.axes, int(full), self.program.mesh)
            name = f"{flow.count} x {flow.kind} over {' '.join(flow.axes)}"
            took = flow.count * self._best(run)
            yield Line(name, "collective", self.load.phase, float(term.seconds), took)


def collective(kind: str, axes: tuple[str, ...], full: int, mesh: Any) -> Callable[[], Any]:
    """Returns a function that runs one collective of a tensor of `full` bytes on all devices."""
    import jax
    import jax.numpy as jnp
    from jax import lax
    from jax.sharding import PartitionSpec

    count = math.prod(mesh.shape[axis] for axis in axes)
    size = max(full // 4 // count, 1) * count
    local = size // count if kind == Kind.ALL_GATHER else size
    hops = count - 1
    if kind == Kind.PERMUTE:
        local = max(full // 4 // hops, 1)

    def body(x: Any) -> Any:
        match kind:
            case Kind.ALL_GATHER:
                return lax.all_gather(x, axes, tiled=True)
            case Kind.REDUCE_SCATTER:
                return lax.psum_scatter(x, axes, tiled=True)
            case Kind.ALL_TO_ALL:
                return lax.all_to_all(x, axes, 0, 0, tiled=True)
            case Kind.PERMUTE:
                pairs = [(place, (place + 1) % count) for place in range(count)]
                for _ in range(hops):
                    x = lax.ppermute(x, axes, pairs)
                return x
        return lax.psum(x, axes)

    spec = PartitionSpec(tuple(mesh.shape))
    run = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    x = jnp.ones(local * mesh.size, jnp.float32)
    return lambda: run(x)
