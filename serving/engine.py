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
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxserve.errors import UnavailableError, UsageError
from jaxserve.serving.beam import BeamRules, BeamSearch, beam_rules
from jaxserve.serving.metrics import EngineMetrics, StepTimes, Watch
from jaxserve.serving.replies import OpenRequest, Sink, StepReading
from jaxserve.serving.request import FinishReason, Request, TokenEvent
from jaxserve.serving.runner import Runner, StepResult
from jaxserve.serving.scheduler import Event, RowKind, Scheduler, SchedulerConfig, StepPlan

_log = logging.getLogger(__name__)

__all__ = ["Engine", "Sink", "StoppedError"]


class StoppedError(UnavailableError):
    """The engine takes no requests: it was stopped, or could not recover from a failure."""


class _Abort(NamedTuple):
    """Asks for the end of a request."""

    entry: OpenRequest


class _Finish(NamedTuple):
    """Asks for the end of one sample, whose output is cut to `num_tokens`."""

    entry: OpenRequest
    sample_index: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class _Flight:
    """A plan on its way; `scored` are its rows that read a prompt whose scores are wanted."""

    plan: StepPlan
    ticket: Any
    dispatched_s: float
    scored: list[tuple[int, OpenRequest]]


Delivery = tuple[OpenRequest, TokenEvent]


class Engine:
    """Drives a runner by a scheduler's plans.

    `submit`, `abort`, `finish` and `metrics` may be called from any thread, and from sinks.
    Everything else that touches scheduler or runner happens in the loop.

    Args:
        runner: computes; forgets its pages when a step failed.
        config: of the scheduler.
        clock: the one that `StepResult.ready_s` is read from.

    Attributes:
        after_events: called in the loop whenever sinks took events, once for all of a step; for
            those who hand them on together.
        before_start: called in the loop with the ids of requests, before their first step.
        watch: tells how long the loop has been at one turn.
    """

    def __init__(
        self,
        runner: Runner,
        config: SchedulerConfig,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._runner = runner
        self._config = config
        self.after_events: Callable[[], None] = _nothing
        self.before_start: Callable[[list[str]], None] | None = None
        self.watch = Watch()
        self._clock = clock
        self._guard = threading.Condition()  # over scheduler, open requests and the flags
        self._scheduler = Scheduler(config)
        self._open: dict[str, OpenRequest] = {}
        self._inbox: deque[_Abort | _Finish] = deque()
        self._woken = False
        self._closed: str | None = None
        self._stopping = False
        self._broken = False
        self._thread: threading.Thread | None = None
        # The loop's own.
        self._in_flight: deque[_Flight] = deque()
        self._scoring: dict[int, OpenRequest] = {}
        self._times = StepTimes()

    # For callers.

    def submit(self, request: Request, sink: Sink) -> None:
        """Queues a request, whose events `sink` will take.

        A sample has at most one event a step, and the last one has a finish reason. A beam search
        gives its `beam_width` hypotheses when it is over, best first: one event each, with all
        tokens, and in `logprobs` those whose sum orders them.

        Raises:
            QueueFullError: too many requests or tokens wait.
            CapacityError: the request can never fit.
            UsageError: a request of this id is under way, or it asks for what beam search lacks.
            StoppedError: the engine takes no requests.
        """
        entry = OpenRequest.create(request, sink, self._beam_rules(request), self._clock())
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

        Raises:
            UsageError: the request is a beam search, whose beams end together.
        """
        with self._guard:
            if (entry := self._open.get(request_id)) is not None:
                if entry.search is not None:
                    raise UsageError(
                        f"request {request_id!r} is a beam search, whose beams end together; "
                        "abort it instead"
                    )
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
            stats = self._scheduler.stats()
            lines = (entry.timeline for entry in self._open.values())
            oldest = next((line for line in lines if line.started_s is None), None)
        since_s = None if oldest is None else oldest.submitted_s
        return self._times.snapshot(stats, self._clock(), since_s)

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

    def forget_counts(self) -> None:
        """Counts from zero again; for an engine that was tried out before it serves."""
        self._times = StepTimes()
        self.watch = Watch()

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

    def _beam_rules(self, request: Request) -> BeamRules | None:
        context = self._config.max_context_tokens
        if request.beam_width == 1:
            return None
        room = None if context is None else context - len(request.prompt)
        return beam_rules(request, room)

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
        self.watch.begin(self._clock())
        try:
            return self._take_turn()
        finally:
            self.watch.end(self._clock())

    def _take_turn(self) -> bool:
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
        num_tokens = sum(plan.counts)
        self._times.step_tokens.add(num_tokens)
        self.watch.waits_for(num_tokens, len(plan.slots))
        if plan.admissions:
            self._start_requests(plan, began)
        ticket = self._runner.dispatch(plan)
        now = self._clock()
        self._in_flight.append(_Flight(plan, ticket, now, self._scored(plan)))
        self._times.prompt_tokens += len(plan.tokens)
        self._times.spent("dispatch", now - began)

    def _start_requests(self, plan: StepPlan, now_s: float) -> None:
        """Notes which requests get their first slot."""
        started: list[str] = []
        for admission in plan.admissions:
            entry = self._open.get(admission.request.id)
            if entry is not None and entry.timeline.started_s is None:
                self._times.of_requests.started(entry.timeline, now_s)
                started.append(entry.request.id)
        if started and self.before_start is not None:
            self.before_start(started)

    def _collect(self) -> list[Delivery]:
        """Returns the events of the oldest step, once it is done."""
        clock, times = self._clock, self._times
        flight = self._in_flight[0]
        self.watch.waits_for(sum(flight.plan.counts), len(flight.plan.slots))
        began = clock()
        result = self._runner.collect(flight.ticket)
        now = clock()
        self._in_flight.popleft()
        times.spent("wait", now - began)
        with self._guard:
            events = self._scheduler.commit(flight.plan.number, result.tokens, result.counts)
            deliveries = self._deliveries(flight, result, events, now)
        times.spent("commit", clock() - now)
        times.done(flight.dispatched_s, result.ready_s)
        return deliveries

    def _deliver(self, deliveries: Sequence[Delivery]) -> None:
        """Hands events to their sinks; a sink that raises loses its request."""
        began = self._clock()
        before = self._times.output_tokens
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
        if deliveries:
            self._times.tokens.add(self._times.output_tokens - before, began)
            self.after_events()
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
            deliveries = [
                delivery
                for entry in failing
                for delivery in self._close(entry, entry.last_events("error", cause))
            ]
        self._deliver(deliveries)
        if broken is not None:
            raise broken

    # From committed tokens to events; called with the guard held.

    def _deliveries(
        self, flight: _Flight, result: StepResult, events: Sequence[Event], now_s: float
    ) -> list[Delivery]:
        gained = self._times.of_requests.gained
        reading = StepReading(flight.plan, result)
        for row, entry in flight.scored:
            entry.score_prompt(row, reading)
        deliveries: list[Delivery] = []
        for event in events:
            entry = self._open.get(event.sequence.request.id)
            if entry is None:
                continue
            gained(entry.timeline, event.sequence.sample_index, len(event.tokens), now_s)
            if entry.search is not None:
                deliveries += self._search(entry, entry.search, event, reading)
                continue
            deliveries.append((entry, entry.event(event, reading)))
            if event.finish_reason is not None:
                self._ended(entry, event.sequence.sample_index, event.finish_reason)
        return deliveries

    def _search(
        self, entry: OpenRequest, search: BeamSearch, event: Event, reading: StepReading
    ) -> list[Delivery]:
        """Returns the hypotheses once a beam search is over; its beams step together."""
        choices = entry.step_beams(search, event, reading)
        if choices is None:
            return []
        self._scheduler.advance(entry.request.id, choices)
        if choices:
            return []
        return self._close(entry, entry.hypotheses(search, event.sequence.cached_tokens))

    def _end(
        self, entry: OpenRequest, reason: FinishReason, error: str | None = None
    ) -> list[Delivery]:
        """Returns the last events of a request that ends as a whole; its pages are free."""
        with self._guard:
            self._scheduler.abort(entry.request.id)
            return self._close(entry, entry.last_events(reason, error))

    def _close(self, entry: OpenRequest, last: Sequence[TokenEvent]) -> list[Delivery]:
        """Returns the last events of the samples, which end."""
        for event in last:
            assert event.finish_reason is not None
            self._ended(entry, event.sample_index, event.finish_reason)
        return [(entry, event) for event in last]

    def _ended(self, entry: OpenRequest, sample_index: int, reason: FinishReason) -> None:
        """Notes the end of a sample."""
        entry.remaining.discard(sample_index)
        self._times.finished[reason] += 1
        if not entry.remaining:
            del self._open[entry.request.id]
            prompt = len(entry.request.prompt)
            self._times.of_requests.ended(entry.timeline, prompt, self._clock())
            if not self._open:
                self._guard.notify_all()

    def _scored(self, plan: StepPlan) -> list[tuple[int, OpenRequest]]:
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


def _cause(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _nothing() -> None:
    """Does nothing, where nobody waits for the events of a step as a whole."""


def _no_sink(event: TokenEvent) -> None:
    """Takes the events of a request whose own sink failed."""
