"""What passes between the scheduler and the device: limits, step plans and their outcome."""

from __future__ import annotations

import enum
from typing import Literal, NamedTuple

import msgspec

from jaxserve.errors import ConfigError
from jaxserve.serving.pages import GroupLimits, table_width
from jaxserve.serving.request import FinishReason, Request
from jaxserve.serving.sequence import Sequence

MAX_IN_FLIGHT = 4

PolicyName = Literal["fcfs", "fair"]


class SchedulerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Limits of the scheduler. Slots, pages and step tokens are those of one shard.

    Attributes:
        page_size: tokens of a page.
        groups: the cache groups.
        num_slots: sequences that run at a time.
        num_shards: data shards, each with its own slots and pages.
        max_step_tokens: token budget of a step.
        max_context_tokens: longest prompt and output together; None where every group is windowed
            and generation may be endless.
        tokens_per_step: most tokens that a decode row gains in a step, k.
        max_in_flight: plans that may be uncommitted.
        max_queued_requests: requests that may wait for their first slot.
        max_queued_tokens: tokens that their prompts may have together.
        prefix_cache: finished pages are found again by their tokens.
        policy: order of waiting requests of one priority: oldest first, or fair by client.
        max_prefill_tokens: most prompt tokens of one row in a step; None is the budget.
        client_weights: shares of clients under the fair policy; 1 where not named.
    """

    page_size: int
    groups: tuple[GroupLimits, ...]
    num_slots: int
    num_shards: int = 1
    max_step_tokens: int
    max_context_tokens: int | None
    tokens_per_step: int = 1
    max_in_flight: int = 2
    max_queued_requests: int = 1024
    max_queued_tokens: int = 1_000_000
    prefix_cache: bool = True
    policy: PolicyName = "fcfs"
    max_prefill_tokens: int | None = None
    client_weights: dict[str, float] = {}

    def __post_init__(self) -> None:
        for name in (
            "page_size",
            "num_slots",
            "num_shards",
            "max_step_tokens",
            "tokens_per_step",
            "max_in_flight",
            "max_queued_requests",
            "max_queued_tokens",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if self.max_in_flight > MAX_IN_FLIGHT:
            raise ConfigError(f"max_in_flight={self.max_in_flight} must be at most {MAX_IN_FLIGHT}")
        if self.policy not in ("fcfs", "fair"):
            raise ConfigError(f"policy={self.policy!r} is unknown; use 'fcfs' or 'fair'")
        if not self.groups:
            raise ConfigError("groups is empty; name at least one cache group")
        if self.max_context_tokens is not None and self.max_context_tokens < 2:
            raise ConfigError(
                f"max_context_tokens={self.max_context_tokens} must be at least 2: a prompt of "
                "one token, and one more"
            )
        if self.max_prefill_tokens is not None and self.max_prefill_tokens < 1:
            raise ConfigError(f"max_prefill_tokens={self.max_prefill_tokens} must be at least 1")
        least = self.tokens_per_step * max(self.num_slots, self.max_in_flight)
        if self.max_step_tokens < least:
            raise ConfigError(
                f"max_step_tokens={self.max_step_tokens} is below {least}, which "
                f"num_slots={self.num_slots} decode rows of {self.tokens_per_step} tokens and "
                f"max_in_flight={self.max_in_flight} steps of one row need; use at least {least}"
            )
        for client, weight in self.client_weights.items():
            if not weight > 0:
                raise ConfigError(
                    f"client_weights[{client!r}]={weight} must be above 0; a client's share is "
                    "its weight over the sum of all"
                )
        for group in range(len(self.groups)):
            self.table_width(group)

    def table_width(self, group: int) -> int:
        """Returns the columns of the page table of a group."""
        limits = self.groups[group]
        return table_width(
            self.page_size,
            self.max_context_tokens,
            self.max_step_tokens,
            limits.window,
            limits.sink_tokens,
        )


class RowKind(enum.IntEnum):
    """What a row of a plan does.

    Attributes:
        DECODE: goes on from its newest token, which is on the device; samples.
        CHUNK: part of a prompt, given in the plan; does not sample.
        LAST: the end of a prompt, given in the plan; samples.
    """

    DECODE = 0
    CHUNK = 1
    LAST = 2


class Admission(msgspec.Struct, frozen=True):
    """A slot to set up before the step.

    Attributes:
        slot: global number.
        request: what was asked.
        sample_index: which completion or beam.
        tokens: prompt and output so far.
    """

    slot: int
    request: Request
    sample_index: int
    tokens: tuple[int, ...]


class StepPlan(msgspec.Struct):
    """One step as columns: one entry a row, DECODE rows first.

    Attributes:
        number: plans count from 1.
        slots: shard * num_slots + slot within the shard.
        counts: query tokens.
        starts: position of the first query token; for DECODE rows of several tokens an upper
            bound, while the device knows it exactly.
        kinds: `RowKind`.
        tokens: of the CHUNK and LAST rows, packed in row order.
        admissions: slots to set up before the step.
        writes: by group, (slot, column, page) to set in the page tables before the step.
        copies: by group, (shard, source page, destination page) to copy before the step.
    """

    number: int
    slots: list[int]
    counts: list[int]
    starts: list[int]
    kinds: list[int]
    tokens: list[int]
    admissions: list[Admission]
    writes: list[list[tuple[int, int, int]]]
    copies: list[list[tuple[int, int, int]]]


class Event(NamedTuple):
    """What a commit brought to one sequence.

    Attributes:
        sequence: it; its tokens hold the new ones already, a beam's do not.
        tokens: the new ones, without those after its end.
        finish_reason: set when it ended.
        row: index of its row in the plan.
    """

    sequence: Sequence
    tokens: list[int]
    finish_reason: FinishReason | None
    row: int


class SchedulerStats(msgspec.Struct, frozen=True, kw_only=True):
    """The scheduler in numbers; pages by group, over all shards.

    Attributes:
        waiting: requests without a first slot.
        waiting_tokens: tokens of their prompts.
        resuming: sequences of started requests without a slot: preempted ones and forks.
        loading: sequences whose prompt is being computed.
        running: sequences whose prompt is computed.
        in_flight: plans without a commit.
        pages_free: pages that hold nothing.
        pages_held: pages of sequences.
        pages_cached: pages of the prefix cache that no sequence holds.
        page_references: pages that the sequences would hold if they shared none.
        held_tokens: token places in held pages.
        unused_tokens: those of them that no dispatched plan has written.
        preemptions: how often a sequence gave up its slot.
        prefix_query_tokens: tokens of admitted sequences that looked into the prefix cache.
        prefix_hit_tokens: those that were found there.
    """

    waiting: int
    waiting_tokens: int
    resuming: int
    loading: int
    running: int
    in_flight: int
    pages_free: tuple[int, ...]
    pages_held: tuple[int, ...]
    pages_cached: tuple[int, ...]
    page_references: tuple[int, ...]
    held_tokens: int
    unused_tokens: int
    preemptions: int
    prefix_query_tokens: int
    prefix_hit_tokens: int

    @property
    def kv_waste(self) -> float:
        """Returns the fraction of the held token places that hold nothing."""
        return self.unused_tokens / self.held_tokens if self.held_tokens else 0.0
