"""Random commands against the scheduler, a device that obeys its plans, and a reference model.

The device keeps numbers instead of keys and values: the number at a position stands for all tokens
up to it. Every row finds the numbers of all positions that it sees through its page table, so a
page that is missing, given up too early, shared by mistake or copied too late is noticed. The next
token follows from the number, and so the reference model knows every completion by its request.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import NamedTuple

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from jaxserve.errors import CapacityError, QueueFullError
from jaxserve.serving.pages import column
from jaxserve.serving.request import Request, SamplingParams
from jaxserve.serving.scheduler import (
    Admission,
    Event,
    GroupLimits,
    RowKind,
    Scheduler,
    SchedulerConfig,
    StepPlan,
)
from jaxserve.serving.sequence import State

VOCAB = 11
STOP = 0
UNWRITTEN = -1
REJECTED = -2
MOST_STEPS = 20_000
COMMANDS = 50_000
EXAMPLES = 500
MOST_RUN = 20


def fold(before: int, token: int) -> int:
    """Returns the number of a position, from the one before it and its token."""
    return (before * 1_000_003 + token * 7919 + 12345) % (2**61 - 1)


def numbers(tokens: Items[int]) -> list[int]:
    out: list[int] = []
    for token in tokens:
        out.append(fold(out[-1] if out else 1, token))
    return out


def next_token(number: int, request: Request, sample_index: int) -> int:
    return (number // 7 + request.params.seed * 31 + sample_index * 5) % VOCAB  # type: ignore[operator]


@dataclass
class Slot:
    """A row of the device's batch."""

    admission: Admission
    tokens: list[int]
    numbers: list[int]

    def add(self, token: int) -> None:
        self.tokens.append(token)
        self.numbers.append(fold(self.numbers[-1], token))

    def sample(self) -> int:
        return next_token(self.numbers[-1], self.admission.request, self.admission.sample_index)


class Result(NamedTuple):
    number: int
    tokens: list[int]
    counts: list[int] | None


class Device:
    """Obeys plans at once, in order."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.widths = [config.table_width(group) for group in range(len(config.groups))]
        self.pinned = [-(-g.sink_tokens // config.page_size) for g in config.groups]
        self.pool = [
            [[[UNWRITTEN] * config.page_size for _ in range(g.num_pages)] for g in config.groups]
            for _ in range(config.num_shards)
        ]
        rows = config.num_shards * config.num_slots
        self.tables = [[[UNWRITTEN] * width for _ in range(rows)] for width in self.widths]
        self.slots: dict[int, Slot] = {}

    def run(self, plan: StepPlan) -> Result:
        for admission in plan.admissions:
            tokens = list(admission.tokens)
            self.slots[admission.slot] = Slot(admission, tokens, numbers(tokens))
        for group, copies in enumerate(plan.copies):
            for shard, source, destination in copies:
                self.pool[shard][group][destination] = list(self.pool[shard][group][source])
        for group, writes in enumerate(plan.writes):
            assert len({write[:2] for write in writes}) == len(writes), "one entry set twice"
            for slot, index, page in writes:
                self.tables[group][slot][index] = page
        rows = list(zip(plan.slots, plan.counts, plan.starts, plan.kinds, strict=True))
        assert len(set(plan.slots)) == len(rows), "a slot has two rows"
        assert sorted(plan.kinds, key=bool) == plan.kinds, "DECODE rows come first"
        budget = [0] * self.config.num_shards
        for slot, count, *_ in rows:
            budget[slot // self.config.num_slots] += count
        assert max(budget) <= self.config.max_step_tokens

        given = iter(plan.tokens)
        work: list[tuple[int, int, int, int]] = []
        for slot, count, start, kind in rows:
            state = self.slots[slot]
            if kind == RowKind.DECODE:
                exact = len(state.tokens) - 1
                assert exact <= start, "the start is no upper bound"
                assert exact == start or self.config.tokens_per_step > 1
            else:
                exact = start
                tokens = [next(given) for _ in range(count)]
                assert tokens == state.tokens[start : start + count], "other tokens"
                last = start + count == len(state.tokens)
                assert last == (kind == RowKind.LAST)
            work.append((slot, exact, count, kind))
            self._write(slot, exact, count)
        assert next(given, None) is None, "tokens are left over"
        # All rows write before any of them reads, as in the layers of a model.
        for slot, start, count, _ in work:
            self._read(slot, start, count)
        return self._sample(plan.number, work)

    def _cell(self, slot: int, group: int, position: int) -> tuple[list[int], int]:
        size = self.config.page_size
        where = column(position // size, self.widths[group], self.pinned[group])
        page = self.tables[group][slot][where]
        assert page != UNWRITTEN, f"no page for position {position} of group {group}"
        shard = slot // self.config.num_slots
        return self.pool[shard][group][page], position % size

    def _write(self, slot: int, start: int, count: int) -> None:
        known = self.slots[slot].numbers
        for group in range(len(self.config.groups)):
            for position in range(start, start + count):
                page, offset = self._cell(slot, group, position)
                page[offset] = known[position] if position < len(known) else REJECTED

    def _read(self, slot: int, start: int, count: int) -> None:
        """Checks every key that the row's queries see, drafts left out."""
        known = self.slots[slot].numbers
        end = min(start + count, len(known))
        for group, limits in enumerate(self.config.groups):
            window = end if limits.window is None else limits.window
            first = max(0, start - window + 1)
            for position in (*range(min(limits.sink_tokens, first)), *range(first, end)):
                page, offset = self._cell(slot, group, position)
                assert page[offset] == known[position], (
                    f"slot {slot}, group {group}: position {position} was overwritten"
                )

    def _sample(self, number: int, work: list[tuple[int, int, int, int]]) -> Result:
        tokens: list[int] = []
        counts: list[int] = []
        for slot, start, count, kind in work:
            if kind == RowKind.CHUNK:
                continue
            state = self.slots[slot]
            accepted = 1
            if kind == RowKind.DECODE and self.config.tokens_per_step > 1:
                accepted = fold(state.numbers[-1], number) // 3 % (count + 1)
            for offset in range(accepted):
                token = state.sample()
                tokens.append(token)
                state.add(token)
                if kind == RowKind.DECODE and offset + 1 < accepted:
                    self._accept(slot, start + offset + 1)
            counts.append(accepted)
        single = self.config.tokens_per_step == 1
        return Result(number, tokens, None if single else counts)

    def _accept(self, slot: int, position: int) -> None:
        for group in range(len(self.config.groups)):
            page, offset = self._cell(slot, group, position)
            page[offset] = self.slots[slot].numbers[position]


@dataclass
class Expected:
    """What the model knows of one completion or beam."""

    tokens: list[int]
    over: bool = False


@dataclass
class Known:
    """What the model knows of one request."""

    request: Request
    arrival: int
    max_length: int
    started: bool = False
    samples: dict[int, Expected] = field(default_factory=dict)
    waiting_beams: set[int] = field(default_factory=set)


class Harness:
    """A scheduler, its device and the reference model; every method is one command."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.scheduler = Scheduler(config)
        self.device = Device(config)
        self.results: deque[Result] = deque()
        self.requests: dict[str, Known] = {}
        self.arrivals = 0
        self.commands = 0

    def add(self, request: Request) -> None:
        self.commands += 1
        waiting = [known for known in self.requests.values() if not known.started]
        queued = sum(len(known.request.prompt) for known in waiting)
        length = len(request.prompt) + request.params.max_tokens  # type: ignore[operator]
        if self.config.max_context_tokens is not None:
            length = min(length, self.config.max_context_tokens)
        expected = None
        if not self._can_ever_fit(length):
            expected = CapacityError
        elif (
            len(waiting) >= self.config.max_queued_requests
            or queued + len(request.prompt) > self.config.max_queued_tokens
        ):
            expected = QueueFullError
        try:
            self.scheduler.add(request)
        except (CapacityError, QueueFullError) as error:
            assert type(error) is expected
        else:
            assert expected is None
            self.arrivals += 1
            known = Known(request, self.arrivals, length)
            known.samples = {i: Expected(list(request.prompt)) for i in range(request.params.n)}
            self.requests[request.id] = known
        self.check()

    def _can_ever_fit(self, length: int) -> bool:
        return all(
            min(-(-(length - 1) // self.config.page_size), self.config.table_width(group))
            <= limits.num_pages
            for group, limits in enumerate(self.config.groups)
        )

    def abort(self, name: str) -> None:
        self.commands += 1
        assert self.scheduler.abort(name) is (name in self.requests)
        self.requests.pop(name, None)
        self.check()

    def finish(self, name: str, index: int, num_tokens: int) -> None:
        self.commands += 1
        known = self.requests[name]
        self.scheduler.finish(name, index, num_tokens)
        self._end(known, index)
        self.check()

    def _end(self, known: Known, index: int) -> None:
        known.samples[index].over = True
        if all(sample.over for sample in known.samples.values()):
            del self.requests[known.request.id]

    def schedule(self) -> bool:
        """Returns whether there was a plan."""
        self.commands += 1
        decoding = self._must_decode()
        before = self.scheduler.stats().preemptions
        full = len(self.results) >= self.config.max_in_flight
        plan = self.scheduler.schedule()
        assert not (full and plan), "too many plans are in flight"
        if plan is not None:
            assert plan.slots, "a plan without rows"
            self._check_order(plan)
            self.results.append(self.device.run(plan))
            rows = set(plan.slots)
            if self.scheduler.stats().preemptions == before:
                assert decoding <= rows, "a running decode was stalled"
        self.check()
        return plan is not None

    def _must_decode(self) -> set[int]:
        """Returns the slots of sequences that are past their prompt and have room to go on."""
        return {
            sequence.slot
            for sequences in self.scheduler._open.values()
            for sequence in sequences
            if sequence.state is State.RUNNING
            and not sequence.is_beam
            and sequence.computed < sequence.max_length - 1
        }

    def _check_order(self, plan: StepPlan) -> None:
        """Checks that new requests start in order: by priority, then by age."""
        for admission in plan.admissions:
            known = self.requests[admission.request.id]
            if known.started:
                continue
            known.started = True
            if self.config.policy == "fcfs":
                turn = known.request.priority, known.arrival
                for other in self.requests.values():
                    passed = not other.started and (other.request.priority, other.arrival) < turn
                    assert not passed, f"{known.request.id} started before {other.request.id}"

    def commit(self) -> None:
        self.commands += 1
        result = self.results.popleft()
        for event in self.scheduler.commit(result.number, result.tokens, result.counts):
            self._take(event)
        self.check()

    def _take(self, event: Event) -> None:
        sequence = event.sequence
        known = self.requests[sequence.request.id]
        sample = known.samples[sequence.sample_index]
        assert not sample.over, "an event after the end"
        for token in event.tokens:
            last = numbers(sample.tokens)[-1]
            assert token == next_token(last, known.request, sequence.sample_index)
            sample.tokens.append(token)
        if sequence.is_beam:
            sample.tokens.pop()
            known.waiting_beams.add(sequence.sample_index)
            assert event.finish_reason is None
            return
        output = len(sample.tokens) - len(known.request.prompt)
        least = known.request.params.min_tokens or 0
        stops = sample.tokens[-1] in known.request.stop_ids and output > least
        reason = None
        if stops:
            reason = "stop"
        elif len(sample.tokens) == known.max_length:
            reason = "length"
        assert event.finish_reason == reason
        if reason is not None:
            self._end(known, sequence.sample_index)

    def advance(self, name: str, choices: list[tuple[int, int]]) -> None:
        self.commands += 1
        known = self.requests[name]
        self.scheduler.advance(name, choices)
        known.waiting_beams.clear()
        known.samples = {
            index: Expected([*known.samples[parent].tokens, token])
            for index, (parent, token) in enumerate(choices)
        }
        if not choices:
            del self.requests[name]
        self.check()

    def ready_searches(self) -> list[str]:
        """Returns the beam searches that wait for `advance`."""
        return [
            name
            for name, known in self.requests.items()
            if known.request.beam_width > 1 and known.waiting_beams == set(known.samples)
        ]

    def full_length(self, name: str) -> bool:
        known = self.requests[name]
        return len(known.samples[0].tokens) + 1 >= known.max_length

    def drain(self) -> None:
        """Runs until nothing is open: whatever was accepted comes to its end."""
        for _ in range(MOST_STEPS):
            for name in self.ready_searches():
                known = self.requests[name]
                parents = sorted(known.samples)
                width = known.request.beam_width
                pairs = [(parents[i // 2 % len(parents)], i % VOCAB) for i in range(width)]
                self.advance(name, [] if self.full_length(name) else pairs)
            if not self.schedule():
                if not self.results:
                    break
                self.commit()
        assert not self.requests, f"starved: {sorted(self.requests)}"
        stats = self.scheduler.stats()
        assert sum(stats.pages_held) == 0
        assert stats.waiting == stats.resuming == stats.loading == stats.running == 0

    def check(self) -> None:
        self.scheduler.check()
        assert set(self.scheduler._open) == set(self.requests)
        for name, sequences in self.scheduler._open.items():
            known = self.requests[name]
            for sequence in sequences:
                assert sequence.tokens == known.samples[sequence.sample_index].tokens


@st.composite
def configs(draw: st.DrawFn) -> SchedulerConfig:
    groups = st.builds(GroupLimits, st.integers(6, 24)) | st.builds(
        GroupLimits, st.integers(6, 24), st.integers(1, 9), st.sampled_from([0, 0, 1, 3])
    )
    step = draw(st.sampled_from([1, 1, 1, 2, 4]))
    num_slots, in_flight = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    return SchedulerConfig(
        page_size=draw(st.integers(1, 4)),
        groups=tuple(draw(st.lists(groups, min_size=1, max_size=2))),
        num_slots=num_slots,
        num_shards=draw(st.sampled_from([1, 1, 2, 4])),
        max_step_tokens=max(step * max(num_slots, in_flight), draw(st.integers(1, 16))),
        max_context_tokens=draw(st.sampled_from([12, 24, 40])),
        tokens_per_step=step,
        max_in_flight=in_flight,
        max_queued_requests=draw(st.sampled_from([3, 20])),
        max_queued_tokens=draw(st.sampled_from([60, 1000])),
        prefix_cache=draw(st.sampled_from([True, True, False])),
        policy=draw(st.sampled_from(["fcfs", "fair"])),
        max_prefill_tokens=draw(st.sampled_from([None, None, 2, 5])),
        client_weights={"a": 2.0},
    )


# Few unlike tokens, and prompts of one kind, so that prefixes are often the same.
PROMPTS = st.lists(st.sampled_from([3, 3, 3, 4]), min_size=1, max_size=39)
FORMS = st.sampled_from([(1, 1), (1, 1), (1, 1), (2, 1), (3, 1), (1, 2), (1, 4)])


class SchedulerMachine(RuleBasedStateMachine):
    """Draws commands for a harness."""

    commands = 0

    harness: Harness

    @initialize(config=configs())
    def start(self, config: SchedulerConfig) -> None:
        self.harness = Harness(config)

    @rule(
        prompt=PROMPTS,
        form=FORMS,
        seed=st.integers(0, 3),
        max_tokens=st.integers(1, 12),
        min_tokens=st.sampled_from([None, 0, 1]),
        stops=st.booleans(),
        priority=st.sampled_from([0, 0, 1]),
        client=st.sampled_from("ab"),
        salt=st.sampled_from(["", "", "salt"]),
        prompt_logprobs=st.sampled_from([None, None, 0]),
    )
    def add(
        self,
        prompt: list[int],
        form: tuple[int, int],
        seed: int,
        max_tokens: int,
        min_tokens: int | None,
        stops: bool,
        priority: int,
        client: str,
        salt: str,
        prompt_logprobs: int | None,
    ) -> None:
        harness = self.harness
        params = SamplingParams(
            n=form[0],
            seed=seed,
            max_tokens=max_tokens,
            temperature=1.0,
            min_tokens=min_tokens,
            prompt_logprobs=prompt_logprobs,
        )
        room = harness.config.max_context_tokens
        assert room is not None
        harness.add(
            Request(
                id=str(harness.commands),
                prompt=tuple(prompt[: room - 1]),
                params=params,
                stop_ids=(STOP,) if stops else (),
                priority=priority,
                client=client,
                salt=salt,
                beam_width=form[1],
            )
        )

    @precondition(lambda self: self.harness.requests)
    @rule(pick=st.integers(0, 99), late=st.integers(0, 3))
    def abort(self, pick: int, late: int) -> None:
        names = sorted(self.harness.requests)
        self.harness.abort(names[pick % len(names)] if late else "unknown")

    @precondition(lambda self: self._under_way())
    @rule(pick=st.integers(0, 99), cut=st.integers(0, 12))
    def finish(self, pick: int, cut: int) -> None:
        under_way = self._under_way()
        name, index, output = under_way[pick % len(under_way)]
        self.harness.finish(name, index, cut % (output + 1))

    def _under_way(self) -> list[tuple[str, int, int]]:
        """Returns (request, sample, output tokens) of completions under way."""
        return [
            (name, index, len(sample.tokens) - len(known.request.prompt))
            for name, known in sorted(self.harness.requests.items())
            if known.request.beam_width == 1
            for index, sample in known.samples.items()
            if not sample.over
        ]

    @precondition(lambda self: self.harness.ready_searches())
    @rule(
        pick=st.integers(0, 99),
        drawn=st.lists(st.tuples(st.integers(0, 3), st.integers(0, VOCAB - 1)), max_size=4),
    )
    def advance(self, pick: int, drawn: list[tuple[int, int]]) -> None:
        names = self.harness.ready_searches()
        name = names[pick % len(names)]
        known = self.harness.requests[name]
        parents = sorted(known.samples)
        choices = [(parents[parent % len(parents)], token) for parent, token in drawn]
        whole = self.harness.full_length(name)
        self.harness.advance(name, [] if whole else choices[: known.request.beam_width])

    @rule(pattern=st.lists(st.integers(0, 4), min_size=1, max_size=MOST_RUN))
    def run_steps(self, pattern: list[int]) -> None:
        """Schedules and commits in some order."""
        for drawn in pattern:
            if drawn < 2 or not self.harness.results:
                self.harness.schedule()
            else:
                self.harness.commit()

    def teardown(self) -> None:
        if hasattr(self, "harness"):
            self.harness.drain()
            SchedulerMachine.commands += self.harness.commands


def test_random_commands_keep_every_invariant() -> None:
    SchedulerMachine.commands = 0
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        SchedulerMachine,
        settings=settings(
            derandomize=True,
            database=None,
            deadline=None,
            max_examples=EXAMPLES,
            stateful_step_count=50,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        ),
    )
    assert SchedulerMachine.commands >= COMMANDS
