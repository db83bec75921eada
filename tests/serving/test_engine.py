"""The engine over a runner without a model: every token is checked against one found by hand.

python tests/serving/test_engine.py     # prints the loop's own time per step
"""

import logging
import math
import random
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from jaxserve.errors import CapacityError, QueueFullError, UsageError
from jaxserve.serving.engine import Engine, StoppedError
from jaxserve.serving.fake_runner import FakeRunner
from jaxserve.serving.metrics import EngineMetrics
from jaxserve.serving.pages import GroupLimits
from jaxserve.serving.plan import SchedulerConfig, StepPlan
from jaxserve.serving.request import Request, SamplingParams, TokenEvent
from jaxserve.serving.runner import StepResult

VOCAB = 997
WAIT_S = 20.0


def limits(**changes: Any) -> SchedulerConfig:
    """Returns small limits: pages of 4 tokens, 8 slots, steps of 24 tokens."""
    fields: dict[str, Any] = {
        "page_size": 4,
        "groups": (GroupLimits(num_pages=128),),
        "num_slots": 8,
        "max_step_tokens": 24,
        "max_context_tokens": 96,
    }
    return SchedulerConfig(**(fields | changes))


def request(
    name: object,
    prompt: Sequence[int] = (1, 2, 3),
    max_tokens: int = 8,
    stop_ids: tuple[int, ...] = (),
    beam_width: int = 1,
    **fields: Any,
) -> Request:
    fields = {"temperature": 1.0, "seed": 7, **fields}
    params = SamplingParams(max_tokens=max_tokens, **fields).resolved({})
    return Request(
        id=str(name), prompt=tuple(prompt), params=params, stop_ids=stop_ids, beam_width=beam_width
    )


class Log:
    """A sink that keeps what it takes, by request and sample."""

    def __init__(self) -> None:
        self.events: list[TokenEvent] = []
        self._by_request: dict[str, list[TokenEvent]] = defaultdict(list)
        self.tokens: dict[tuple[str, int], list[int]] = defaultdict(list)
        self.reasons: dict[tuple[str, int], str] = {}

    def __call__(self, event: TokenEvent) -> None:
        key = (event.request_id, event.sample_index)
        assert key not in self.reasons, "an event after the last one"
        self.events.append(event)
        self._by_request[event.request_id].append(event)
        self.tokens[key] += event.token_ids
        if event.finish_reason is not None:
            self.reasons[key] = event.finish_reason

    def of(self, name: object) -> list[TokenEvent]:
        return self._by_request[str(name)]


class Bench:
    """An engine on a fake runner, and a log of its events."""

    def __init__(self, runner_type: type[FakeRunner] = FakeRunner, **changes: Any) -> None:
        self.config = limits(**changes)
        self.runner = runner_type(self.config, VOCAB)
        self.engine = Engine(self.runner, self.config)
        self.log = Log()

    def submit(self, *requests: Request) -> None:
        for one in requests:
            self.engine.submit(one, self.log)

    def run(self, *requests: Request) -> None:
        """Serves requests to their end."""
        self.submit(*requests)
        while self.engine.step():
            self.engine._scheduler.check()

    def wanted(self, asked: Request, sample: int = 0) -> tuple[list[int], str]:
        """Returns the tokens and the finish reason found by hand."""
        params = asked.params
        assert params.max_tokens is not None
        most = params.max_tokens
        if self.config.max_context_tokens is not None:
            most = min(most, self.config.max_context_tokens - len(asked.prompt))
        tokens = self.runner.rule.continue_prompt(asked.prompt, params, most, sample)
        for at, token in enumerate(tokens, 1):
            if token in asked.stop_ids and at > (params.min_tokens or 0):
                return tokens[:at], "stop"
        return tokens, "length"

    def check(self, *requests: Request) -> None:
        """Checks every sample of the requests."""
        for asked in requests:
            for sample in range(asked.params.n):
                key = (asked.id, sample)
                found = self.log.tokens[key], self.log.reasons.get(key)
                assert found == self.wanted(asked, sample), key
            self._check_prompt(asked)

    def _check_prompt(self, asked: Request) -> None:
        """Checks that a prompt's log-probabilities came, if asked for, and with the first event."""
        count = asked.params.prompt_logprobs
        first, *later = [event.prompt_logprobs for event in self.log.of(asked.id)]
        assert later == [None] * len(later)
        if count is None:
            assert first is None
            return
        rule, prompt = self.runner.rule, asked.prompt
        assert first is not None and first[0] is None
        assert list(first[1:]) == [
            rule.logprob(rule.peak(prompt[:at]), prompt[at], count) for at in range(1, len(prompt))
        ]

    def check_empty(self) -> None:
        """Checks that nothing is left behind."""
        self.engine._scheduler.check()
        stats = self.engine.metrics.scheduler
        assert sum(stats.pages_held) == 0
        assert (stats.waiting, stats.resuming, stats.loading, stats.running) == (0, 0, 0, 0)
        assert not self.engine.busy


def mixed(rng: random.Random, count: int) -> list[Request]:
    """Returns requests of many kinds, some of which begin alike."""
    common = [rng.randrange(VOCAB) for _ in range(24)]
    made: list[Request] = []
    for name in range(count):
        own = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 20))]
        n = rng.choice([1, 1, 1, 2, 3])
        made.append(
            request(
                name,
                common[: rng.choice([0, 0, 5, 8, 24])] + own,
                max_tokens=rng.randint(1, 24),
                stop_ids=tuple(rng.sample(range(VOCAB), rng.choice([0, 40, 128]))),
                n=n,
                temperature=1.0 if n > 1 else rng.choice([0.0, 1.0]),
                seed=rng.randrange(1000),
                min_tokens=rng.choice([0, 0, 1]),
                prompt_logprobs=rng.choice([None, 0, 1]),
            )
        )
    return made


WINDOWED = (GroupLimits(num_pages=128), GroupLimits(num_pages=128, window=9, sink_tokens=3))
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one step at a time": {"max_in_flight": 1},
    "four steps ahead": {"max_in_flight": 4},
    "four tokens a step": {"tokens_per_step": 4, "max_step_tokens": 40},
    "four tokens, four ahead": {
        "tokens_per_step": 4,
        "max_step_tokens": 40,
        "max_in_flight": 4,
    },
    "few pages": {"groups": (GroupLimits(num_pages=24),)},
    "few pages, four tokens": {
        "groups": (GroupLimits(num_pages=26),),
        "tokens_per_step": 4,
        "max_step_tokens": 32,
    },
    "tiny chunks": {"max_prefill_tokens": 3},
    "pages of one token": {"page_size": 1, "groups": (GroupLimits(num_pages=300),)},
    "large pages": {"page_size": 32, "groups": (GroupLimits(num_pages=12),)},
    "a window group": {"groups": WINDOWED},
    "a window group, few pages": {
        "groups": (GroupLimits(num_pages=26), GroupLimits(num_pages=26, window=9)),
    },
    "no prefix cache": {"prefix_cache": False},
    "two shards": {"num_shards": 2, "num_slots": 4},
    "four shards, few pages": {
        "num_shards": 4,
        "num_slots": 2,
        "groups": (GroupLimits(num_pages=16),),
    },
    "fair": {"policy": "fair"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_token_is_the_one_found_by_hand(variant: str) -> None:
    for seed in range(3):
        bench = Bench(**VARIANTS[variant])
        requests = mixed(random.Random(seed), 24)
        bench.run(*requests)
        bench.check(*requests)
        bench.check_empty()
        stats = bench.engine.metrics.scheduler
        assert ("few pages" in variant) <= (stats.preemptions > 0)


@pytest.mark.parametrize("in_flight", [1, 2, 4])
def test_as_many_steps_are_under_way_as_may_be(in_flight: int) -> None:
    bench = Bench(max_in_flight=in_flight)
    bench.run(request("a"))
    assert bench.runner.most_in_flight == in_flight
    bench.check(request("a"))


def test_a_step_is_dispatched_before_the_one_before_is_collected() -> None:
    calls: list[str] = []

    class Noted(FakeRunner):
        def dispatch(self, plan: StepPlan) -> Any:
            calls.append(f"dispatch {plan.number}")
            return plan.number, super().dispatch(plan)

        def collect(self, ticket: Any) -> StepResult:
            calls.append(f"collect {ticket[0]}")
            return super().collect(ticket[1])

    bench = Bench(Noted)
    bench.run(request("a", max_tokens=3))
    assert calls == [
        "dispatch 1",
        "dispatch 2",
        "collect 1",
        "dispatch 3",
        "collect 2",
        "collect 3",
    ]


def test_a_sample_has_one_event_a_step() -> None:
    bench = Bench(tokens_per_step=4, max_step_tokens=40)
    bench.run(request("a", max_tokens=20))
    gains = [len(event.token_ids) for event in bench.log.events]
    assert len(gains) <= bench.engine.metrics.steps
    assert max(gains) > 1
    assert [event.finish_reason for event in bench.log.events[:-1]] == [None] * (len(gains) - 1)


def test_the_stop_token_is_marked() -> None:
    bench = Bench()
    plain = request("a")
    tokens, _ = bench.wanted(plain)
    bench.run(request("stops", stop_ids=(tokens[3],)), request("ends", max_tokens=4))
    stops, ends = bench.log.of("stops")[-1], bench.log.of("ends")[-1]
    assert (stops.finish_reason, stops.stop_token) == ("stop", True)
    assert (ends.finish_reason, ends.stop_token) == ("length", False)
    assert stops.token_ids == ends.token_ids


# Log-probabilities.


def test_log_probabilities_come_to_those_who_ask() -> None:
    bench = Bench(tokens_per_step=4, max_step_tokens=40)
    asking, silent = request("asks", logprobs=2), request("is silent", prompt=(4, 5))
    bench.run(asking, silent)
    bench.check(asking, silent)
    assert all(event.logprobs is None for event in bench.log.of("is silent"))
    entries = [entry for event in bench.log.of("asks") for entry in event.logprobs or ()]
    tokens = list(asking.prompt)
    for entry in entries:
        peak = bench.runner.rule.peak(tokens)
        tokens.append(entry.token_id)
        assert entry == bench.runner.rule.logprob(peak, entry.token_id, 2)
    assert tokens[3:] == bench.wanted(asking)[0]


@pytest.mark.parametrize("n", [1, 3])
def test_prompt_log_probabilities_come_once_with_the_first_event(n: int) -> None:
    bench = Bench(max_prefill_tokens=5)
    prompt = tuple(range(10, 33))
    bench.run(request("warms the cache", prompt))
    bench.run(request("asks", prompt, prompt_logprobs=1, n=n), request("other", prompt))
    bench.check(request("asks", prompt, prompt_logprobs=1, n=n), request("other", prompt))
    assert bench.log.of("asks")[0].cached_tokens == 0


def test_cached_tokens_are_told() -> None:
    bench = Bench()
    prompt = tuple(range(18))
    bench.run(request("misses", prompt))
    bench.run(request("hits", prompt))
    bench.check(request("misses", prompt), request("hits", prompt))
    assert {event.cached_tokens for event in bench.log.of("misses")} == {0}
    assert {event.cached_tokens for event in bench.log.of("hits")} == {16}


# Ends that callers ask for.


@pytest.mark.parametrize("in_flight", [1, 2, 4])
def test_an_abort_frees_pages_by_the_next_step(in_flight: int) -> None:
    bench = Bench(max_in_flight=in_flight, prefix_cache=False)
    bench.submit(request("a", max_tokens=50), request("b", max_tokens=50))
    for _ in range(6):
        bench.engine.step()
    held = bench.engine.metrics.scheduler.pages_held[0]
    bench.engine.abort("a")
    bench.engine.step()
    assert bench.engine.metrics.scheduler.pages_held[0] <= held // 2 + 1
    assert bench.log.reasons == {("a", 0): "abort"}
    while bench.engine.step():
        pass
    bench.check(request("b", max_tokens=50))
    bench.check_empty()


def test_an_aborted_request_gives_room_to_one_that_waits() -> None:
    bench = Bench(num_slots=1)
    bench.submit(request("runs", max_tokens=90), request("waits"))
    for _ in range(4):
        bench.engine.step()
    assert not bench.log.of("waits")
    bench.engine.abort("runs")
    while bench.engine.step():
        pass
    bench.check(request("waits"))


def test_every_sample_of_an_aborted_request_ends() -> None:
    bench = Bench()
    bench.submit(request("a", n=3, max_tokens=50))
    for _ in range(5):
        bench.engine.step()
    bench.engine.abort("a")
    bench.engine.abort("a")
    bench.engine.abort("nobody")
    while bench.engine.step():
        pass
    assert bench.log.reasons == {("a", sample): "abort" for sample in range(3)}
    assert bench.engine.metrics.finished == {"abort": 3}
    bench.check_empty()


def test_a_waiting_request_can_be_aborted() -> None:
    bench = Bench(num_slots=1)
    bench.submit(request("runs"), request("waits"))
    bench.engine.abort("waits")
    bench.run()
    bench.check(request("runs"))
    assert [event.finish_reason for event in bench.log.of("waits")] == ["abort"]


def test_an_abort_does_not_reach_a_later_request_of_that_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = Bench()

    def dispatch(plan: StepPlan) -> Any:
        bench.engine.abort("a")  # comes while the step fails
        raise ValueError("step")

    bench.submit(request("a"))
    with monkeypatch.context() as patch:
        patch.setattr(bench.runner, "dispatch", dispatch)
        bench.engine.step()
    assert bench.log.reasons == {("a", 0): "error"}
    bench.log = Log()
    bench.run(request("a"))
    bench.check(request("a"))


def test_a_finished_sample_has_no_more_events_and_the_others_go_on() -> None:
    bench = Bench()
    asked = request("a", n=2, max_tokens=30)

    def sink(event: TokenEvent) -> None:
        bench.log(event)
        if len(bench.log.tokens["a", 0]) == 5:
            bench.engine.finish("a", 0, 4)
            bench.engine.finish("a", 0, 4)

    bench.engine.submit(asked, sink)
    bench.run()
    assert bench.log.tokens["a", 0] == bench.wanted(asked, 0)[0][:5]
    assert bench.log.tokens["a", 1] == bench.wanted(asked, 1)[0]
    assert bench.engine.metrics.finished == {"stop": 1, "length": 1}
    bench.check_empty()


def finished_early(asked: Request, steps: int, samples: Sequence[int], **changes: Any) -> Bench:
    """Returns an engine that served a request whose samples were finished after so many steps."""
    bench = Bench(**changes)
    bench.submit(asked)
    for _ in range(steps):
        bench.engine.step()
    assert not bench.log.events
    for sample in samples:
        bench.engine.finish(asked.id, sample, 0)
    bench.run(request("other", prompt=(5, 6), max_tokens=20))
    bench.check(request("other", prompt=(5, 6), max_tokens=20))
    bench.check_empty()
    assert bench.engine.metrics.failures == 0
    return bench


@pytest.mark.parametrize("prefix_cache", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 2])
@pytest.mark.parametrize("samples", [(0,), (1,), (0, 2), (1, 2)])
def test_samples_finished_before_they_start_leave_the_others_alone(
    samples: tuple[int, ...], steps: int, prefix_cache: bool
) -> None:
    asked = request("a", prompt=range(1, 60), n=3, prompt_logprobs=2)
    bench = finished_early(asked, steps, samples, prefix_cache=prefix_cache)
    left = {0, 1, 2} - set(samples)
    assert {event.sample_index for event in bench.log.of("a")} == left
    for sample in left:
        assert bench.log.tokens["a", sample] == bench.wanted(asked, sample)[0]
    bench._check_prompt(asked)
    assert bench.engine.metrics.finished == {"stop": len(samples), "length": len(left) + 1}


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_request_all_of_whose_samples_are_finished_early_is_over(steps: int) -> None:
    asked = request("a", prompt=range(1, 60), n=3)
    bench = finished_early(asked, steps, (2, 0, 1))
    assert bench.log.of("a") == []
    bench.run(asked)  # its id is free
    bench.check(asked)


def test_beams_cannot_be_finished() -> None:
    bench = Bench()
    asked = request("a", beam_width=3, temperature=0, max_tokens=5)
    bench.submit(asked)
    with pytest.raises(UsageError, match=r"'a' is a beam search.*abort it instead"):
        bench.engine.finish("a", 0, 0)
    bench.run()
    assert bench.log.reasons == {("a", sample): "length" for sample in range(3)}
    bench.engine.finish("a", 0, 0)  # is over: nothing happens


def test_a_sink_may_submit_and_abort() -> None:
    bench = Bench()

    def sink(event: TokenEvent) -> None:
        bench.log(event)
        if event.finish_reason is not None:
            bench.submit(request("second"))
            bench.engine.abort("third")

    bench.submit(request("third", max_tokens=80))
    bench.engine.submit(request("first", max_tokens=3), sink)
    bench.run()
    bench.check(request("second"))
    assert bench.log.reasons["third", 0] == "abort"


# Refusals.


def test_a_refused_request_leaves_nothing_behind() -> None:
    bench = Bench(max_queued_requests=2, groups=(GroupLimits(num_pages=10),))
    with pytest.raises(CapacityError, match="10"):
        bench.submit(request("too long", max_tokens=80))
    bench.submit(request("a"), request("b"))
    with pytest.raises(QueueFullError, match="2"):
        bench.submit(request("c"))
    with pytest.raises(UsageError, match="'a'"):
        bench.submit(request("a"))
    bench.run()
    bench.check(request("a"), request("b"))
    assert {event.request_id for event in bench.log.events} == {"a", "b"}
    bench.check_empty()


def test_the_queue_is_bounded_for_many_callers_at_once() -> None:
    bench = Bench(max_queued_requests=50)
    refused: list[str] = []

    def call(caller: int) -> None:
        for number in range(40):
            try:
                bench.submit(request(f"{caller}.{number}", max_tokens=1))
            except QueueFullError:
                refused.append(f"{caller}.{number}")

    callers = [threading.Thread(target=call, args=[caller]) for caller in range(5)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(refused) == 200 - 50
    assert bench.engine.metrics.scheduler.waiting == 50


# Failures.


@pytest.mark.parametrize("where", ["dispatch", "collect"])
def test_a_failed_step_fails_the_open_requests_with_its_cause(
    where: str, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench(num_slots=2)
    bench.submit(request("runs", n=2, max_tokens=50), request("waits"))
    for _ in range(4):
        bench.engine.step()
    fail = bench.runner.fail_dispatch if where == "dispatch" else bench.runner.fail_collect
    fail(ValueError("the device is gone"))
    while bench.engine.step():
        pass
    assert bench.log.reasons == dict.fromkeys([("runs", 0), ("runs", 1), ("waits", 0)], "error")
    assert {e.error for e in bench.log.events if e.finish_reason} == {
        "ValueError: the device is gone"
    }
    assert bench.runner.resets == 1
    assert bench.engine.metrics.failures == 1
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert caplog.records[0].exc_info is not None
    again = request("again", n=3, max_tokens=20)
    bench.run(again)
    bench.check(again)
    bench.check_empty()


def test_a_fault_of_the_engine_itself_is_logged_and_survived(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench()
    with monkeypatch.context() as patch:
        patch.setattr(bench.engine._scheduler, "commit", lambda *_: [][0])
        bench.run(request("a"))
    assert bench.log.of("a")[-1].error == "IndexError: list index out of range"
    assert "in <lambda>" in caplog.text
    bench.run(request("b"))
    bench.check(request("b"))


def test_requests_that_cannot_go_on_fail_instead_of_hanging(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = Bench()
    with monkeypatch.context() as patch:
        patch.setattr(bench.engine._scheduler, "schedule", lambda: None)
        bench.run(request("a"))
    (event,) = bench.log.events
    assert event.error is not None and "none of them can go on" in event.error


def test_an_engine_that_cannot_recover_takes_no_more_requests() -> None:
    bench = Bench()
    bench.submit(request("a"))
    bench.runner.fail_dispatch(ValueError("step"))
    bench.runner.fail_reset(ValueError("no memory"))
    with pytest.raises(ValueError, match="no memory"):
        bench.engine.step()
    assert bench.log.reasons == {("a", 0): "error"}
    with pytest.raises(StoppedError, match="no memory"):
        bench.submit(request("b"))
    with pytest.raises(StoppedError, match="no memory"):
        bench.engine.start()


def test_an_interrupted_step_leaves_a_whole_engine() -> None:
    class Interrupted(FakeRunner):
        def collect(self, ticket: Any) -> StepResult:
            if self.plans == 5:
                self.plans += 1
                raise KeyboardInterrupt
            return super().collect(ticket)

    bench = Bench(Interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench.run(request("a", max_tokens=20))
    assert bench.log.reasons == {("a", 0): "error"}
    bench.run(request("b"))
    bench.check(request("b"))


def test_a_sink_that_raises_loses_its_request_alone(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    calls: list[TokenEvent] = []

    def sink(event: TokenEvent) -> None:
        calls.append(event)
        raise OSError("the reader went away")

    bench.submit(request("good", max_tokens=20))
    bench.engine.submit(request("bad", n=2, max_tokens=20), sink)
    bench.run()
    bench.check(request("good", max_tokens=20))
    assert len(calls) == 1
    assert "the reader went away" in caplog.text and "'bad'" in caplog.text
    assert bench.engine.metrics.finished == {"length": 1, "abort": 2}
    bench.check_empty()


def test_a_reset_forgets_the_prefix_cache() -> None:
    bench = Bench()
    prompt = tuple(range(18))
    bench.run(request("a", prompt))
    bench.engine.reset()
    assert bench.engine.metrics.scheduler.pages_cached == (0,)
    bench.run(request("b", prompt))
    bench.check(request("b", prompt))
    assert bench.log.of("b")[0].cached_tokens == 0
    bench.submit(request("c"))
    with pytest.raises(UsageError, match="1 requests are under way"):
        bench.engine.reset()


# The thread.


@pytest.fixture
def started() -> Iterator[Bench]:
    bench = Bench()
    bench.engine.start()
    yield bench
    bench.engine.stop()


def await_end(bench: Bench, *requests: Request) -> None:
    """Submits requests, and returns when each sample has ended."""
    left = sum(asked.params.n for asked in requests)
    over = threading.Event()
    lock = threading.Lock()

    def sink(event: TokenEvent) -> None:
        nonlocal left
        with lock:
            bench.log(event)
            left -= event.finish_reason is not None
            if not left:
                over.set()

    for asked in requests:
        bench.engine.submit(asked, sink)
    assert over.wait(WAIT_S)


def test_the_thread_serves_what_comes_and_goes(started: Bench) -> None:
    for turn in range(3):
        requests = [request(f"{turn}.{number}", prompt=(turn, number)) for number in range(10)]
        await_end(started, *requests)
        started.check(*requests)
    with pytest.raises(RuntimeError, match="own thread"):
        started.engine.step()
    with pytest.raises(RuntimeError, match="already"):
        started.engine.start()
    with pytest.raises(UsageError, match="stop"):
        started.engine.reset()


def test_an_idle_engine_costs_no_processor_time(started: Bench) -> None:
    await_end(started, request("a"))
    thread = started.engine._thread
    assert thread is not None and thread.ident is not None
    of_the_thread = time.pthread_getcpuclockid(thread.ident)
    threading.Event().wait(0.05)
    before = time.clock_gettime(of_the_thread)
    threading.Event().wait(0.4)
    assert time.clock_gettime(of_the_thread) - before < 0.001
    await_end(started, request("b"))
    started.check(request("b"))


def test_stopping_fails_what_is_under_way() -> None:
    bench = Bench()
    gate, running = threading.Event(), threading.Event()

    def sink(event: TokenEvent) -> None:
        bench.log(event)
        running.set()
        assert gate.wait(WAIT_S)

    bench.engine.start()
    bench.engine.submit(request("a", max_tokens=90), sink)
    assert running.wait(WAIT_S)
    stopping = threading.Thread(target=bench.engine.stop)
    stopping.start()
    gate.set()
    stopping.join(WAIT_S)
    assert not stopping.is_alive()
    assert bench.log.events[-1].finish_reason == "error"
    assert "was stopped" in (bench.log.events[-1].error or "")
    with pytest.raises(StoppedError, match="was stopped"):
        bench.submit(request("b"))
    bench.check_empty()


@pytest.mark.parametrize("threaded", [True, False])
def test_a_stop_with_grace_lets_requests_end(threaded: bool) -> None:
    bench = Bench()
    asked = [request(number, max_tokens=50) for number in range(20)]
    if threaded:
        bench.engine.start()
    bench.submit(*asked)
    bench.engine.stop(grace_s=math.inf)
    bench.check(*asked)
    bench.check_empty()


def test_a_stopped_engine_can_be_started_again() -> None:
    bench = Bench()
    bench.engine.start()
    await_end(bench, request("a"))
    bench.engine.stop()
    bench.engine.start()
    await_end(bench, request("b"))
    bench.check(request("a"), request("b"))
    bench.engine.stop()


def test_a_thread_whose_engine_cannot_recover_ends(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    bench.runner.fail_dispatch(ValueError("step"))
    bench.runner.fail_reset(ValueError("no memory"))
    bench.engine.start()
    await_end(bench, request("a"))
    assert bench.engine._thread is not None
    bench.engine._thread.join(WAIT_S)
    with pytest.raises(StoppedError, match="no memory"):
        bench.submit(request("b"))
    bench.engine.stop()
    assert caplog.records[-1].levelno == logging.CRITICAL


@pytest.mark.parametrize(
    "changes",
    [
        {"max_in_flight": 1},
        {"max_in_flight": 4, "tokens_per_step": 4, "max_step_tokens": 192},
        {"num_shards": 2, "num_slots": 16},
    ],
    ids=["one in flight", "four in flight, four tokens", "two shards"],
)
def test_a_thousand_requests_with_random_aborts(changes: dict[str, Any]) -> None:
    sizes = {"num_slots": 32, "max_step_tokens": 96, "groups": (GroupLimits(num_pages=150),)}
    bench = Bench(**(sizes | changes))
    rng = random.Random(1)
    requests = [
        request(
            number,
            [rng.randrange(VOCAB) for _ in range(rng.randint(1, 30))],
            max_tokens=rng.randint(1, 16),
            seed=number,
        )
        for number in range(1000)
    ]
    doomed = rng.sample(range(1000), 300)
    bench.engine.start()
    callers = [
        threading.Thread(target=bench.submit, args=requests[part::4], daemon=True)
        for part in range(4)
    ]
    for caller in callers:
        caller.start()
    for number in doomed:
        bench.engine.abort(str(number))
    for caller in callers:
        caller.join()
    for number in doomed[150:]:
        bench.engine.abort(str(number))
    bench.engine.stop(grace_s=math.inf)
    assert len(bench.log.reasons) == 1000
    aborted = {name for (name, _), reason in bench.log.reasons.items() if reason == "abort"}
    assert aborted
    assert aborted <= {str(number) for number in doomed}
    bench.check(*(asked for asked in requests if asked.id not in aborted))
    for name in aborted:
        found = bench.log.tokens[name, 0]
        assert found == bench.wanted(requests[int(name)])[0][: len(found)]
    bench.check_empty()


# What the loop itself takes.


def serve_at_once(sequences: int, steps: int, step_s: float = 0.0) -> EngineMetrics:
    """Returns the metrics of `sequences` decoding together for `steps` steps."""
    config = limits(
        num_slots=sequences,
        page_size=16,
        groups=(GroupLimits(num_pages=sequences * (steps // 16 + 2)),),
        max_step_tokens=max(512, sequences),
        max_context_tokens=steps + 16,
    )
    engine = Engine(FakeRunner(config, VOCAB, step_s), config)
    for number in range(sequences):
        engine.submit(request(number, prompt=(number, 1), max_tokens=steps), lambda event: None)
    while engine.step():
        pass
    return engine.metrics


def test_a_step_that_takes_its_time_hides_the_work_of_the_host() -> None:
    metrics = serve_at_once(sequences=2, steps=20, step_s=0.005)
    # Each plan but the last few was dispatched while the one before it ran.
    assert metrics.host_gap_seconds.p50 == 0
    assert metrics.device_seconds.p50 == pytest.approx(0.005, rel=0.5)
    assert metrics.output_tokens == 40


def test_time_without_work_is_no_gap() -> None:
    bench = Bench()
    bench.run(request("a", max_tokens=3))
    gaps = bench.engine.metrics.host_gap_seconds.count
    bench.run(request("b", max_tokens=3))
    steps = bench.engine.metrics.steps
    assert gaps == steps / 2 - 1
    assert bench.engine.metrics.host_gap_seconds.count == steps - 2


if __name__ == "__main__":
    for size in (1, 32, 256):
        found = serve_at_once(size, steps=200)
        split = ", ".join(
            f"{phase} {1e6 * seconds / found.steps:.0f}"
            for phase, seconds in found.phase_seconds.items()
            if phase not in ("dispatch", "wait")
        )
        print(f"{size} sequences, us per step: {split}")
