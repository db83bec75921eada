"""Runs plans: one executable per shape, the pool and the slots on the device.

    runner = ModelRunner(program, params, geometry, Ladder.of(512, 32), num_slots=32)
    runner.warm_up()                                   # compiles every shape, in threads
    ticket = runner.dispatch(plan)                     # returns at once
    result = runner.collect(ticket)                    # StepResult, when the step is done

A plan may be dispatched before the one before it is collected: the newest tokens, the pool and the
slots stay on the device. The host mirrors the page tables and sends each step the rows it needs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np
from jax import export

from jaxserve.errors import JaxserveError
from jaxserve.layers.decoder import Params
from jaxserve.partitioning.layout import Stage
from jaxserve.serving.batch import Ladder, StepShape, by_shard, pack, part_of
from jaxserve.serving.generation import Program
from jaxserve.serving.kv_cache import CacheGeometry, copy_pages, create_pool, padded_copies
from jaxserve.serving.program_store import ProgramStore
from jaxserve.serving.request import Request, TokenLogprob
from jaxserve.serving.sampler import Processor
from jaxserve.serving.scheduler import Admission, RowKind, StepPlan
from jaxserve.serving.sharded import (
    BY_DEVICE,
    EVERYWHERE,
    abstract,
    abstract_params,
    own,
    param_specs,
    shown,
    spread,
)
from jaxserve.serving.slot_state import (
    NUM_COLUMNS,
    Needs,
    SlotState,
    admit,
    admit_vocabulary,
    needs,
    param_row,
    vocabulary_rows,
)
from jaxserve.serving.step import StepOutput, serving_step

CompileReport = Callable[[str, float], None]
"""Called with what was compiled and the seconds it took."""

ADMITTED_AT_ONCE = 8
COPIED_AT_ONCE = 8


class Runner(Protocol):
    """What the engine drives; plans run in the order in which they are dispatched."""

    def dispatch(self, plan: StepPlan) -> Any:
        """Returns a ticket for a plan's results, without waiting for them."""
        ...

    def collect(self, ticket: Any) -> StepResult:
        """Returns the results, once they are there."""
        ...

    def reset(self) -> None:
        """Forgets pages and slots, after a step that failed."""
        ...


@dataclass(frozen=True)
class StepLogprobs:
    """Log-probabilities of one step, on the host; see `StepOutput`.

    Attributes:
        rows: rows of the plan that sample.
        starts: first token of each row.
        tokens: the prompt's tokens after each token of a row, where they are wanted.
    """

    output: StepOutput
    rows: Sequence[int]
    starts: Sequence[int]
    tokens: Sequence[Sequence[int]]

    def row(self, index: int, count: int) -> TokenLogprob:
        """Returns that of the token drawn by the `index`-th sampling row, and the likeliest."""
        row, o = self.rows[index], self.output
        top = _top(o.top_tokens[row], o.top_logprobs[row], count)
        return TokenLogprob(int(o.tokens[row]), float(o.logprobs[row]), top)

    def prompt(self, row: int, count: int) -> list[TokenLogprob]:
        """Returns those of the prompt's tokens that follow the tokens of a row."""
        o, out = self.output, []
        for at, token in enumerate(self.tokens[row], self.starts[row]):
            top = _top(o.prompt_top_tokens[at], o.prompt_top_logprobs[at], count)
            out.append(TokenLogprob(token, float(o.prompt_logprobs[at]), top))
        return out


def _top(tokens: Any, logprobs: Any, count: int) -> tuple[tuple[int, float], ...]:
    return tuple(zip(tokens[:count].tolist(), logprobs[:count].tolist(), strict=True))


@dataclass(frozen=True)
class StepResult:
    """Results of one step.

    Attributes:
        tokens: of the rows that sample, in plan order.
        ready_s: `time.perf_counter()` when they were there; where they were there before anybody
            looked, the last moment at which the device is known to have worked on them.
        counts: tokens of each such row; None means one each.
        logprobs: where a row asked for them.
    """

    tokens: list[int]
    ready_s: float
    counts: list[int] | None = None
    logprobs: StepLogprobs | None = None


@dataclass(frozen=True)
class _Places:
    """Where a plan's rows and their first tokens are in a step of several shards."""

    rows: list[int]
    tokens: list[int]


@dataclass
class Ticket:
    """A step under way; the runner alone writes `busy_s`, when it last was not done."""

    output: StepOutput
    plan: StepPlan
    needs: Needs
    following: list[list[int]]
    places: _Places | None
    busy_s: float

    def look(self) -> bool:
        """Returns whether the step is finished, and notes the time if it is not."""
        tokens: Any = self.output.tokens
        if tokens.is_ready():
            return True
        self.busy_s = time.perf_counter()
        return False


@dataclass(frozen=True)
class Processed:
    """Names a step whose tokens are chosen by what a processor makes of the logits."""

    shape: StepShape
    processor: Processor


class CompiledLateError(JaxserveError):
    """A step had to be compiled although serving was ready."""


class ModelRunner:
    """The runner of a model; itself the only writer of pool, slots, tables and executables.

    Args:
        geometry: sizes of the pool.
        ladder: shapes of steps.
        num_slots: running sequences.
        history_tokens: longest sequence that penalties look at.
        report: called after each compilation.
        strict: a compilation after `warm_up` raises.
    """

    def __init__(
        self,
        program: Program,
        params: Params,
        geometry: CacheGeometry,
        ladder: Ladder,
        num_slots: int,
        history_tokens: int,
        report: CompileReport | None = None,
        strict: bool = False,
    ) -> None:
        self.program = program
        self.params = params
        self.geometry = geometry
        self.ladder = ladder
        self.num_slots = num_slots
        self.compiles_after_ready = 0
        self.processor: Processor | None = None
        self._history_tokens = history_tokens
        self._report = report
        self._strict = strict
        self._ready = False
        self._traced: ProgramStore | None = None
        self._results: Any = None
        self._executables: dict[Any, Any] = {}
        self._shapes = jax.eval_shape(self._empty)
        self._param_specs = EVERYWHERE if program.mesh is None else param_specs(program)
        self.reset()

    def reset(self) -> None:
        """Forgets pages and slots; the next plan gets empty ones."""
        self._arrays: tuple[Any, SlotState] | None = None
        self._newest: Ticket | None = None
        self._last_ready_s = 0.0
        rows = self.num_slots + 1
        self._tables = [np.zeros((rows, width), np.int32) for width in self.geometry.widths]
        self._needs: Any = np.zeros(rows, np.int32)
        self._prompts: dict[int, tuple[int, ...]] = {}

    def process_by(self, processor: Processor | None) -> None:
        """Chooses tokens by a processor from the next plan on; no sequence may have a slot.

        Steps compiled for another processor are let go of.
        """
        if processor is not None:
            self._executables = {
                key: program
                for key, program in self._executables.items()
                if not isinstance(key, Processed) or key.processor is processor
            }
        self.processor = processor

    def _empty(self) -> tuple[Any, SlotState]:
        """Returns an empty pool and empty slots."""
        program = self.program

        def create() -> tuple[Any, SlotState]:
            pool = create_pool(program.model, self.geometry, program.kernels)
            return shown(program, pool), SlotState.create(self.num_slots, self._history_tokens)

        if program.mesh is None:
            return create()
        return jax.jit(spread(program, create, (), (BY_DEVICE, EVERYWHERE)))()

    def dispatch(self, plan: StepPlan) -> Ticket:
        """Returns a ticket for the plan's results, without waiting for them."""
        if self._newest is not None:
            self._newest.look()
        if self._arrays is None:
            self._arrays = self._empty()
        self._admit(plan.admissions)
        for group, writes in enumerate(plan.writes):
            if writes:
                slots, columns, pages = zip(*writes, strict=True)
                self._tables[group][slots, columns] = pages
        for group, copies in enumerate(plan.copies):
            self._copy(group, copies)
        wanted = Needs(int(np.bitwise_or.reduce(self._needs[plan.slots])))
        following: list[list[int]] = []
        last: list[int] = []
        if wanted & Needs.PROMPT_LOGPROBS:
            following = [self._following(plan, row) for row in range(len(plan.slots))]
            last = [tokens[-1] if tokens else 0 for tokens in following]
        shape, packed, places = self._packed(plan, wanted, last)
        by = self.processor
        step = self._executable(shape if by is None else Processed(shape, by))
        # A step that is done when it is first looked at was not done before it began.
        began_s = time.perf_counter()
        output, *after = step(self.params, *self._arrays, packed)
        self._arrays = after[0], after[1]
        output.tokens.copy_to_host_async()
        self._newest = Ticket(output, plan, wanted, following, places, began_s)
        self._newest.look()
        return self._newest

    def _packed(
        self, plan: StepPlan, wanted: Needs, last: list[int]
    ) -> tuple[StepShape, np.ndarray, _Places | None]:
        """Returns (shape, the plan in one array, where its rows are; None: in its order)."""
        shards = self.program.comm.num_shards
        if shards == 1:
            shape = self.ladder.fit(sum(plan.counts), len(plan.slots))
            return shape, pack(plan, shape, self._tables, wanted, last), None
        rows = by_shard(plan, shards, self.num_slots // shards)
        most_rows = max(map(len, rows))
        tokens = max(sum(plan.counts[row] for row in members) for members in rows)
        single = all(count == 1 for count in plan.counts)
        shape = self.ladder.fit(most_rows if single else max(tokens, most_rows + 1), most_rows)
        places = _Places([0] * len(plan.slots), [0] * len(plan.slots))
        parts = []
        for shard, members in enumerate(rows):
            after = [last[row] for row in members] if last else []
            parts.append(pack(part_of(plan, members), shape, self._tables, wanted, after))
            token = shard * shape.num_tokens
            for index, row in enumerate(members):
                places.rows[row], places.tokens[row] = shard * shape.num_rows + index, token
                token += plan.counts[row]
        return shape, np.concatenate(parts), places

    def collect(self, ticket: Ticket) -> StepResult:
        """Returns the results, once they are there."""
        waits = not ticket.look()
        tokens = np.asarray(ticket.output.tokens)
        # A step cannot have been done before the one before it was.
        ready = time.perf_counter() if waits else max(ticket.busy_s, self._last_ready_s)
        self._last_ready_s = ready
        plan = ticket.plan
        rows = [row for row, kind in enumerate(plan.kinds) if kind != RowKind.CHUNK]
        lie = rows if ticket.places is None else [ticket.places.rows[row] for row in rows]
        in_order = ticket.places is None and len(rows) == len(plan.slots)
        found = tokens[: len(rows)] if in_order else tokens[lie]
        logprobs = None
        if ticket.needs & (Needs.LOGPROBS | Needs.PROMPT_LOGPROBS):
            starts = np.cumsum([0, *plan.counts]).tolist()
            if ticket.places is not None:
                starts = ticket.places.tokens
            host = jax.device_get(ticket.output)
            logprobs = StepLogprobs(host, lie, starts, ticket.following)
        return StepResult(found.tolist(), ready, logprobs=logprobs)

    def update(self, params: Params) -> None:
        """Takes other weights of the same shapes; nothing is compiled again."""
        self.params = params
        self.reset()

    def warm_up(self, advance: Callable[[int], None] = lambda amount: None) -> None:
        """Compiles everything that serving can need, and counts what is compiled later.

        Args:
            advance: called with 1 after each of the `num_executables` compilations.
        """
        keys = [key for key in self._keys() if key not in self._executables]
        advance(self.num_executables - len(keys))
        self._traced = self._store()
        if self._traced is not None:  # all steps give the same tree
            step, arguments = self._step(min(self.ladder.shapes(), key=lambda s: s.num_tokens))
            self._results = jax.tree.structure(jax.eval_shape(step, *arguments))

        def ready(key: Any) -> None:
            self._compile(key)
            advance(1)

        with ThreadPoolExecutor(max_workers=_COMPILERS) as threads:
            list(threads.map(ready, keys))
        if self._traced is not None:
            self._traced.prune()
        self._traced = None
        self._ready = True

    def _store(self) -> ProgramStore | None:
        """Returns where the steps of this runner are kept, traced; of one device only."""
        devices = {d for a in jax.tree.leaves(self.params) for d in _devices_of(a)}
        if len(devices) != 1:
            return None
        shapes = jax.tree_util.tree_flatten_with_path((_shapes_of(self.params), self._shapes))[0]
        program, model = self.program, self.program.model
        parts = [model.config, model.declare, program.comm, program.kernels, self.geometry]
        parts += [self.num_slots, self._history_tokens]
        parts += [(jax.tree_util.keystr(path), leaf) for path, leaf in shapes]
        return ProgramStore.of([repr(part) for part in parts], devices.pop())

    def compile_largest(self) -> None:
        """Compiles the step with the most tokens, which needs the most memory."""
        self._executable(
            max(self.ladder.shapes(), key=lambda shape: (shape.num_tokens, shape.num_rows))
        )

    @property
    def array_bytes(self) -> dict[str, int]:
        """Returns the bytes of what stays on one device: weights, pages and slots."""
        pages, state = self._shapes
        mesh = self.program.mesh
        devices = 1 if mesh is None else mesh.size
        return {
            "weights": sum(map(_bytes_on_device, jax.tree.leaves(self.params))),
            "pages": sum(map(_bytes_on_device, jax.tree.leaves(pages))) // devices,
            "slots": sum(map(_bytes_on_device, jax.tree.leaves(state))),
        }

    @property
    def kv_tokens(self) -> int:
        """Returns the tokens that the pools of all shards hold."""
        return self.program.comm.num_shards * self.geometry.num_tokens

    @property
    def num_executables(self) -> int:
        """Returns how many programs `warm_up` has ready."""
        return len(self._keys())

    def executables(self) -> dict[Any, Any]:
        """Returns the compiled programs by shape or name."""
        return dict(self._executables)

    def _keys(self) -> list[Any]:
        copies = [("copy", group) for group in range(len(self.geometry.groups))]
        return [*reversed(self.ladder.shapes()), "admit", "vocabulary", *copies]

    def _following(self, plan: StepPlan, row: int) -> list[int]:
        """Returns the prompt's tokens after each token of a row, if the row asked for them."""
        slot = plan.slots[row]
        if slot not in self._prompts or plan.kinds[row] == RowKind.DECODE:
            return []
        start = plan.starts[row] + 1
        return list(self._prompts[slot][start : start + plan.counts[row]])

    def _admit(self, admissions: Sequence[Admission]) -> None:
        """Uploads the parameters of sequences that get a slot."""
        for at in range(0, len(admissions), ADMITTED_AT_ONCE):
            some = admissions[at : at + ADMITTED_AT_ONCE]
            slots: Any = np.full(ADMITTED_AT_ONCE, self.num_slots, np.int32)
            slots[: len(some)] = [a.slot for a in some]
            rows = [param_row(a.request, a.sample_index) for a in some]
            rows += [np.zeros_like(rows[0])] * (ADMITTED_AT_ONCE - len(some))
            self._change_state("admit", slots, np.stack(rows))
        for admission in admissions:
            slot, request = admission.slot, admission.request
            self._needs[slot] = needs(request)
            self._prompts.pop(slot, None)
            if request.params.prompt_logprobs is not None:
                self._prompts[slot] = request.prompt
            if self._needs[slot] & Needs.ADJUST or self.processor is not None:
                self._admit_vocabulary(slot, request, admission.tokens)

    def _admit_vocabulary(self, slot: int, request: Request, tokens: Sequence[int]) -> None:
        rows = vocabulary_rows([request], [tokens], self._history_tokens)
        slots = np.array([slot], np.int32)
        self._change_state("vocabulary", slots, rows)

    def _change_state(self, key: str, *uploads: Any) -> None:
        assert self._arrays is not None
        pages, state = self._arrays
        self._arrays = pages, self._executable(key)(state, *uploads)

    def _copy(self, group: int, copies: Sequence[tuple[int, int, int]]) -> None:
        shards = range(self.program.comm.num_shards)
        pairs = [[(a, b) for shard, a, b in copies if shard == one] for one in shards]
        for at in range(0, max(map(len, pairs)), COPIED_AT_ONCE):
            each = [padded_copies(p[at : at + COPIED_AT_ONCE], COPIED_AT_ONCE) for p in pairs]
            some = [np.concatenate(side) for side in zip(*each, strict=True)]
            assert self._arrays is not None
            pages, state = self._arrays
            self._arrays = self._executable(("copy", group))(pages, *some), state

    def _executable(self, key: Any) -> Any:
        """Returns a compiled program, compiled now if it has to be."""
        if key not in self._executables:
            if self._ready:
                self.compiles_after_ready += 1
                if self._strict:
                    raise CompiledLateError(f"{key} was not compiled before serving was ready")
            self._compile(key)
        return self._executables[key]

    def _compile(self, key: Any) -> None:
        began = time.perf_counter()
        self._executables[key] = self.lowered(key).compile()
        if self._report is not None:
            self._report(_label(key), time.perf_counter() - began)

    def _step(
        self, shape: StepShape, processor: Processor | None = None
    ) -> tuple[Any, tuple[Any, ...]]:
        """Returns the function of a step and the shapes of its arguments."""
        program = self.program
        size = program.comm.num_shards * shape.size(self.geometry.widths)
        packed = jax.ShapeDtypeStruct((size,), np.int32)

        def step(params: Params, pages: Any, state: SlotState, packed: Any) -> Any:
            held = own(program, pages)
            output, pages, state = serving_step(
                program, shape, self.geometry, params, held, state, packed, processor
            )
            return output, shown(program, pages), state

        specs = (self._param_specs, BY_DEVICE, EVERYWHERE, EVERYWHERE)
        pages, state = self._shapes
        arguments = (
            abstract_params(program),
            abstract(program, pages, BY_DEVICE),
            abstract(program, state),
            abstract(program, packed),
        )
        return spread(program, step, specs, (EVERYWHERE, BY_DEVICE, EVERYWHERE)), arguments

    def lowered(self, key: Any) -> Any:
        """Returns the program of a shape or name, lowered from shapes alone."""
        program = self.program
        pages, state = self._shapes
        pages, state = abstract(program, pages, BY_DEVICE), abstract(program, state)
        if isinstance(key, Processed):
            step, arguments = self._step(key.shape, key.processor)
            return jax.jit(step, donate_argnums=(1, 2)).lower(*arguments)
        if isinstance(key, StepShape):
            step, arguments = self._step(key)
            if (store := self._traced) is not None:
                name = _label(key)
                traced = store.load(name) or store.save(name, _exported(step, arguments))
                step = _called(traced, self._results)
            return jax.jit(step, donate_argnums=(1, 2)).lower(*arguments)
        if key == "admit":
            slots = np.zeros(ADMITTED_AT_ONCE, np.int32)
            rows = np.zeros((ADMITTED_AT_ONCE, NUM_COLUMNS), np.int32)
            return jax.jit(admit, donate_argnums=0).lower(state, slots, rows)
        if key == "vocabulary":
            rows = vocabulary_rows([], [], self._history_tokens)
            one = jax.tree.map(lambda a: np.zeros((1, *a.shape[1:]), a.dtype), rows)
            slots = np.zeros(1, np.int32)
            return jax.jit(admit_vocabulary, donate_argnums=0).lower(state, slots, one)
        _, group = key
        indices = jax.ShapeDtypeStruct((program.comm.num_shards * COPIED_AT_ONCE,), np.int32)
        indices = abstract(program, indices)

        def copy(pages: Any, *pairs: jax.Array) -> Any:
            source, target = (program.comm.tokens(x, Stage.QUERY) for x in pairs)
            held, kernels = own(program, pages), program.kernels
            return shown(program, copy_pages(held, self.geometry, group, source, target, kernels))

        run = spread(program, copy, (BY_DEVICE, EVERYWHERE, EVERYWHERE), BY_DEVICE)
        return jax.jit(run, donate_argnums=0).lower(pages, indices, indices)


_COMPILERS = 4
"""Threads that compile; XLA's compiler runs outside Python's lock."""


def _bytes_on_device(leaf: Any) -> int:
    """Returns the bytes of an array, or of a shape, on each device that holds a part of it."""
    sharding = getattr(leaf, "sharding", None)
    shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize


def _shapes_of(tree: Any) -> Any:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)


def _exported(step: Any, arguments: Sequence[Any]) -> export.Exported:
    """Returns the portable form of a step, from the leaves of its arguments to its results'."""
    leaves, tree = jax.tree.flatten(tuple(arguments))

    def flat(*leaves: Any) -> list[Any]:
        return jax.tree.leaves(step(*jax.tree.unflatten(tree, leaves)))

    return export.export(jax.jit(flat))(*leaves)


def _called(exported: export.Exported, results: Any) -> Any:
    """Returns the step of a portable form; `results` is the tree of what it gives."""

    def step(*arguments: Any) -> Any:
        return jax.tree.unflatten(results, exported.call(*jax.tree.leaves(arguments)))

    return step


def _devices_of(leaf: Any) -> list[Any]:
    """Returns where an array lies; an abstract one without a place lies where JAX puts it."""
    sharding = getattr(leaf, "sharding", None)
    return jax.devices()[:1] if sharding is None else list(sharding.device_set)


def _label(key: Any) -> str:
    """Returns what a program does, for people."""
    match key:
        case StepShape():
            return f"step: {key}"
        case Processed():
            return f"step with a processor: {key.shape}"
        case "admit" | "vocabulary":
            return f"upload of sampling parameters ({key})"
        case _:
            return f"copy of pages in group {key[1]}"
