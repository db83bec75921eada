"""One completion on its way: its tokens, and what the scheduler knows of it."""

from __future__ import annotations

import enum

from jaxserve.serving.request import Request

Rank = tuple[int, int, int]
"""Seniority: priority, number of the request's admission, sample index; lower goes first."""

NO_SLOT = -1


class State(enum.Enum):
    """Where a sequence stands.

    Attributes:
        WAITING: has never had a slot.
        LOADING: has a slot; its prompt is being computed.
        RUNNING: has a slot; its prompt is computed.
        PREEMPTED: had a slot and gave it up; its tokens will be computed again.
        FINISHED: over; late results are dropped.
    """

    WAITING = enum.auto()
    LOADING = enum.auto()
    RUNNING = enum.auto()
    PREEMPTED = enum.auto()
    FINISHED = enum.auto()


class Sequence:
    """A prompt and what was generated after it; the scheduler alone writes it.

    Attributes:
        request: what was asked.
        sample_index: which completion, or which beam, of the request.
        tokens: prompt and committed output.
        num_prompt: tokens of the prompt.
        computed: tokens whose keys and values the dispatched plans write; an upper bound while
            plans of several tokens a row are under way.
        slot: row of the running batch, or `NO_SLOT`.
        shard: home of the slot and the pages.
        pages: by group, the page of each `page_size` tokens; -1 where it is no longer held.
        num_pages: length of each list in `pages`.
        released: by group, the first page after the sinks' that is still held.
        state: where it stands.
        cached_tokens: tokens of the prompt that the prefix cache held at the first admission.
        stop_ids: tokens that end it.
        min_tokens: no stop before this much output.
        max_length: tokens at which it ends.
        arrival: number of the request, counted by `add`.
        rank: seniority; empty before the first admission.
        edge: a decode row may start up to here without a look at pages and length.
        check_at: number of tokens at which a commit has to look at pages and length.
        digests: of its full pages, as far as they were needed.
        num_known: leading pages that were offered to the prefix cache.
        ready_after: preempted: results of plans up to this number are still to come.
        row_plan, row_start: number and start of its newest row with tokens from the host.
        forked: the request's other samples were started.
        dropped: samples, of those that it has still to start or its own, that nobody wants.
        sampled: a beam that waits for `advance`.
        set_up_again: the slot's parameters are to be set up before the next row.
        parent, num_common: a beam in the same step, and the leading tokens shared with it.
    """

    __slots__ = (
        "arrival",
        "cached_tokens",
        "check_at",
        "computed",
        "digests",
        "dropped",
        "edge",
        "forked",
        "max_length",
        "min_tokens",
        "num_common",
        "num_known",
        "num_pages",
        "num_prompt",
        "pages",
        "parent",
        "rank",
        "ready_after",
        "released",
        "request",
        "row_plan",
        "row_start",
        "sample_index",
        "sampled",
        "set_up_again",
        "shard",
        "slot",
        "state",
        "stop_ids",
        "tokens",
    )

    def __init__(self, request: Request, sample_index: int, max_length: int, arrival: int) -> None:
        self.request = request
        self.sample_index = sample_index
        self.tokens: list[int] = list(request.prompt)
        self.num_prompt = len(self.tokens)
        self.computed = 0
        self.slot = NO_SLOT
        self.shard = 0
        self.pages: list[list[int]] = []
        self.num_pages = 0
        self.released: list[int] = []
        self.state = State.WAITING
        self.cached_tokens = 0
        self.stop_ids = frozenset(request.stop_ids).union(request.params.stop_token_ids)
        self.min_tokens = request.params.min_tokens or 0
        self.max_length = max_length
        self.arrival = arrival
        self.rank: Rank | tuple[()] = ()
        self.edge = 0
        self.check_at = max_length
        self.digests: list[bytes] = []
        self.num_known = 0
        self.ready_after = 0
        self.row_plan = 0
        self.row_start = 0
        self.forked = False
        self.dropped: frozenset[int] = frozenset()
        self.sampled = False
        self.set_up_again = False
        self.parent: Sequence | None = None
        self.num_common = self.num_prompt

    def __repr__(self) -> str:
        return (
            f"Sequence({self.request.id!r}, {self.sample_index}, {self.state.name.lower()}, "
            f"{self.num_prompt}+{self.num_output} tokens, computed={self.computed}, "
            f"slot={self.slot})"
        )

    @property
    def num_output(self) -> int:
        """Returns how many tokens were generated and committed."""
        return len(self.tokens) - self.num_prompt

    @property
    def is_beam(self) -> bool:
        """Returns whether it belongs to a beam search."""
        return self.request.beam_width > 1
