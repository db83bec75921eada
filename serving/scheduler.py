"""Decides what every step computes: iteration-level batching over paged memory.

    scheduler = Scheduler(config)
    scheduler.add(request)
    while (plan := scheduler.schedule()) is not None:
        tokens = device(plan)
        for event in scheduler.commit(plan.number, tokens):
            ...                                # new tokens of event.sequence, or its end

A pure, deterministic state machine: no clock, no randomness, no device. Plans may be made ahead of
their results: the device runs them in order, so pages and slots that are given up are used again
by the next plan at once.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Items
from typing import Any, cast

from jaxserve.errors import CapacityError, ContextLengthError, QueueFullError, UsageError
from jaxserve.serving.pages import GroupLimits, pages_of
from jaxserve.serving.plan import (
    Admission,
    Event,
    RowKind,
    SchedulerConfig,
    SchedulerStats,
    StepPlan,
)
from jaxserve.serving.policy import make_policy
from jaxserve.serving.request import FinishReason, Request
from jaxserve.serving.sequence import NO_SLOT, Rank, Sequence, State
from jaxserve.serving.shard_pages import ShardPages

__all__ = [
    "Admission",
    "Event",
    "GroupLimits",
    "RowKind",
    "Scheduler",
    "SchedulerConfig",
    "SchedulerStats",
    "StepPlan",
]

_Fields = tuple[Sequence, list[int], FinishReason | None, int]

_DECODE, _CHUNK, _LAST = map(int, RowKind)


class _Flight:
    """A plan without its commit: the sequences of its rows, those of DECODE rows apart."""

    __slots__ = ("decode", "given", "plan")

    def __init__(self, plan: StepPlan, decode: list[Sequence]) -> None:
        self.plan = plan
        self.decode = decode
        self.given: list[Sequence] = []


class Scheduler:
    """Requests, slots and pages. One thread calls it.

    A sequence with a slot is in one of three lists, each in order of seniority: `_decoding` (the
    device has its newest token), `_stepping` (beams: its next token comes from `advance`) or
    `_loading` (its prompt is being computed). One without a slot is in `_front`, if its request
    has started, or in the policy's queue.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self._step_tokens = config.tokens_per_step
        self._number = 0
        self._committed = 0
        self._arrivals = 0
        self._admissions = 0
        self._preemptions = 0
        self._query_tokens = 0
        self._hit_tokens = 0
        self._start()

    def _start(self) -> None:
        config = self.config
        self._memory = [ShardPages(config, shard) for shard in range(config.num_shards)]
        self._free_slots = [list(range(config.num_slots - 1, -1, -1)) for _ in self._memory]
        self._policy = make_policy(config.policy, config.client_weights)
        self._open: dict[str, list[Sequence]] = {}
        self._queued_tokens = 0
        self._front: list[Sequence] = []
        self._decoding: list[Sequence] = []
        self._stepping: list[Sequence] = []
        self._loading: list[Sequence] = []
        self._stale = False
        self._flights: deque[_Flight] = deque()

    # Requests come and go.

    def add(self, request: Request) -> None:
        """Queues a request.

        Raises:
            UsageError: its id is that of an open request.
            ContextLengthError: the prompt leaves no room for output.
            CapacityError: it needs more pages, slots or queue than there are.
            QueueFullError: too many requests or tokens are waiting.
        """
        if request.id in self._open:
            raise UsageError(f"request id {request.id!r} is open already; use another one")
        sequence = Sequence(request, 0, self._max_length(request), self._arrivals + 1)
        self._check_capacity(sequence)
        self._check_queue(sequence)
        self._arrivals += 1
        self._open[request.id] = [sequence]
        self._policy.push(sequence)
        self._queued_tokens += sequence.num_prompt

    def _max_length(self, request: Request) -> int:
        prompt, context = len(request.prompt), self.config.max_context_tokens
        assert request.params.max_tokens is not None
        wanted = prompt + request.params.max_tokens
        if context is None:
            return wanted
        if prompt >= context:
            raise ContextLengthError(
                f"the prompt has {prompt} tokens and the context {context}, of which one must be "
                f"left; shorten the prompt to {context - 1} tokens"
            )
        return min(wanted, context)

    def _check_capacity(self, sequence: Sequence) -> None:
        config = self.config
        if sequence.num_prompt > config.max_queued_tokens:
            raise CapacityError(
                f"the prompt has {sequence.num_prompt} tokens and the queue takes "
                f"{config.max_queued_tokens}; shorten the prompt or raise max_queued_tokens"
            )
        for group, limits in enumerate(config.groups):
            most = pages_of(sequence.max_length - 1, config.page_size)
            needed = min(most, self._memory[0].widths[group])
            if needed > limits.num_pages:
                raise CapacityError(
                    f"{sequence.num_prompt} prompt tokens and "
                    f"{sequence.max_length - sequence.num_prompt} output tokens need {needed} "
                    f"pages in cache group {group}, which has {limits.num_pages}; shorten the "
                    "prompt, lower max_tokens or give the cache more memory"
                )

    def _check_queue(self, sequence: Sequence) -> None:
        config, waiting = self.config, len(self._policy)
        if waiting >= config.max_queued_requests:
            raise QueueFullError(
                f"{waiting} requests are waiting, which is the limit "
                f"(max_queued_requests={config.max_queued_requests}); try again later"
            )
        if self._queued_tokens + sequence.num_prompt > config.max_queued_tokens:
            raise QueueFullError(
                f"{self._queued_tokens} prompt tokens are waiting and {sequence.num_prompt} more "
                f"exceed the limit (max_queued_tokens={config.max_queued_tokens}); try again later"
            )

    def abort(self, request_id: str) -> bool:
        """Returns whether the request was open; its slots and pages are free at once."""
        sequences = self._open.get(request_id)
        for sequence in list(sequences or ()):
            self._close(sequence)
        return sequences is not None

    def finish(self, request_id: str, sample_index: int, num_tokens: int) -> None:
        """Ends a completion whose output the client cut to `num_tokens`; none if it is over."""
        sequences = self._open.get(request_id, ())
        if sequences and sequences[0].request.params.n > 1 and not sequences[0].forked:
            self._drop_unstarted(sequences[0], sample_index)
            return
        for sequence in sequences:
            if sequence.sample_index == sample_index:
                self._keep_known(sequence)
                del sequence.tokens[sequence.num_prompt + num_tokens :]
                self._close(sequence)
                return

    def _drop_unstarted(self, first: Sequence, sample_index: int) -> None:
        """Notes that a sample ends when all start; until then the first one reads their prompt."""
        first.dropped |= {sample_index}
        if first.dropped.issuperset(range(first.request.params.n)):
            self.abort(first.request.id)

    def reset(self) -> list[Sequence]:
        """Returns the open sequences, finished; queue, slots, pages and flights are empty.

        For a device that lost its memory. Plans are counted on.
        """
        lost = [sequence for sequences in self._open.values() for sequence in sequences]
        for sequence in lost:
            sequence.state = State.FINISHED
        self._committed = self._number
        self._start()
        return lost

    def _close(self, sequence: Sequence) -> None:
        """Ends a sequence, wherever it stands."""
        request = sequence.request
        if sequence.slot != NO_SLOT:
            self._give_up_slot(sequence)
            self._stale = True
        elif not sequence.rank:
            self._policy.remove(sequence)
            self._queued_tokens -= sequence.num_prompt
        elif not sequence.sampled:
            self._front.remove(sequence)
        sequence.state = State.FINISHED
        siblings = self._open[request.id]
        siblings.remove(sequence)
        if sequence.rank:
            self._policy.refund(sequence, self._unused(sequence, alone=not siblings))
        if not siblings:
            del self._open[request.id]

    def _unused(self, sequence: Sequence, alone: bool) -> int:
        """Returns the output tokens that were charged for and that this end leaves ungenerated."""
        left = sequence.max_length - len(sequence.tokens)
        if sequence.is_beam:  # beams come and go: all is settled with the last one
            return sequence.request.beam_width * left if alone else 0
        return left if sequence.forked else sequence.request.params.n * left

    def _give_up_slot(self, sequence: Sequence) -> None:
        self._memory[sequence.shard].release(sequence)
        self._free_slots[sequence.shard].append(sequence.slot % self.config.num_slots)
        sequence.slot = NO_SLOT

    def _keep_known(self, sequence: Sequence) -> None:
        """Offers the pages whose tokens are committed to the prefix cache."""
        if sequence.state is State.RUNNING:
            self._memory[sequence.shard].insert(sequence, len(sequence.tokens) - 1)

    # A step is planned.

    def schedule(self) -> StepPlan | None:
        """Returns the next step.

        None: nothing is to be done, or nothing can be before a commit or an `advance`.
        """
        if len(self._flights) >= self.config.max_in_flight:
            return None
        while True:
            preemptions = self._preemptions
            plan = self._plan()
            if plan is not None or self._flights:
                return plan
            # What was preempted may start in a plan of its own.
            if self._preemptions == preemptions and not self._preempt_parked_beam():
                return None

    def _plan(self) -> StepPlan | None:
        if self._stale:
            self._drop_stale()
        groups = range(len(self.config.groups))
        plan = StepPlan(
            self._number + 1, [], [], [], [], [], [], [[] for _ in groups], [[] for _ in groups]
        )
        short: set[int] = set()
        decode = self._plan_decode(plan, short)
        flight = _Flight(plan, decode)
        if self._stepping or self._loading or self._front or len(self._policy):
            budget = self._budget(plan)
            self._plan_stepping(flight, budget, short)
            self._plan_loading(flight, budget, short)
            if self._front or len(self._policy):
                if self._stale:
                    self._drop_stale()  # what was preempted may start again in another shard
                self._admit_waiting(flight, budget, short)
            self._settle(flight)
        if not plan.slots:
            return None
        self._number += 1
        self._flights.append(flight)
        return plan

    def _drop_stale(self) -> None:
        """Drops from the lists those that have no slot any more."""
        self._decoding = [s for s in self._decoding if s.slot != NO_SLOT]
        self._stepping = [s for s in self._stepping if s.slot != NO_SLOT]
        self._loading = [s for s in self._loading if s.slot != NO_SLOT]
        self._stale = False

    def _plan_decode(self, plan: StepPlan, short: set[int]) -> list[Sequence]:
        """Returns the sequences of the DECODE rows, which fill the plan's columns."""
        step = self._step_tokens
        rows: list[Sequence] = []
        starts: list[int] = []
        fewer: list[tuple[int, int]] = []
        add_row, add_start = rows.append, starts.append
        for sequence in self._decoding:
            start = sequence.computed
            if start > sequence.edge:
                count = self._decode_room(sequence, plan, short)
                if count == 0:
                    continue
                if count < step:
                    fewer.append((len(rows), count))
                sequence.computed = start + count
            else:
                sequence.computed = start + step
            add_row(sequence)
            add_start(start)
        plan.starts = starts
        plan.slots = [sequence.slot for sequence in rows]
        plan.counts = [step] * len(rows)
        plan.kinds = [_DECODE] * len(rows)
        for row, count in fewer:
            plan.counts[row] = count
        return rows

    def _decode_room(self, sequence: Sequence, plan: StepPlan, short: set[int]) -> int:
        """Returns how many tokens a decode row may compute; 0 if it waits or was preempted."""
        if sequence.slot == NO_SLOT:  # preempted for an older row of this plan
            return 0
        start, limit = sequence.computed, sequence.max_length - 1
        count = min(self._step_tokens, limit - start)
        if count <= 0:
            return 0
        # The device may be as far back as the last token that is committed.
        position = start if self._step_tokens == 1 else len(sequence.tokens) - 1
        memory = self._memory[sequence.shard]
        while not memory.grow(sequence, position, start + count, plan):
            victim = self._victim(sequence, self._decoding, self._stepping, self._loading)
            self._preempt(victim or sequence, short)
            if victim is None:
                return 0
        self._set_edge(sequence)
        return count

    def _set_edge(self, sequence: Sequence) -> None:
        room = sequence.num_pages * self.config.page_size
        sequence.edge = min(room, sequence.max_length - 1) - self._step_tokens

    def _budget(self, plan: StepPlan) -> list[int]:
        """Returns by shard the tokens that the decode rows leave."""
        budget = [self.config.max_step_tokens] * len(self._memory)
        if len(budget) == 1:
            budget[0] -= sum(plan.counts)
        else:
            for slot, count in zip(plan.slots, plan.counts, strict=True):
                budget[slot // self.config.num_slots] -= count
        return budget

    def _plan_stepping(self, flight: _Flight, budget: list[int], short: set[int]) -> None:
        lists = self._stepping, self._loading
        for sequence in self._stepping:
            if sequence.computed == len(sequence.tokens) or sequence.slot == NO_SLOT:
                continue
            if self._grow(sequence, 1, flight, lists, short):
                self._add_given_row(flight, sequence, 1)
                budget[sequence.shard] -= 1

    def _plan_loading(self, flight: _Flight, budget: list[int], short: set[int]) -> None:
        lists = self._stepping, self._loading
        for sequence in self._loading:
            count = self._chunk(sequence, budget)
            if count == 0 or sequence.slot == NO_SLOT:
                continue
            if self._grow(sequence, count, flight, lists, short):
                self._add_given_row(flight, sequence, count)
                budget[sequence.shard] -= count

    def _chunk(self, sequence: Sequence, budget: list[int]) -> int:
        most = self.config.max_prefill_tokens or self.config.max_step_tokens
        return min(len(sequence.tokens) - sequence.computed, budget[sequence.shard], most)

    def _grow(
        self,
        sequence: Sequence,
        count: int,
        flight: _Flight,
        lists: tuple[list[Sequence], ...],
        short: set[int],
    ) -> bool:
        """Returns whether a row has pages for `count` tokens; if not, it waits for them."""
        start = sequence.computed
        while not self._memory[sequence.shard].grow(sequence, start, start + count, flight.plan):
            victim = self._victim(sequence, *lists)
            if victim is None:
                return False
            self._preempt(victim, short)
        return True

    def _add_given_row(self, flight: _Flight, sequence: Sequence, count: int) -> None:
        """Adds a CHUNK or LAST row, for which there are pages."""
        plan, start = flight.plan, sequence.computed
        end = start + count
        plan.slots.append(sequence.slot)
        plan.counts.append(count)
        plan.starts.append(start)
        plan.kinds.append(_LAST if end == len(sequence.tokens) else _CHUNK)
        plan.tokens.extend(sequence.tokens[start:end])
        if sequence.set_up_again:
            sequence.set_up_again = False
            plan.admissions.append(_admission(sequence))
        sequence.row_plan, sequence.row_start = plan.number, start
        sequence.computed = end
        flight.given.append(sequence)

    # Preemption.

    def _victim(self, sequence: Sequence, *lists: list[Sequence]) -> Sequence | None:
        """Returns the newest sequence in the same shard that is newer than this one.

        One that has a row with tokens in the plan under way is passed over. DECODE rows are the
        caller's care: no list with rows already planned, newer than the sequence, may be given.
        """
        newest: Sequence | None = None
        under_way = self._number + 1
        for members in lists:
            for other in reversed(members):
                if other.rank <= (newest or sequence).rank:
                    break
                if (
                    other.shard == sequence.shard
                    and other.slot != NO_SLOT
                    and other.row_plan != under_way
                ):
                    newest = other
                    break
        return newest

    def _preempt(self, sequence: Sequence, short: set[int]) -> None:
        """Takes slot and pages from a sequence, which computes its tokens again later."""
        short.add(sequence.shard)
        self._preemptions += 1
        self._give_up_slot(sequence)
        self._stale = True
        sequence.state = State.PREEMPTED
        sequence.computed = 0
        sequence.edge = -1
        sequence.check_at = sequence.max_length
        sequence.ready_after = self._number
        sequence.set_up_again = False
        if not sequence.sampled:
            insort(self._front, sequence, key=_rank)

    def _preempt_parked_beam(self) -> bool:
        """Returns whether a beam that waits made room for beams that it waits for."""
        for beam in reversed(self._stepping):
            siblings = self._open.get(beam.request.id, ())
            if beam.slot != NO_SLOT and beam.sampled and not all(s.sampled for s in siblings):
                self._preempt(beam, set())
                return True
        return False

    # Admission.

    def _admit_waiting(self, flight: _Flight, budget: list[int], short: set[int]) -> None:
        """Gives slots to those that wait, in order, until one has to wait on."""
        promised = [[0] * len(self.config.groups) for _ in self._memory]
        for sequence in self._loading:
            self._promise(sequence, promised)
        while True:
            sequence = self._head()
            if sequence is None or sequence.ready_after > self._committed:
                return
            places = [
                shard
                for shard, free in enumerate(self._free_slots)
                if free and budget[shard] > 0 and shard not in short
            ]
            found = self._place(sequence, places, flight, promised)
            if found is None:
                return
            self._admit(sequence, *found, flight)
            count = self._chunk(sequence, budget)
            grown = self._grow(sequence, count, flight, (), short)
            assert grown, "an admitted sequence has pages for its first chunk"
            self._add_given_row(flight, sequence, count)
            budget[sequence.shard] -= count
            insort(self._loading, sequence, key=_rank)
            self._promise(sequence, promised)

    def _promise(self, sequence: Sequence, promised: list[list[int]]) -> None:
        if sequence.slot != NO_SLOT:
            memory = self._memory[sequence.shard]
            for group in range(len(promised[sequence.shard])):
                promised[sequence.shard][group] += memory.outstanding(sequence, group)

    def _head(self) -> Sequence | None:
        """Returns who is next: a started request's sequence goes before a new request."""
        started, new = (self._front[0] if self._front else None), self._policy.head()
        if started is None or new is None:
            return started or new
        return started if started.request.priority <= new.request.priority else new

    def _place(
        self,
        sequence: Sequence,
        places: list[int],
        flight: _Flight,
        promised: list[list[int]],
    ) -> tuple[int, int, Sequence | None] | None:
        """Returns (shard, reused tokens, whose they are) where most is reused; None: no room."""
        best: tuple[int, int, Sequence | None] | None = None
        best_key = (-1, 0)
        for shard in places:
            memory = self._memory[shard]
            source, reused = self._source(sequence, shard, flight)
            if self.config.prefix_cache and sequence.request.params.prompt_logprobs is None:
                hit = memory.find(sequence)
                if hit >= reused:
                    source, reused = None, hit
            available = min(allocator.num_available for allocator in memory.allocators)
            from_cache = source is None and reused > 0
            key = (reused, available)
            if key > best_key and memory.fits(sequence, reused, from_cache, promised[shard]):
                best, best_key = (shard, reused, source), key
        return best

    def _source(
        self, sequence: Sequence, shard: int, flight: _Flight
    ) -> tuple[Sequence | None, int]:
        """Returns the sequence of the same request that has most of the tokens, and how many.

        What the plan under way computes does not count: pages are copied before its step.
        """
        best, most = None, 0
        for other in self._open[sequence.request.id]:
            if other is sequence or other.slot == NO_SLOT or other.shard != shard:
                continue
            common = sequence.num_common if other is sequence.parent else sequence.num_prompt
            under_way = other.row_plan == flight.plan.number
            done = other.row_start if under_way else other.computed
            tokens = min(common, done, len(sequence.tokens) - 1)
            if tokens > most and self._memory[shard].can_fork(other, tokens):
                best, most = other, tokens
        return best, most

    def _admit(
        self, sequence: Sequence, shard: int, reused: int, source: Sequence | None, flight: _Flight
    ) -> None:
        if not sequence.rank:
            self._policy.pop()
            self._queued_tokens -= sequence.num_prompt
            self._admissions += 1
            sequence.rank = (sequence.request.priority, self._admissions, 0)
            sequence.cached_tokens = reused
        else:
            self._front.pop(0)
        if source is None and sequence.request.params.prompt_logprobs is None:
            self._query_tokens += len(sequence.tokens)
            self._hit_tokens += reused
        memory = self._memory[shard]
        sequence.slot = shard * self.config.num_slots + self._free_slots[shard].pop()
        sequence.state = State.LOADING
        sequence.computed = reused
        memory.start(sequence)
        if source is not None:
            memory.fork(sequence, source, reused, flight.plan)
        elif reused:
            memory.adopt(sequence, reused, flight.plan)
        flight.plan.admissions.append(_admission(sequence))

    def _settle(self, flight: _Flight) -> None:
        """Notes what the plan's tokens make known: full pages, and prompts that are computed."""
        loaded = False
        for sequence in flight.given:
            memory = self._memory[sequence.shard]
            memory.insert(sequence, sequence.computed)
            if sequence.computed < len(sequence.tokens) or sequence.state is not State.LOADING:
                continue
            loaded = True
            sequence.state = State.RUNNING
            sequence.parent = None
            if sequence.is_beam:
                insort(self._stepping, sequence, key=_rank)
            else:
                insort(self._decoding, sequence, key=_rank)
                self._set_edge(sequence)
                self._set_check(sequence)
                self._fork_samples(sequence)
        if loaded:
            self._loading = [s for s in self._loading if s.state is State.LOADING]

    def _set_check(self, sequence: Sequence) -> None:
        """Sets when a commit has to look: at the end, and when a page is known."""
        sequence.check_at = sequence.max_length
        if self.config.prefix_cache:
            full = (sequence.num_known + 1) * self.config.page_size + 1
            sequence.check_at = min(full, sequence.max_length)

    def _fork_samples(self, first: Sequence) -> None:
        """Lets the other samples of a request start, once its first one has the prompt."""
        siblings, n = self._open[first.request.id], first.request.params.n
        if n == 1 or first.forked:
            return
        first.forked = True
        priority, admission, _ = _rank(first)
        for index in range(1, n):
            if index in first.dropped:
                self._policy.refund(first, first.max_length - first.num_prompt)
                continue
            other = Sequence(first.request, index, first.max_length, first.arrival)
            other.rank = (priority, admission, index)
            other.forked = True
            other.cached_tokens = first.cached_tokens
            siblings.append(other)
            insort(self._front, other, key=_rank)
        if first.sample_index in first.dropped:
            self._close(first)

    # A step is over.

    def commit(
        self, number: int, tokens: Items[int], counts: Items[int] | None = None
    ) -> list[Event]:
        """Returns what a plan's results brought, in the order of its rows.

        Args:
            number: of the oldest plan without a commit.
            tokens: of the rows that sample (DECODE and LAST), packed in plan order.
            counts: tokens of each of these rows: 0 to its query tokens for DECODE, 1 for LAST.
                None: one each.
        """
        assert self._flights, f"plan {number} was not made or is committed already"
        plan = self._flights[0].plan
        assert number == plan.number, f"plan {number} is committed before plan {plan.number}"
        flight = self._flights.popleft()
        self._committed = number
        if counts is None and self._step_tokens == 1:
            events, used = self._commit_single(flight.decode, tokens), len(flight.decode)
        else:
            events, used = self._commit_several(flight, tokens, counts)
        if flight.given:
            self._commit_given(flight, tokens[used:], events)
        return events

    def _commit_single(self, rows: list[Sequence], tokens: Items[int]) -> list[Event]:
        """Returns the events of DECODE rows with a token each."""
        events: list[Event] = []
        add, finished = events.append, State.FINISHED
        make: Callable[[type[Event], _Fields], Event] = cast(Any, tuple).__new__
        for row, (sequence, token) in enumerate(zip(rows, tokens, strict=False)):
            if sequence.state is finished:
                continue
            held = sequence.tokens
            held.append(token)
            reason = None
            if token in sequence.stop_ids or len(held) >= sequence.check_at:
                reason = self._look(sequence)
            add(make(Event, (sequence, [token], reason, row)))  # half the time of Event(...)
        return events

    def _commit_several(
        self, flight: _Flight, tokens: Items[int], counts: Items[int] | None
    ) -> tuple[list[Event], int]:
        """Returns the events of DECODE rows with any number of tokens, and how many these were."""
        events: list[Event] = []
        at = 0
        for row, sequence in enumerate(flight.decode):
            most = flight.plan.counts[row]
            count = 1 if counts is None else counts[row]
            assert 0 <= count <= most, f"row {row} has {most} query tokens and brings {count}"
            new = list(tokens[at : at + count])
            at += count
            if sequence.state is State.FINISHED:
                continue
            if sequence.state is State.RUNNING:
                sequence.computed -= most - count
            reason = None
            for taken, token in enumerate(new, 1):
                sequence.tokens.append(token)
                if token in sequence.stop_ids or len(sequence.tokens) >= sequence.check_at:
                    reason = self._look(sequence)
                    if reason is not None:
                        del new[taken:]
                        break
            if new:
                events.append(Event(sequence, new, reason, row))
        return events, at

    def _commit_given(self, flight: _Flight, tokens: Items[int], events: list[Event]) -> None:
        """Adds the events of LAST rows."""
        sampled = iter(tokens)
        first = len(flight.decode)
        for row, sequence in enumerate(flight.given, first):
            if flight.plan.kinds[row] != _LAST:
                continue
            token = next(sampled)
            if sequence.state is State.FINISHED:
                continue
            reason = None
            if sequence.is_beam:
                sequence.sampled = True
                if sequence.state is State.PREEMPTED:
                    self._front.remove(sequence)
            else:
                sequence.tokens.append(token)
                if token in sequence.stop_ids or len(sequence.tokens) >= sequence.check_at:
                    reason = self._look(sequence)
            events.append(Event(sequence, [token], reason, row))

    def _look(self, sequence: Sequence) -> FinishReason | None:
        """Returns why a sequence ends with its newest token; if it goes on, keeps full pages."""
        running = sequence.state is State.RUNNING
        if running:
            self._memory[sequence.shard].insert(sequence, len(sequence.tokens) - 1)
        reason: FinishReason | None = None
        if sequence.tokens[-1] in sequence.stop_ids and sequence.num_output > sequence.min_tokens:
            reason = "stop"
        elif len(sequence.tokens) >= sequence.max_length:
            reason = "length"
        if reason is not None:
            self._close(sequence)
        elif running:
            self._set_check(sequence)
        return reason

    # Beam search.

    def advance(self, request_id: str, choices: Items[tuple[int, int]]) -> None:
        """Continues a beam search whose beams all have sampled.

        Beam i of the next step is beam `choices[i][0]` with the token `choices[i][1]` after it.
        Beams that are not chosen are dropped; without choices the request is over. Beams of one
        parent share its pages.

        Args:
            request_id: of a request with a beam width; nothing happens if it is not open.
            choices: (sample index of the parent, token), at most the beam width.

        Raises:
            UsageError: it is no beam search, a beam has not sampled, there is no such parent,
                there are too many choices, or the beams are at their full length.
        """
        beams = self._open.get(request_id)
        if beams is None:
            return
        if not choices:
            self.abort(request_id)
            return
        self._check_choices(beams, choices)
        parents = {beam.sample_index: beam for beam in beams}
        first_child: dict[int, Sequence] = {}
        children: list[Sequence] = []
        for index, (parent, token) in enumerate(choices):
            heir = first_child.get(parent)
            if heir is None:
                heir = first_child[parent] = parents[parent]
                child = heir
            else:
                child = _clone(heir)
                child.tokens.pop()
            child.tokens.append(token)
            child.sampled = False
            child.rank = (child.request.priority, _rank(heir)[1], index)
            children.append(child)
        for beam in beams:
            if beam.sample_index not in first_child and beam.slot != NO_SLOT:
                self._give_up_slot(beam)
                self._stale = True
            if beam.sample_index not in first_child:
                beam.state = State.FINISHED
        for index, child in enumerate(children):
            child.sample_index = index
            if child.slot == NO_SLOT:
                insort(self._front, child, key=_rank)
            else:
                child.parent = None
                child.set_up_again = True
        self._stepping.sort(key=_rank)
        self._open[request_id] = children

    def _check_choices(self, beams: list[Sequence], choices: Items[tuple[int, int]]) -> None:
        first = beams[0]
        width = first.request.beam_width
        if width == 1:
            raise UsageError(
                f"request {first.request.id!r} has beam_width=1; advance is for beam searches"
            )
        late = [beam.sample_index for beam in beams if not beam.sampled]
        if late:
            raise UsageError(
                f"beams {late} of request {first.request.id!r} have not sampled yet; advance once "
                "every beam had its event"
            )
        if len(choices) > width:
            raise UsageError(f"{len(choices)} choices exceed beam_width={width}")
        indices = {beam.sample_index for beam in beams}
        for parent, _ in choices:
            if parent not in indices:
                raise UsageError(
                    f"choice of beam {parent}, which is not among {sorted(indices)}; choose one "
                    "that had an event"
                )
        if len(first.tokens) + 1 >= first.max_length:
            raise UsageError(
                f"beams of {first.num_output + 1} output tokens have their full length "
                f"{first.max_length - first.num_prompt}; end the search with no choices"
            )

    # What there is to see.

    def stats(self) -> SchedulerStats:
        """Returns queue lengths, pages and counters."""
        if self._stale:
            self._drop_stale()
        size, memories = self.config.page_size, self._memory
        groups = range(len(self.config.groups))
        by_group = [[memory.allocators[group] for memory in memories] for group in groups]
        held = tuple(sum(a.num_held for a in allocators) for allocators in by_group)
        active = [*self._decoding, *self._stepping, *self._loading]
        return SchedulerStats(
            waiting=len(self._policy),
            waiting_tokens=self._queued_tokens,
            resuming=len(self._front),
            loading=len(self._loading),
            running=len(self._decoding) + len(self._stepping),
            in_flight=len(self._flights),
            pages_free=tuple(sum(a.num_free for a in allocators) for allocators in by_group),
            pages_held=held,
            pages_cached=tuple(sum(a.num_idle for a in allocators) for allocators in by_group),
            page_references=tuple(
                sum(a.num_references for a in allocators) for allocators in by_group
            ),
            held_tokens=sum(held) * size,
            unused_tokens=len(groups) * sum(s.num_pages * size - s.computed for s in active),
            preemptions=self._preemptions,
            prefix_query_tokens=self._query_tokens,
            prefix_hit_tokens=self._hit_tokens,
        )

    def check(self) -> None:
        """Raises AssertionError when an invariant is broken. For tests: it looks at everything."""
        if self._stale:
            self._drop_stale()
        active = [*self._decoding, *self._stepping, *self._loading]
        opened = [s for sequences in self._open.values() for s in sequences]
        self._check_lists(active, opened)
        self._check_slots(active)
        for memory in self._memory:
            own = [sequence for sequence in active if sequence.shard == memory.shard]
            memory.check(own)
        assert self._queued_tokens == sum(s.num_prompt for s in self._policy)
        assert len(self._flights) <= self.config.max_in_flight

    def _check_lists(self, active: list[Sequence], opened: list[Sequence]) -> None:
        """Checks that every open sequence is in one list, and each list in order."""
        for members in (self._decoding, self._stepping, self._loading, self._front):
            ranks = [_rank(sequence) for sequence in members]
            assert ranks == sorted(ranks), "a list is out of order"
        parked = [s for s in opened if s.sampled and s.slot == NO_SLOT]
        listed = [*active, *self._front, *self._policy, *parked]
        assert len(set(map(id, listed))) == len(listed), "a sequence is in two lists"
        assert set(map(id, listed)) == set(map(id, opened)), "a sequence is lost"
        for sequence in opened:
            has_slot = sequence.slot != NO_SLOT
            assert has_slot == (sequence.state in (State.LOADING, State.RUNNING)), sequence
            assert len(sequence.tokens) < sequence.max_length, sequence
        for sequence in self._loading:
            assert sequence.computed < len(sequence.tokens), sequence

    def _check_slots(self, active: list[Sequence]) -> None:
        """Checks that every slot of every shard is free or taken, once."""
        size = self.config.num_slots
        taken = [divmod(sequence.slot, size) for sequence in active]
        free = [(shard, slot) for shard, slots in enumerate(self._free_slots) for slot in slots]
        everything = [(shard, slot) for shard in range(len(self._memory)) for slot in range(size)]
        assert sorted([*taken, *free]) == everything, "slots are not conserved"
        for sequence in active:
            assert sequence.slot // size == sequence.shard, sequence


def _rank(sequence: Sequence) -> Rank:
    assert sequence.rank, f"{sequence} has not started"
    return sequence.rank


def _admission(sequence: Sequence) -> Admission:
    return Admission(sequence.slot, sequence.request, sequence.sample_index, tuple(sequence.tokens))


def _clone(heir: Sequence) -> Sequence:
    """Returns a beam with the same tokens, which shares the heir's pages once it has a slot."""
    clone = Sequence(heir.request, heir.sample_index, heir.max_length, heir.arrival)
    clone.tokens = list(heir.tokens)
    clone.cached_tokens = heir.cached_tokens
    clone.parent = heir
    clone.num_common = len(heir.tokens) - 1
    return clone
