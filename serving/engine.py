"""Serves many requests at once: one loop owns scheduler and device.

    engine = Engine(runner, config)
    engine.submit(request, sink)          # sink(TokenEvent), from the loop
    while engine.step():                  # in the caller's thread, or
        pass
    engine.start()                        # in a thread of its own
    engine.stop()

Each step obeys what callers asked for, schedules a plan and dispatches it. When `max_in_flight`
plans are on their way, or there is nothing to schedule, it collects the oldest, commits its tokens
and hands them to the sinks. So one step's host work is done while another runs on the device.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jaxserve.errors import JaxserveError, UsageError
from jaxserve.serving.beam import BeamRules, BeamSearch, Candidate, beam_rules
from jaxserve.serving.metrics import EngineMetrics, StepTimes
from jaxserve.serving.request import FinishReason, Request, TokenEvent, TokenLogprob
from jaxserve.serving.runner import Runner, StepResult
from jaxserve.serving.scheduler import Event, RowKind, Scheduler, SchedulerConfig, StepPlan

_log = logging.getLogger(__name__)

Sink = Callable[[TokenEvent], None]
"""Takes the events of one request, from the loop: it returns soon and does not block."""


class StoppedError(JaxserveError):
    """The engine takes no requests: it was stopped, or could not recover from a failure."""


@dataclass(slots=True)
class _Open:
    """A request under way; the loop alone writes it.

    Attributes:
        remaining: samples that have not ended; empty when the request is closed.
        prompt_logprobs: filled while the prompt is read, given with the first event.
        search: beams of a beam search; `candidates` of the beams that wait for the others.
    """

    request: Request
    sink: Sink
    remaining: set[int]
    prompt_logprobs: list[TokenLogprob | None] | None = None
    search: BeamSearch | None = None
    candidates: dict[int, Sequence[Candidate]] = field(default_factory=dict)


class _Abort(NamedTuple):
    """Asks for the end of a request."""

    entry: _Open


class _Finish(NamedTuple):
    """Asks for the end of one sample, whose output is cut to `num_tokens`."""

    entry: _Open
    sample_index: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class _Flight:
    """A plan on its way; `scored` are its rows that read a prompt whose scores are wanted."""

    plan: StepPlan
    ticket: Any
    dispatched_s: float
    scored: list[tuple[int, _Open]]


Delivery = tuple[_Open, TokenEvent]


class Engine:
    """Drives a runner by a scheduler's plans.

    `submit`, `abort`, `finish` and `metrics` may be called from any thread, and from sinks.
    Everything else that touches scheduler or runner happens in the loop.

    Args:
        runner: computes; forgets its pages when a step failed.
        config: of the scheduler.
        clock: the one that `StepResult.ready_s` is read from.
    """

    def __init__(
        self,
        runner: Runner,
        config: SchedulerConfig,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._runner = runner
        self._config = config
        self._clock = clock
        self._guard = threading.Condition()  # over scheduler, open requests and the flags
        self._scheduler = Scheduler(config)
        self._open: dict[str, _Open] = {}
        self._inbox: deque[_Abort | _Finish] = deque()
        self._woken = False
        self._closed: str | None = None
        self._stopping = False
        self._broken = False
        self._thread: threading.Thread | None = None
        # The loop's own.
        self._in_flight: deque[_Flight] = deque()
        self._scoring: dict[int, _Open] = {}
        self._times = StepTimes()

    # For callers.

    def submit(self, request: Request, sink: Sink, *, length_penalty: float = 1.0) -> None:
        """Queues a request, whose events `sink` will take.

        A sample has at most one event a step, and the last one has a finish reason. A beam search
        gives its `beam_width` hypotheses when it is over, best first: one event each, with all
        tokens, and in `logprobs` those whose sum orders them.

        Args:
            length_penalty: of a beam search; see `BeamRules`.

        Raises:
            QueueFullError: too many requests or tokens wait.
            CapacityError: the request can never fit.
            UsageError: a request of this id is under way, or it asks for what beam search lacks.
            StoppedError: the engine takes no requests.
        """
        entry = _opened(request, sink, self._beam_rules(request, length_penalty))
        with self._guard:
            if self._closed is not None:
                raise StoppedError(self._closed)
            self._scheduler.add(request)
            self._open[request.id] = entry
            self._times.requests += 1
            self._wake()

    def abort(self, request_id: str) -> None:
        """Ends a request by the next step; its samples end with "abort". Unknown ids are left."""
        with self._guard:
            if (entry := self._open.get(request_id)) is not None:
                self._inbox.append(_Abort(entry))
                self._wake()

    def finish(self, request_id: str, sample_index: int, num_tokens: int) -> None:
        """Ends one sample by the next step, its output cut to `num_tokens`; it has no more events.

        For clients that find a stop string in the text.
        """
        with self._guard:
            if (entry := self._open.get(request_id)) is not None:
                self._inbox.append(_Finish(entry, sample_index, num_tokens))
                self._wake()

    @property
    def busy(self) -> bool:
        """Returns whether a request is under way."""
        with self._guard:
            return bool(self._open)

    @property
    def metrics(self) -> EngineMetrics:
        """Returns what was counted so far."""
        with self._guard:
            return self._times.snapshot(self._scheduler.stats())

    def start(self) -> None:
        """Runs the loop in a thread, which sleeps while there is nothing to do."""
        with self._guard:
            if self._thread is not None:
                raise RuntimeError("the engine runs already; call stop() first")
            if self._broken:
                raise StoppedError(str(self._closed))
            self._closed, self._stopping = None, False
            self._thread = threading.Thread(target=self._serve, name="jaxserve-engine", daemon=True)
        self._thread.start()

    def stop(self, grace_s: float = 0.0) -> None:
        """Takes no more requests, waits for those under way, and ends the loop.

        Args:
            grace_s: longest wait; what is then under way fails. `math.inf` waits for all.
        """
        with self._guard:
            self._closed = self._closed or "the engine was stopped; start it again"
            if self._thread is not None:
                patience = None if math.isinf(grace_s) else grace_s
                self._guard.wait_for(lambda: not self._open, patience)
                self._stopping = True
                self._guard.notify_all()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            return
        until = self._clock() + grace_s
        while self._clock() < until and self.step():
            pass
        self._wind_up()

    def reset(self) -> None:
        """Forgets every page, those of the prefix cache too; for other weights.

        Raises:
            UsageError: a request is under way, or the loop has a thread.
        """
        with self._guard:
            if self._open or self._thread is not None:
                raise UsageError(
                    f"{len(self._open)} requests are under way"
                    + (
                        " and the loop runs; stop() it first"
                        if self._thread
                        else "; end them first"
                    )
                )
            self._forget()

    def _forget(self) -> None:
        """Empties scheduler and runner."""
        self._in_flight.clear()
        self._scoring.clear()
        self._times.idle()
        self._scheduler.reset()
        self._runner.reset()

    def _wake(self) -> None:
        self._woken = True
        self._guard.notify_all()

    def _beam_rules(self, request: Request, length_penalty: float) -> BeamRules | None:
        context = self._config.max_context_tokens
        if request.beam_width == 1:
            return None
        room = None if context is None else context - len(request.prompt)
        return beam_rules(request, length_penalty, room)

    # The loop.

    def step(self) -> bool:
        """Returns whether there was anything to do, after one turn of the loop.

        A turn that fails ends the requests under way with the cause; then serving goes on.
        """
        if self._thread is not None and threading.current_thread() is not self._thread:
            raise RuntimeError("the engine's own thread runs the loop; do not call step()")
        try:
            return self._turn()
        except Exception as error:
            self._recover(error)
            return True
        except BaseException as error:  # after the user's Ctrl-C the engine is whole, too
            self._start_afresh(_cause(error))
            raise

    def _serve(self) -> None:
        """Runs the loop until it is stopped, asleep while idle."""
        try:
            while not self._stopping:
                if not self.step():
                    with self._guard:
                        self._guard.wait_for(lambda: self._woken or self._stopping)
                        self._woken = False
            self._wind_up()
        except Exception:
            _log.critical("the engine's loop has ended", exc_info=True)

    def _wind_up(self) -> None:
        """Fails what is under way, and waits for the device."""
        with self._guard:
            cause = self._closed or "the engine was stopped"
            failing = list(self._open.values())
            deliveries = [d for entry in failing for d in self._end(entry, "error", cause)]
        self._deliver(deliveries)
        while self.step():
            pass

    def _turn(self) -> bool:
        clock, times = self._clock, self._times
        self._obey()
        began = clock()
        plan = self._schedule()
        times.spent("schedule", clock() - began)
        if plan is not None:
            self._dispatch(plan)
        elif not self._in_flight:
            times.idle()
            return False
        if plan is None or len(self._in_flight) >= self._config.max_in_flight:
            self._deliver(self._collect())
        return True

    def _obey(self) -> None:
        """Ends what callers asked to end."""
        while self._inbox:
            ask = self._inbox.popleft()
            if not ask.entry.remaining:
                continue
            if isinstance(ask, _Abort):
                self._deliver(self._end(ask.entry, "abort"))
            elif ask.sample_index in ask.entry.remaining:
                with self._guard:
                    self._scheduler.finish(ask.entry.request.id, ask.sample_index, ask.num_tokens)
                    self._ended(ask.entry, ask.sample_index, "stop")

    def _schedule(self) -> StepPlan | None:
        with self._guard:
            plan = self._scheduler.schedule()
            if plan is None and not self._in_flight and self._open:
                raise RuntimeError(
                    f"{len(self._open)} requests are under way and none of them can go on"
                )
            return plan

    def _dispatch(self, plan: StepPlan) -> None:
        began = self._clock()
        ticket = self._runner.dispatch(plan)
        now = self._clock()
        self._in_flight.append(_Flight(plan, ticket, now, self._scored(plan)))
        self._times.prompt_tokens += len(plan.tokens)
        self._times.spent("dispatch", now - began)

    def _collect(self) -> list[Delivery]:
        """Returns the events of the oldest step, once it is done."""
        clock, times = self._clock, self._times
        flight = self._in_flight[0]
        began = clock()
        result = self._runner.collect(flight.ticket)
        now = clock()
        self._in_flight.popleft()
        times.spent("wait", now - began)
        with self._guard:
            events = self._scheduler.commit(flight.plan.number, result.tokens, result.counts)
            deliveries = self._deliveries(flight, result, events)
        times.spent("commit", clock() - now)
        times.done(flight.dispatched_s, result.ready_s)
        return deliveries

    def _deliver(self, deliveries: Sequence[Delivery]) -> None:
        """Hands events to their sinks; a sink that raises loses its request."""
        began = self._clock()
        for entry, event in deliveries:
            if entry.sink is _no_sink:
                continue
            self._times.output_tokens += len(event.token_ids)
            try:
                entry.sink(event)
            except Exception:
                _log.exception("the sink of request %r failed; it is aborted", entry.request.id)
                entry.sink = _no_sink
                self._end(entry, "abort")
        self._times.spent("deliver", self._clock() - began)

    def _recover(self, error: Exception) -> None:
        """Fails what is under way with its cause; what comes later is served."""
        _log.error("a step failed, and %d requests with it", len(self._open), exc_info=error)
        self._times.failures += 1
        self._start_afresh(_cause(error))

    def _start_afresh(self, cause: str) -> None:
        """Fails what is under way, and forgets every page and slot.

        Raises:
            Exception: the runner cannot be reset; the engine then takes no more requests.
        """
        broken: Exception | None = None
        with self._guard:
            failing = list(self._open.values())
            try:
                self._forget()
            except Exception as error:
                broken = error
                self._broken = True
                self._closed = f"the engine did not recover from a failed step: {_cause(error)}"
            deliveries = [d for entry in failing for d in self._close(entry, "error", cause)]
        self._deliver(deliveries)
        if broken is not None:
            raise broken

    # From committed tokens to events; called with the guard held.

    def _deliveries(
        self, flight: _Flight, result: StepResult, events: Sequence[Event]
    ) -> list[Delivery]:
        for row, entry in flight.scored:
            _take_prompt_logprobs(entry, flight.plan, row, result)
        reading = _Reading(flight.plan, result)
        deliveries: list[Delivery] = []
        for event in events:
            entry = self._open.get(event.sequence.request.id)
            if entry is None:
                continue
            if entry.search is not None:
                deliveries += self._search(entry, entry.search, event, reading)
            else:
                deliveries.append((entry, self._event(entry, event, reading)))
        return deliveries

    def _event(self, entry: _Open, event: Event, reading: _Reading) -> TokenEvent:
        """Returns what one sample gained in a step."""
        sequence, reason, tokens = event.sequence, event.finish_reason, tuple(event.tokens)
        asked = entry.request.params.logprobs
        if reason is None and asked is None and entry.prompt_logprobs is None:  # most events
            index, cached = sequence.sample_index, sequence.cached_tokens
            return TokenEvent(entry.request.id, index, tokens, cached_tokens=cached)
        logprobs = None if asked is None else reading.logprobs(event, asked)
        prompt_logprobs = None
        if entry.prompt_logprobs is not None:
            prompt_logprobs, entry.prompt_logprobs = tuple(entry.prompt_logprobs), None
        if reason is not None:
            self._ended(entry, sequence.sample_index, reason)
        return TokenEvent(
            request_id=entry.request.id,
            sample_index=sequence.sample_index,
            token_ids=tokens,
            finish_reason=reason,
            logprobs=logprobs,
            cached_tokens=sequence.cached_tokens,
            stop_token=reason == "stop" and tokens[-1] in sequence.stop_ids,
            prompt_logprobs=prompt_logprobs,
        )

    def _search(
        self, entry: _Open, search: BeamSearch, event: Event, reading: _Reading
    ) -> list[Delivery]:
        """Returns the hypotheses once a beam search is over; its beams step together."""
        (after,) = reading.logprobs(event, search.rules.num_candidates)
        entry.candidates[event.sequence.sample_index] = after.top
        if len(entry.candidates) < len(search.beams):
            return []
        beams = sorted(entry.candidates)
        choices = search.step([entry.candidates[beam] for beam in beams])
        entry.candidates.clear()
        if not search.done:
            chosen = [(beams[parent], token) for parent, token in choices]
            self._scheduler.advance(entry.request.id, chosen)
            return []
        self._scheduler.abort(entry.request.id)
        deliveries: list[Delivery] = []
        for index, found in enumerate(search.finished):
            pairs = zip(found.beam.tokens, found.beam.logprobs, strict=True)
            reason = "stop" if found.stopped else "length"
            final = TokenEvent(
                request_id=entry.request.id,
                sample_index=index,
                token_ids=found.beam.tokens,
                finish_reason=reason,
                logprobs=tuple(TokenLogprob(token, logprob) for token, logprob in pairs),
                cached_tokens=event.sequence.cached_tokens,
                stop_token=found.stopped,
            )
            deliveries.append((entry, final))
            self._ended(entry, index, reason)
        # A vocabulary can be too small for as many hypotheses; each sample has its end anyway.
        return deliveries + self._close(entry, "length")

    def _end(self, entry: _Open, reason: FinishReason, error: str | None = None) -> list[Delivery]:
        """Returns the last events of a request that ends as a whole; its pages are free."""
        with self._guard:
            self._scheduler.abort(entry.request.id)
            return self._close(entry, reason, error)

    def _close(
        self, entry: _Open, reason: FinishReason, error: str | None = None
    ) -> list[Delivery]:
        """Returns the last event of each sample that has not ended."""
        last = [
            TokenEvent(entry.request.id, index, finish_reason=reason, error=error)
            for index in sorted(entry.remaining)
        ]
        for event in last:
            self._ended(entry, event.sample_index, reason)
        return [(entry, event) for event in last]

    def _ended(self, entry: _Open, sample_index: int, reason: FinishReason) -> None:
        """Notes the end of a sample."""
        entry.remaining.discard(sample_index)
        self._times.finished[reason] += 1
        if not entry.remaining:
            del self._open[entry.request.id]
            if not self._open:
                self._guard.notify_all()

    def _scored(self, plan: StepPlan) -> list[tuple[int, _Open]]:
        """Returns rows that read a prompt whose log-probabilities are wanted, with the request."""
        for admission in plan.admissions:
            self._scoring.pop(admission.slot, None)
            entry = self._open.get(admission.request.id)
            if entry is not None and entry.prompt_logprobs is not None:
                self._scoring[admission.slot] = entry
        if not self._scoring:
            return []
        scored = [
            (row, self._scoring[slot])
            for row, slot in enumerate(plan.slots)
            if slot in self._scoring
        ]
        for row, _ in scored:
            if plan.kinds[row] == RowKind.LAST:
                del self._scoring[plan.slots[row]]
        return scored


class _Reading:
    """Finds the log-probabilities of a step's rows."""

    def __init__(self, plan: StepPlan, result: StepResult) -> None:
        self._plan = plan
        self._result = result
        self._places: list[int] | None = None

    def logprobs(self, event: Event, count: int) -> tuple[TokenLogprob, ...]:
        """Returns an entry for each token that a sequence gained, with the `count` likeliest."""
        source = self._result.logprobs
        if source is None:
            raise RuntimeError("the runner gave no log-probabilities to a row that asks for them")
        if self._places is None:
            self._places = _places(self._plan, self._result.counts)
        first = self._places[event.row]
        return tuple(source.row(first + i, count) for i in range(len(event.tokens)))


def _opened(request: Request, sink: Sink, rules: BeamRules | None) -> _Open:
    """Returns the record of a new request."""
    scores: list[TokenLogprob | None] | None = None
    if request.params.prompt_logprobs is not None:
        scores = [None for _ in request.prompt]
    if rules is None:
        return _Open(request, sink, set(range(request.params.n)), scores)
    return _Open(request, sink, set(range(rules.width)), scores, BeamSearch(rules))


def _take_prompt_logprobs(entry: _Open, plan: StepPlan, row: int, result: StepResult) -> None:
    """Fills in the scores of the tokens that follow a row's query tokens."""
    scores = entry.prompt_logprobs
    if scores is None:
        return
    if result.logprobs is None:
        raise RuntimeError("the runner gave no log-probabilities to a row that asks for them")
    asked = entry.request.params.prompt_logprobs or 0
    for offset, score in enumerate(result.logprobs.prompt(row, asked)):
        scores[plan.starts[row] + offset + 1] = score


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


def _cause(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _no_sink(event: TokenEvent) -> None:
    """Takes the events of a request whose own sink failed."""
