"""What a request is told: turns the outcome of a step into the events of its samples.

entry = OpenRequest.create(request, sink)
reading = StepReading(plan, result)
entry.sink(entry.event(event, reading))            # for each event of the scheduler
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Self

import msgspec

from jaxserve.serving.beam import BeamRules, BeamSearch, Candidate
from jaxserve.serving.metrics import Timeline
from jaxserve.serving.request import FinishReason, Request, TokenEvent, TokenLogprob
from jaxserve.serving.runner import StepLogprobs, StepResult
from jaxserve.serving.scheduler import Event, RowKind, StepPlan

Sink = Callable[[TokenEvent], None]
"""Takes the events of one request, from the loop: it returns soon and does not block."""


class StepReading:
    """Finds the log-probabilities of a step's rows."""

    def __init__(self, plan: StepPlan, result: StepResult) -> None:
        self._plan = plan
        self._result = result
        self._places: list[int] | None = None

    def tokens(self, event: Event, count: int) -> tuple[TokenLogprob, ...]:
        """Returns an entry for each token that a sequence gained, with the `count` likeliest."""
        source = self._source()
        if self._places is None:
            self._places = _places(self._plan, self._result.counts)
        first = self._places[event.row]
        return tuple(source.row(first + i, count) for i in range(len(event.tokens)))

    def prompt(self, row: int, count: int) -> tuple[int, list[TokenLogprob]]:
        """Returns (place in the prompt, entries from there on) of what follows a row's tokens."""
        return self._plan.starts[row] + 1, self._source().prompt(row, count)

    def _source(self) -> StepLogprobs:
        if self._result.logprobs is None:
            raise RuntimeError("the runner gave no log-probabilities to a row that asks for them")
        return self._result.logprobs


def _places(plan: StepPlan, counts: Sequence[int] | None) -> list[int]:
    """Returns where each row's tokens begin among a step's tokens."""
    places: list[int] = []
    place = sampling = 0
    for kind in plan.kinds:
        places.append(place)
        if kind != RowKind.CHUNK:
            place += 1 if counts is None else counts[sampling]
            sampling += 1
    return places


@dataclass(slots=True)
class OpenRequest:
    """A request under way; the engine's loop alone writes it.

    Attributes:
        remaining: samples that have not ended; empty when the request is closed.
        prompt_logprobs: filled while the prompt is read, given with the first event.
        search: of a beam search.
        candidates: of the beams that wait for the others of their step, by sample index.
        timeline: when what happened to it.
    """

    request: Request
    sink: Sink
    remaining: set[int]
    prompt_logprobs: list[TokenLogprob | None] | None = None
    search: BeamSearch | None = None
    candidates: dict[int, Sequence[Candidate]] = field(default_factory=dict)
    timeline: Timeline = field(default_factory=Timeline)

    @classmethod
    def create(
        cls, request: Request, sink: Sink, rules: BeamRules | None = None, now_s: float = 0.0
    ) -> Self:
        """Returns a request that has just come.

        Args:
            rules: of a beam search, whose samples are its hypotheses.
            now_s: the engine's clock.
        """
        entry = cls(request, sink, set(range(request.params.n if rules is None else rules.width)))
        if request.params.prompt_logprobs is not None:
            entry.prompt_logprobs = [None for _ in request.prompt]
        if rules is not None:
            entry.search = BeamSearch(rules)
        entry.timeline.submitted_s = now_s
        return entry

    def event(self, event: Event, reading: StepReading) -> TokenEvent:
        """Returns what one sample gained in a step."""
        sequence, reason, tokens = event.sequence, event.finish_reason, tuple(event.tokens)
        asked = self.request.params.logprobs
        times = self.timeline.take_times(reason is not None)
        if reason is None and asked is None and times is None:  # most events
            index, cached = sequence.sample_index, sequence.cached_tokens
            return TokenEvent(self.request.id, index, tokens, cached_tokens=cached)
        return TokenEvent(
            request_id=self.request.id,
            sample_index=sequence.sample_index,
            token_ids=tokens,
            finish_reason=reason,
            logprobs=None if asked is None else reading.tokens(event, asked),
            cached_tokens=sequence.cached_tokens,
            stop_token=reason == "stop" and tokens[-1] in sequence.stop_ids,
            prompt_logprobs=self._take_prompt_logprobs(),
            times=times,
        )

    def score_prompt(self, row: int, reading: StepReading) -> None:
        """Notes the log-probabilities of what follows the tokens of a row, until they are given."""
        if self.prompt_logprobs is not None:
            count = self.request.params.prompt_logprobs or 0
            first, entries = reading.prompt(row, count)
            self.prompt_logprobs[first : first + len(entries)] = entries

    def _take_prompt_logprobs(self) -> tuple[TokenLogprob | None, ...] | None:
        if self.prompt_logprobs is None:
            return None
        taken, self.prompt_logprobs = tuple(self.prompt_logprobs), None
        return taken

    def step_beams(
        self, search: BeamSearch, event: Event, reading: StepReading
    ) -> list[tuple[int, int]] | None:
        """Returns (sample index of the parent, token) of the next beams; none when it is over.

        None: other beams of the step are still to come.
        """
        (after,) = reading.tokens(event, search.rules.num_candidates)
        self.candidates[event.sequence.sample_index] = after.top
        if len(self.candidates) < len(search.beams):
            return None
        beams = sorted(self.candidates)
        choices = search.step([self.candidates[beam] for beam in beams])
        self.candidates.clear()
        return [(beams[parent], token) for parent, token in choices]

    def hypotheses(self, search: BeamSearch, cached_tokens: int) -> list[TokenEvent]:
        """Returns the events of a search that is over, best first."""
        found = [
            TokenEvent(
                request_id=self.request.id,
                sample_index=index,
                token_ids=beam.tokens,
                finish_reason="stop" if stopped else "length",
                logprobs=tuple(map(TokenLogprob, beam.tokens, beam.logprobs)),
                cached_tokens=cached_tokens,
                stop_token=stopped,
            )
            for index, (beam, _, stopped) in enumerate(search.finished)
        ]
        if found and (scores := self._take_prompt_logprobs()) is not None:
            found[0] = msgspec.structs.replace(found[0], prompt_logprobs=scores)
        if found:
            found[0] = msgspec.structs.replace(found[0], times=self.timeline.take_times(True))
        # A vocabulary can be too small for as many hypotheses; each sample has its end anyway.
        return found + self.last_events("length")[len(found) :]

    def last_events(self, reason: FinishReason, error: str | None = None) -> list[TokenEvent]:
        """Returns an event without tokens for each sample that has not ended."""
        return [
            TokenEvent(self.request.id, index, finish_reason=reason, error=error)
            for index in sorted(self.remaining)
        ]
