"""Measures what sending plans to other processes adds to a step of steady decode.

    python benchmarks/broadcast.py                # a table; --json prints one JSON object instead
    python benchmarks/broadcast.py --out benchmarks/results/broadcast.json

Rank 0 and three more processes of this machine follow the same plans over `FakeRunner`, with 256
sequences that each gain one token and steps of 20 ms on a device that there is none of. What is
added to a step is the difference of medians, with the group and without: sending hides behind the
device, as the rest of the host's work does. What the engine's thread pays for writing, sending and
hashing is given by the processor's clock, and by that on the wall: where all ranks share one
machine, their arithmetic interrupts it there, though they run at the lowest priority.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.machine import facts  # noqa: E402  (the root comes first)
from jaxserve.serving.engine import Engine  # noqa: E402
from jaxserve.serving.fake_runner import FakeRunner  # noqa: E402
from jaxserve.serving.multihost.follower import Follower  # noqa: E402
from jaxserve.serving.multihost.group import Group  # noqa: E402
from jaxserve.serving.multihost.leader import Leader  # noqa: E402
from jaxserve.serving.multihost.leading_runner import LeadingRunner  # noqa: E402
from jaxserve.serving.multihost.messages import Identity, Plan  # noqa: E402
from jaxserve.serving.pages import GroupLimits  # noqa: E402
from jaxserve.serving.plan import SchedulerConfig, StepPlan  # noqa: E402
from jaxserve.serving.request import Request, SamplingParams  # noqa: E402
from jaxserve.serving.runner import Runner, StepResult  # noqa: E402

PROCESSES = 4
SEQUENCES = 256
STEPS = 400
WINDOW = 32
LIMIT_US = 300
STEP_S = 0.02
"""What a step takes on the device that there is none of."""


def main() -> None:
    """Runs the measurement and prints it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--out", type=Path, help="also write the JSON object here")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--follow", nargs=2, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.follow:
        _follow(*options.follow)
        return
    result = measure(options.steps)
    text = json.dumps(result, indent=1)
    if options.out is not None:
        options.out.write_text(text + "\n")
    print(text if options.json else _table(result))


def measure(steps: int) -> dict[str, Any]:
    """Returns times in microseconds: what is added to a step, and whole steps."""
    alone = _Timed(FakeRunner(_limits(), step_s=STEP_S))
    without = _steps(alone, steps)
    port = _free_port()
    others = [
        subprocess.Popen([sys.executable, __file__, "--follow", str(port), str(rank)])
        for rank in range(1, PROCESSES)
    ]
    leader = Leader.gather(_group(port, 0), _identity())
    try:
        leader.agree("ready")
        leader.serve()
        inner = _Timed(FakeRunner(_limits(), step_s=STEP_S))
        sizes: list[int] = []
        outer = _Timed(LeadingRunner(inner, _Weighed(leader, sizes)))
        within = _steps(outer, steps)
    finally:
        leader.leave()
        for other in others:
            other.wait(30)
    added = 1e6 * (statistics.median(within) - statistics.median(without))
    return {
        **facts(),
        "processes": PROCESSES,
        "sequences": SEQUENCES,
        "steps": steps,
        "added_us": round(added, 1),
        "limit_us": LIMIT_US,
        "within_limit": added < LIMIT_US,
        "engine_thread_processor_us": _summary(
            _less(outer.processor_s[-steps:], inner.processor_s[-steps:])
        ),
        "engine_thread_wall_us": _summary(_less(outer.seconds[-steps:], inner.seconds[-steps:])),
        "plan_bytes": _summary([float(size) for size in sizes[-steps:]]),
        "largest_plan_bytes": max(sizes),
        "step_us": _summary([1e6 * s for s in within]),
        "step_of_one_process_us": _summary([1e6 * s for s in without]),
    }


class _Timed:
    """A runner, and the seconds that dispatch and collection of each step took it."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._began: list[tuple[float, float]] = []
        self.seconds: list[float] = []
        self.processor_s: list[float] = []

    def dispatch(self, plan: StepPlan) -> Any:
        began = time.perf_counter(), time.thread_time()
        ticket = self._runner.dispatch(plan)
        self._began.append((time.perf_counter() - began[0], time.thread_time() - began[1]))
        return ticket

    def collect(self, ticket: Any) -> StepResult:
        began = time.perf_counter(), time.thread_time()
        result = self._runner.collect(ticket)
        spent = time.perf_counter() - began[0], time.thread_time() - began[1]
        before = self._began.pop(0)
        self.seconds.append(before[0] + spent[0])
        self.processor_s.append(before[1] + spent[1])
        return result

    def reset(self) -> None:
        self._runner.reset()


class _Weighed(Leader):
    """A leader that notes how long its plans are."""

    def __init__(self, leader: Leader, sizes: list[int]) -> None:
        self.__dict__ = leader.__dict__
        write = self._plans.plan

        def plan(given: StepPlan) -> Plan:
            message = write(given)
            sizes.append(len(message.body))
            return message

        self._plans.plan = plan  # pyright: ignore[reportAttributeAccessIssue]


def _less(whole: list[float], parts: list[float]) -> list[float]:
    """Returns the differences in microseconds."""
    return [1e6 * (a - b) for a, b in zip(whole, parts, strict=True)]


def _steps(runner: Runner, steps: int) -> list[float]:
    """Returns the seconds of each of the last steps of decoding."""
    engine = Engine(runner, _limits())
    params = SamplingParams(temperature=0.0, seed=0, max_tokens=steps + 100).resolved({})
    for index in range(SEQUENCES):
        prompt = tuple((index * 31 + at) % 900 for at in range(8))
        engine.submit(Request(id=f"request-{index}", prompt=prompt, params=params), lambda e: None)
    times: list[float] = []
    while True:
        began = time.perf_counter()
        if not engine.step():
            return times[-steps - 50 : -50]
        times.append(time.perf_counter() - began)


def _follow(port: int, rank: int) -> None:
    """Follows rank 0 to the end."""
    os.nice(19)
    follower = Follower.join(_group(port, rank), _identity())
    follower.agree("ready")
    follower.serve()
    follower.follow(FakeRunner(_limits()))
    follower.leave()


def _limits() -> SchedulerConfig:
    return SchedulerConfig(
        page_size=16,
        groups=(GroupLimits(num_pages=SEQUENCES * 64, window=WINDOW),),
        num_slots=SEQUENCES,
        max_step_tokens=2 * SEQUENCES,
        max_context_tokens=1024,
    )


def _group(port: int, rank: int) -> Group:
    return Group(f"127.0.0.1:{port}", PROCESSES, rank, silence_s=60.0)


def _identity() -> Identity:
    return Identity("1", "1", "1", "1", "3", "", "", PROCESSES)


def _free_port() -> int:
    """Returns a port that is free together with the one after it."""
    while True:
        with socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            try:
                two.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port


def _summary(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "median": round(statistics.median(ordered), 1),
        "p90": round(ordered[int(0.9 * len(ordered))], 1),
        "p99": round(ordered[int(0.99 * len(ordered))], 1),
    }


def _table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['processes']} processes, {result['sequences']} sequences: "
        f"{result['added_us']} us added to a step, limit {result['limit_us']}"
    ]
    for name in (
        "engine_thread_processor_us",
        "engine_thread_wall_us",
        "plan_bytes",
        "step_us",
        "step_of_one_process_us",
    ):
        numbers = result[name]
        lines.append(
            f"{name:<28} median {numbers['median']:>9,} p90 {numbers['p90']:>9,} "
            f"p99 {numbers['p99']:>9,}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
