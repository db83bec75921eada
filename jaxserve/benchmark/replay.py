"""Plays a trace against an engine and notes when tokens come.

    records = replay(engine, make_trace(spec))

The loop is open: a request is handed over when it is due, whether or not those before it are done.
Engine and requests share one thread, so a request that falls due during a step waits for its end,
as it would in the engine's own inbox; all times count from when it was due.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from jaxserve.benchmark.metrics import Record
from jaxserve.benchmark.trace import TraceRequest
from jaxserve.errors import QueueFullError
from jaxserve.serving.request import Request, SamplingParams, TokenEvent

Clock = Callable[[], float]


class Steppable(Protocol):
    """What of an engine a replay needs; `serving.engine.Engine` is one."""

    def submit(self, request: Request, sink: Callable[[TokenEvent], None]) -> None:
        """Queues a request, or raises QueueFullError."""

    def step(self) -> bool:
        """Returns whether there was anything to do, after one turn."""
        ...


def replay(
    engine: Steppable,
    trace: Sequence[TraceRequest],
    after_step: Callable[[float], None] = lambda now_s: None,
    clock: Clock = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> list[Record]:
    """Returns what happened to each request, in the trace's order.

    Args:
        after_step: called after every turn of the engine with the time since the start.
        clock, sleep: seconds.

    Raises:
        CapacityError: a request can never fit.
    """
    records = [Record(request.due_s, len(request.prompt)) for request in trace]
    waiting = deque(zip(trace, _requests(trace), records, strict=True))
    began = clock()
    while True:
        while waiting and waiting[0][0].due_s <= clock() - began:
            _, request, record = waiting[0]
            try:
                engine.submit(request, _sink(record, clock, began))
            except QueueFullError:
                break
            waiting.popleft()
        if engine.step():
            after_step(clock() - began)
        elif not waiting:
            return records
        else:
            sleep(max(0.0, waiting[0][0].due_s - (clock() - began)))


def _requests(trace: Iterable[TraceRequest]) -> list[Request]:
    """Returns greedy requests that end at their number of tokens and nowhere else."""
    made = []
    for index, request in enumerate(trace):
        params = SamplingParams(
            temperature=0, max_tokens=request.output_tokens, ignore_eos=True, seed=0
        )
        made.append(Request(id=f"trace-{index}", prompt=request.prompt, params=params.resolved({})))
    return made


def _sink(record: Record, clock: Clock, began: float) -> Callable[[TokenEvent], None]:
    def take(event: TokenEvent) -> None:
        record.cached_tokens = max(record.cached_tokens, event.cached_tokens)
        if event.token_ids:
            record.add(clock() - began, len(event.token_ids))
            record.token_ids += event.token_ids
        if event.finish_reason in ("error", "abort"):
            record.error = event.error or event.finish_reason

    return take
