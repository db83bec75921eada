"""A runner without a model, whose every token can be found by hand.

    runner = FakeRunner(config, vocab_size=97)
    engine = Engine(runner, config)
    ...
    assert tokens == runner.rule.continue_prompt((3, 1, 4), params, count=8)

It obeys plans as a device would. Each cache group has pages, each slot a row of page tables, and
what a step "computes" at a position is one number, the state, that is written into the slot's page:

    state[i] = (31 * state[i - 1] + token[i] + i) mod V          read through the page table
    peak     = (sum of the states that position i sees) mod V    over the groups, windows applied
    token[i + 1] = peak when greedy, else (peak + seed + sample_index) mod V

So a page that is missing, shared by mistake, released too early or copied too late gives a wrong
token. A step may take time, give several tokens a row, or fail.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, cast

from jaxserve.serving.pages import GroupLimits, column
from jaxserve.serving.request import SamplingParams, TokenLogprob
from jaxserve.serving.runner import StepLogprobs, StepResult
from jaxserve.serving.scheduler import (
    Admission,
    RowKind,
    SchedulerConfig,
    StepPlan,
)


@dataclass(frozen=True)
class FakeRule:
    """The arithmetic that stands for a model.

    Attributes:
        vocab_size: tokens; a prime number lets no single error cancel out.
        groups: the cache groups, whose windows decide what a position sees.
    """

    vocab_size: int
    groups: tuple[GroupLimits, ...] = (GroupLimits(num_pages=1),)

    def state(self, before: int, token: int, position: int) -> int:
        """Returns the state of a token after the state before it."""
        return (31 * before + token + position) % self.vocab_size

    def peak(self, tokens: Sequence[int]) -> int:
        """Returns the likeliest token after `tokens`."""
        states: list[int] = []
        for position, token in enumerate(tokens):
            states.append(self.state(states[-1] if states else 0, token, position))
        last = len(states) - 1
        seen = (sum(states[p] for p in visible(group, last)) for group in self.groups)
        return sum(seen) % self.vocab_size

    def choose(self, peak: int, params: SamplingParams, sample_index: int) -> int:
        """Returns the token that sampling takes."""
        noise = 0 if params.greedy else (params.seed or 0) + sample_index
        return (peak + noise) % self.vocab_size

    def continue_prompt(
        self, prompt: Sequence[int], params: SamplingParams, count: int, sample_index: int = 0
    ) -> list[int]:
        """Returns the `count` tokens after a prompt, found without pages."""
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(self.choose(self.peak(tokens), params, sample_index))
        return tokens[len(prompt) :]

    def accepted(self, peak: int, offered: int) -> int:
        """Returns how many tokens a row gains that has `offered` query tokens: 1 to `offered`."""
        return 1 + peak % offered

    def logprobs(self, peak: int) -> list[tuple[int, float]]:
        """Returns every token with its log-probability, likeliest first.

        The token `peak + j` has the weight `(V - j) ** (1 + peak % 3)`.
        """
        return [self._ranked(peak, rank) for rank in range(self.vocab_size)]

    def logprob(self, peak: int, token: int, count: int) -> TokenLogprob:
        """Returns a token's entry with the `count` likeliest beside it."""
        _, logprob = self._ranked(peak, (token - peak) % self.vocab_size)
        top = tuple(self._ranked(peak, rank) for rank in range(min(count, self.vocab_size)))
        return TokenLogprob(token, logprob, top)

    def _ranked(self, peak: int, rank: int) -> tuple[int, float]:
        size, power = self.vocab_size, 1 + peak % 3
        return (peak + rank) % size, power * math.log(size - rank) - _log_sum(size, power)


@cache
def _log_sum(size: int, power: int) -> float:
    return math.log(sum(weight**power for weight in range(1, size + 1)))


def visible(group: GroupLimits, position: int) -> Sequence[int]:
    """Returns the positions that a query at `position` sees in a group, itself included."""
    first = 0 if group.window is None else max(0, position + 1 - group.window)
    sinks = min(group.sink_tokens, first)
    return range(position + 1) if sinks == first else [*range(sinks), *range(first, position + 1)]


@dataclass
class _Slot:
    """A row of the batch; the runner alone writes it."""

    admission: Admission
    length: int = 0
    last: int = 0


class _Sampled(NamedTuple):
    """A token, and the peak of the distribution it came from."""

    token: int
    peak: int


@dataclass(frozen=True)
class _Ticket:
    """What a step gave, and from when it may be known."""

    sampled: list[_Sampled]
    counts: list[int]
    prompts: dict[int, list[_Sampled]]
    ready_s: float
    error: Exception | None


@dataclass(frozen=True)
class FakeLogprobs:
    """Log-probabilities of one step: of its tokens, and of the prompt's tokens by row."""

    rule: FakeRule
    sampled: list[_Sampled]
    prompts: dict[int, list[_Sampled]]

    def row(self, index: int, count: int) -> TokenLogprob:
        """Returns the entry of a sampled token, by its place among the step's tokens."""
        return self._entry(self.sampled[index], count)

    def prompt(self, row: int, count: int) -> list[TokenLogprob]:
        """Returns the entries of the prompt's tokens that follow the row's query tokens."""
        return [self._entry(after, count) for after in self.prompts.get(row, [])]

    def _entry(self, sampled: _Sampled, count: int) -> TokenLogprob:
        return self.rule.logprob(sampled.peak, sampled.token, count)


class FakeRunner:
    """Runs plans on numbers; the engine's thread alone calls it.

    Args:
        config: sizes of pages, slots and tables.
        vocab_size: see `FakeRule`.
        step_s: seconds that a step takes, once the one before it is done.

    Attributes:
        rule: the arithmetic.
        plans: how many were dispatched.
        in_flight, most_in_flight: steps dispatched and not collected, now and at most.
        resets: how often it forgot everything.
    """

    def __init__(self, config: SchedulerConfig, vocab_size: int = 997, step_s: float = 0.0) -> None:
        self.rule = FakeRule(vocab_size, config.groups)
        self.plans = self.in_flight = self.most_in_flight = self.resets = 0
        self._config = config
        self._widths = [config.table_width(group) for group in range(len(config.groups))]
        self._step_s = step_s
        self._ready_s = 0.0
        self._failures: dict[str, Exception] = {}
        self._forget()

    def fail_dispatch(self, error: Exception) -> None:
        """Makes the next dispatch raise."""
        self._failures["dispatch"] = error

    def fail_collect(self, error: Exception) -> None:
        """Makes the next plan dispatch well, and raise when it is collected."""
        self._failures["collect"] = error

    def fail_reset(self, error: Exception) -> None:
        """Makes the next reset raise."""
        self._failures["reset"] = error

    def dispatch(self, plan: StepPlan) -> _Ticket:
        """Returns a ticket; the arithmetic is done at once, its results are held back."""
        if (error := self._failures.pop("dispatch", None)) is not None:
            raise error
        self._prepare(plan)
        sampled: list[_Sampled] = []
        counts: list[int] = []
        prompts: dict[int, list[_Sampled]] = {}
        given = iter(plan.tokens)
        for row, (kind, count) in enumerate(zip(plan.kinds, plan.counts, strict=True)):
            slot = self._slots[plan.slots[row]]
            if kind == RowKind.DECODE:
                assert slot.length <= plan.starts[row], "a start is an upper bound"
                gained = self._decode(plan.slots[row], slot, count)
            else:
                tokens = [next(given) for _ in range(count)]
                slot.length = plan.starts[row]
                peaks = self._read_in(plan.slots[row], slot, tokens)
                prompts[row] = peaks
                gained = [] if kind == RowKind.CHUNK else [self._sample(plan.slots[row], slot)]
            if kind != RowKind.CHUNK:
                counts.append(len(gained))
                sampled += gained
        assert next(given, None) is None, "a plan has no tokens beyond its rows"
        self.plans += 1
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        self._ready_s = max(self._ready_s, time.perf_counter()) + self._step_s
        error = self._failures.pop("collect", None)
        return _Ticket(sampled, counts, prompts, self._ready_s, error)

    def collect(self, ticket: _Ticket) -> StepResult:
        """Returns the results, once the step's time is over."""
        self.in_flight -= 1
        if (left_s := ticket.ready_s - time.perf_counter()) > 0:
            time.sleep(left_s)
        if ticket.error is not None:
            raise ticket.error
        logprobs = FakeLogprobs(self.rule, ticket.sampled, ticket.prompts)
        return StepResult(
            [sampled.token for sampled in ticket.sampled],
            ticket.ready_s,
            ticket.counts if self._config.tokens_per_step > 1 else None,
            cast(StepLogprobs, logprobs),
        )

    def reset(self) -> None:
        """Forgets pages and slots."""
        if (error := self._failures.pop("reset", None)) is not None:
            raise error
        self.resets += 1
        self.in_flight = 0
        self._forget()

    def _forget(self) -> None:
        config = self._config
        slots = config.num_shards * config.num_slots
        self._slots: dict[int, _Slot] = {}
        self._tables: list[list[list[int | None]]] = [
            [[None] * width for _ in range(slots)] for width in self._widths
        ]
        self._pages = [
            [[[0] * config.page_size for _ in range(group.num_pages)] for group in config.groups]
            for _ in range(config.num_shards)
        ]

    def _prepare(self, plan: StepPlan) -> None:
        """Sets up slots, copies pages and edits page tables, as before every step."""
        for admission in plan.admissions:
            self._slots[admission.slot] = _Slot(admission)
        for group, copies in enumerate(plan.copies):
            for shard, source, destination in copies:
                pages = self._pages[shard][group]
                pages[destination] = list(pages[source])
        for group, writes in enumerate(plan.writes):
            for slot, at, page in writes:
                self._tables[group][slot][at] = page

    def _decode(self, number: int, slot: _Slot, offered: int) -> list[_Sampled]:
        """Returns the tokens of a row that goes on from its newest one.

        The row offers its newest token and `offered - 1` guesses. As many guesses hold as the rule
        says; the states of the others are left behind, wrong, for the next step to overwrite.
        """
        self._write(number, slot, slot.last)
        gained = [self._sample(number, slot)]
        accepted = self.rule.accepted(gained[0].peak, offered)
        while len(gained) < accepted:
            self._write(number, slot, slot.last)
            gained.append(self._sample(number, slot))
        length = slot.length
        for _ in range(offered - accepted):
            self._write(number, slot, slot.last + 1)
        slot.length = length
        return gained

    def _read_in(self, number: int, slot: _Slot, tokens: Sequence[int]) -> list[_Sampled]:
        """Writes given tokens; returns the prompt's tokens after each, if the request asks."""
        request = slot.admission.request
        scored = request.params.prompt_logprobs is not None
        after: list[_Sampled] = []
        for token in tokens:
            self._write(number, slot, token)
            if scored and slot.length < len(request.prompt):
                after.append(_Sampled(request.prompt[slot.length], self._peak(number, slot)))
        return after

    def _write(self, number: int, slot: _Slot, token: int) -> None:
        """Computes and stores the state of one more token, in every group."""
        position = slot.length
        for group in range(len(self._config.groups)):
            before = self._read(number, group, position - 1) if position else 0
            page = self._page(number, group, position)
            state = self.rule.state(before, token, position)
            page[position % self._config.page_size] = state
        slot.length += 1

    def _sample(self, number: int, slot: _Slot) -> _Sampled:
        """Returns the next token, now the slot's newest."""
        admission, peak = slot.admission, self._peak(number, slot)
        params = admission.request.params
        slot.last = self.rule.choose(peak, params, admission.sample_index)
        return _Sampled(slot.last, peak)

    def _peak(self, number: int, slot: _Slot) -> int:
        """Returns the likeliest next token, from what the newest position sees in the pages."""
        total = 0
        size = self._config.page_size
        for index, group in enumerate(self._config.groups):
            seen = visible(group, slot.length - 1)
            if not isinstance(seen, range):
                total += sum(self._read(number, index, position) for position in seen)
                continue
            for first in range(seen.start - seen.start % size, seen.stop, size):
                page = self._page(number, index, first)
                total += sum(page[max(0, seen.start - first) : seen.stop - first])
        return total % self.rule.vocab_size

    def _read(self, number: int, group: int, position: int) -> int:
        page = self._page(number, group, position)
        return page[position % self._config.page_size]

    def _page(self, number: int, group: int, position: int) -> list[int]:
        """Returns the page that holds a position, by the slot's table."""
        config = self._config
        spec = config.groups[group]
        pinned = -(-spec.sink_tokens // config.page_size)
        table = self._tables[group][number]
        page = table[column(position // config.page_size, len(table), pinned)]
        assert page is not None, f"slot {number}, group {group}: no page for position {position}"
        return self._pages[number // config.num_slots][group][page]
