"""Measures what a step of steady decode costs the scheduler, beside vLLM's own where it is found.

    python benchmarks/scheduler.py                # a table; --json prints one JSON object instead
    python benchmarks/scheduler.py --out benchmarks/results/scheduler.json

A step is `schedule` and `commit`, with 256 or 1,024 sequences that each gain one token: unlike
prompts of 64 to 79 tokens, pages of 16, prefix cache on. A page is full, and the next one taken, in
one of 16 steps of each sequence. The schedulers take turns, each run in a process of its own; the
variable that names vLLM's Python is that of `benchmarks/peers/README.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.peers.client import PYTHON_VARIABLES  # noqa: E402  (the root comes first)
from jaxserve.serving.request import Request, SamplingParams  # noqa: E402
from jaxserve.serving.scheduler import GroupLimits, Scheduler, SchedulerConfig  # noqa: E402

SEQUENCES = (256, 1024)
LIMITS_US = {256: 300, 1024: 1500}
STEPS = 320
PAGE_SIZE = 16
PROMPT_TOKENS = 64
MAX_TOKENS = 512
CONTEXT = 1024


def main() -> None:
    """Runs the comparison and prints it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--out", type=Path, help="also write the JSON object here")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps({"seconds": decode_seconds(options.one, STEPS)}))
        return
    result = _compare(options.rounds)
    text = json.dumps(result, indent=1)
    if options.out is not None:
        options.out.write_text(text + "\n")
    print(text if options.json else _table(result))


def decode_seconds(sequences: int, steps: int) -> list[float]:
    """Returns the seconds of each step of decoding."""
    config = SchedulerConfig(
        page_size=PAGE_SIZE,
        groups=(GroupLimits(sequences * CONTEXT // PAGE_SIZE),),
        num_slots=sequences,
        max_step_tokens=sequences * (PROMPT_TOKENS + PAGE_SIZE),
        max_context_tokens=CONTEXT,
        max_queued_requests=sequences,
    )
    scheduler = Scheduler(config)
    rng = random.Random(0)
    for index in range(sequences):
        length = PROMPT_TOKENS + index % PAGE_SIZE
        prompt = tuple(rng.randrange(1000, 30000) for _ in range(length))
        params = SamplingParams(seed=index, max_tokens=MAX_TOKENS)
        scheduler.add(Request(id=str(index), prompt=prompt, params=params, stop_ids=(2,)))
    seconds: list[float] = []
    while len(seconds) < steps:
        tokens = [rng.randrange(1000, 30000) for _ in range(sequences)]
        began = time.perf_counter()
        plan = scheduler.schedule()
        assert plan is not None
        events = scheduler.commit(plan.number, tokens)
        ended = time.perf_counter()
        if sum(plan.counts) == len(events) == sequences:
            seconds.append(ended - began)
    return seconds


def _compare(rounds: int) -> dict[str, Any]:
    peer = os.environ.get(PYTHON_VARIABLES["vllm_cpu"])
    if not peer:
        note = f"not measured, {PYTHON_VARIABLES['vllm_cpu']} not set: see benchmarks/peers"
        print(note, file=sys.stderr)
    versions: dict[str, str] = {}
    rows: list[dict[str, Any]] = []
    for sequences in SEQUENCES:
        steps: dict[str, list[list[float]]] = {"ours": [], "vllm": []}
        for _ in range(rounds):
            own = _run([sys.executable, __file__, "--one", str(sequences)])
            steps["ours"].append(own["seconds"])
            if peer:
                module = ["-m", "benchmarks.peers.vllm_scheduler"]
                other = _run([peer, *module, str(sequences), str(STEPS)])
                steps["vllm"].append(other["seconds"])
                versions["vllm"] = f"{other['version']}, Python {other['python']}"
        rows.append(_row(sequences, steps))
    return {
        "benchmark": "scheduler",
        **_machine(),
        "rounds": rounds,
        "steps_a_round": STEPS,
        "peers": versions,
        "rows": rows,
    }


def _machine() -> dict[str, Any]:
    from benchmarks import machine  # imports jax, which the timed processes do without

    return machine.facts()


def _run(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _row(sequences: int, steps: dict[str, list[list[float]]]) -> dict[str, Any]:
    """Returns the median and the 99th percentile of a step, and the median of rounds' ratios."""
    row: dict[str, Any] = {"sequences": sequences, "limit_us": LIMITS_US[sequences], "step_us": {}}
    for name, rounds in steps.items():
        times = sorted(1e6 * second for each in rounds for second in each)
        if times:
            row["step_us"][name] = {
                "median": round(statistics.median(times), 1),
                "mean": round(statistics.fmean(times), 1),
                "p99": round(times[len(times) * 99 // 100], 1),
            }
    if steps["vllm"]:
        medians = [
            statistics.median(theirs) / statistics.median(own)
            for own, theirs in zip(steps["ours"], steps["vllm"], strict=True)
        ]
        row["theirs_over_ours"] = round(statistics.median(medians), 2)
    return row


def _table(result: dict[str, Any]) -> str:
    lines = [f"{result['date']}, {result['device']}, Python {result['python']}"]
    lines += [f"{name}: {version}" for name, version in result["peers"].items()]
    for row in result["rows"]:
        for name, times in row["step_us"].items():
            lines.append(
                f"{row['sequences']:>5} sequences, {name:<5} {times['median']:>8.1f} us a step, "
                f"mean {times['mean']:.1f}, p99 {times['p99']:.1f}"
            )
        if "theirs_over_ours" in row:
            lines.append(f"      vLLM takes {row['theirs_over_ours']:.2f} times as long")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
