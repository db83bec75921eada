"""The replay of a trace, on a clock that stands still unless a step or a sleep moves it."""

from collections import deque
from collections.abc import Callable

import pytest

from jaxserve.benchmark.metrics import Slo, Throughput
from jaxserve.benchmark.replay import replay
from jaxserve.benchmark.trace import TraceRequest
from jaxserve.errors import CapacityError, QueueFullError
from jaxserve.serving.request import Request, TokenEvent

STEP_S = 1.0


class FakeTime:
    """A clock and the sleep that moves it."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slept: list[float] = []

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


class OneByOne:
    """An engine that serves the oldest request alone, a token a step."""

    def __init__(self, time: FakeTime, queue: int = 1000, fail: str | None = None) -> None:
        self.time = time
        self.queue = queue
        self.fail = fail
        self.requests: list[Request] = []
        self.submitted_s: list[float] = []
        self._open: deque[tuple[Request, Callable[[TokenEvent], None], list[int]]] = deque()

    def submit(self, request: Request, sink: Callable[[TokenEvent], None]) -> None:
        if len(self._open) >= self.queue:
            raise QueueFullError("full")
        if len(request.prompt) > 100:
            raise CapacityError("never fits")
        self.requests.append(request)
        self.submitted_s.append(self.time.now - 100.0)
        self._open.append((request, sink, []))

    def step(self) -> bool:
        if not self._open:
            return False
        self.time.now += STEP_S
        request, sink, tokens = self._open[0]
        if self.fail is not None:
            self._open.popleft()
            sink(TokenEvent(request.id, 0, (), "error", error=self.fail))
            return True
        tokens.append(1)
        last = len(tokens) == request.params.max_tokens
        sink(TokenEvent(request.id, 0, (1,), "length" if last else None, cached_tokens=2))
        if last:
            self._open.popleft()
        return True


def trace(*dues: float, outputs: int = 2) -> list[TraceRequest]:
    return [TraceRequest((5, 6, 7), outputs, due) for due in dues]


@pytest.fixture
def time() -> FakeTime:
    return FakeTime()


def test_times_count_from_the_start_and_from_when_a_request_was_due(time: FakeTime):
    records = replay(OneByOne(time), trace(0.0, 0.0), clock=time.clock, sleep=time.sleep)
    assert [record.times_s for record in records] == [[1.0, 2.0], [3.0, 4.0]]
    assert [record.ttft_s for record in records] == [1.0, 3.0]
    assert [record.prompt_tokens for record in records] == [3, 3]
    assert [record.token_ids for record in records] == [[1, 1], [1, 1]]
    assert [record.cached_tokens for record in records] == [2, 2]
    assert Throughput.of(records, Slo(ttft_s=2.0)).good_requests_per_s == 0.25


def test_a_request_due_within_a_step_waits_for_its_end_and_the_wait_counts(time: FakeTime):
    engine = OneByOne(time)
    records = replay(engine, trace(0.0, 0.5), clock=time.clock, sleep=time.sleep)
    assert engine.submitted_s == [0.0, 1.0]
    assert records[1].ttft_s == 2.5  # first token at 3.0
    assert time.slept == []


def test_an_idle_engine_sleeps_until_the_next_request(time: FakeTime):
    records = replay(OneByOne(time), trace(0.0, 10.0), clock=time.clock, sleep=time.sleep)
    assert time.slept == [8.0]  # the first is done at 2
    assert records[1].times_s == [11.0, 12.0]


def test_a_full_queue_is_tried_again(time: FakeTime):
    engine = OneByOne(time, queue=1)
    records = replay(engine, trace(0.0, 0.0, 0.0), clock=time.clock, sleep=time.sleep)
    assert engine.submitted_s == [0.0, 2.0, 4.0]
    assert records[2].ttft_s == 5.0


def test_a_request_that_never_fits_ends_the_replay(time: FakeTime):
    too_long = [TraceRequest(tuple(range(101)), 2, 0.0)]
    with pytest.raises(CapacityError, match="never fits"):
        replay(OneByOne(time), too_long, clock=time.clock, sleep=time.sleep)


def test_requests_end_at_their_length_alone(time: FakeTime):
    engine = OneByOne(time)
    replay(engine, trace(0.0, outputs=7), clock=time.clock, sleep=time.sleep)
    (request,) = engine.requests
    assert request.prompt == (5, 6, 7)
    assert request.params.max_tokens == 7
    assert request.params.ignore_eos and request.params.greedy
    assert request.stop_ids == ()


def test_a_failed_request_keeps_its_cause(time: FakeTime):
    engine = OneByOne(time, fail="out of memory")
    (record,) = replay(engine, trace(0.0), clock=time.clock, sleep=time.sleep)
    assert record.error == "out of memory"
    assert record.output_tokens == 0


def test_every_step_is_observed(time: FakeTime):
    seen: list[float] = []
    replay(OneByOne(time), trace(0.0, 9.0), seen.append, time.clock, time.sleep)
    assert seen == [1.0, 2.0, 10.0, 11.0]
