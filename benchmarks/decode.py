"""Measures prefill and decode beside the peers that are installed, all in one run.

    python benchmarks/decode.py                   # a table; --json prints one JSON object instead
    python benchmarks/decode.py --out benchmarks/results/decode.json

Every engine reads the same 135M-parameter checkpoint (written once under build/) and the same
prompts, in bfloat16 on all cores, and they take turns: in each round every engine is measured
once on every task, one engine working at a time. Reported are medians over the rounds and the
median of the rounds' ratios. Peers are found as `benchmarks/peers/README.md` says.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import machine  # noqa: E402  (the repository's root comes first)
from benchmarks.peers.client import PYTHON_VARIABLES, Peer, installed  # noqa: E402
from benchmarks.peers.model import write_checkpoint  # noqa: E402
from benchmarks.peers.protocol import random_prompts  # noqa: E402

PROMPT_TOKENS = 128
DECODE_TOKENS = 64
NAMED_PEERS = ("huggingface", "llama_cpp", "vllm_cpu")
"""Engines that a committed result holds."""


@dataclass(frozen=True)
class Task:
    """One thing that every engine is timed on."""

    op: str
    batch: int
    tokens: int

    @property
    def name(self) -> str:
        """Returns a label, such as "decode 8 x 64"."""
        return f"{self.op} {self.batch} x {self.tokens}"

    def run(self, peer: Peer, seed: int) -> tuple[float, list[int]]:
        """Returns (tokens per second, ids of the first row)."""
        command: dict[str, Any] = asdict(self) | {"seed": seed}
        if self.op == "decode":
            command["prompt"] = PROMPT_TOKENS
        answer = peer.call(**command)
        return answer["tokens"] / answer["seconds"], answer["output"]


TASKS = (
    Task("prefill", 1, 128),
    Task("prefill", 1, 1024),
    *(Task("decode", batch, DECODE_TOKENS) for batch in (1, 8, 32)),
)


def main() -> None:
    """Runs the comparison and prints it."""
    options = _options()
    model = options.model or _saved_model()
    engines = {"ours": sys.executable, **installed()}
    wanted = {name: key for name, key in PYTHON_VARIABLES.items() if name in NAMED_PEERS}
    if missing := [key for name, key in wanted.items() if name not in engines]:
        _say(f"not measured, {', '.join(missing)} not set: see benchmarks/peers/README.md")
    bandwidth = machine.read_bandwidth()
    with ExitStack() as stack:
        peers = {
            name: stack.enter_context(Peer.start(name, python)) for name, python in engines.items()
        }
        loaded = {}
        for name, peer in peers.items():
            _say(f"loading {name}")
            loaded[name] = peer.call(op="load", model=str(model), threads=options.threads)
        rates, outputs = _measure(peers, options.rounds)
    result = {
        "benchmark": "decode",
        **machine.facts(),
        "model": "Llama shape, 135M parameters, random weights, bfloat16",
        "rounds": options.rounds,
        "read_bandwidth_gb_s": round(max(bandwidth, machine.read_bandwidth()) / 1e9, 1),
        "engines": loaded,
        "tasks": [_row(task, rates, outputs) for task in TASKS],
    }
    weight_bytes = (model / "model.safetensors").stat().st_size
    _add_fractions(result, weight_bytes)
    result["step_time_by_part"] = dict(_profiles(model))
    text = json.dumps(result, indent=1)
    if options.out is not None:
        options.out.write_text(text + "\n")
    print(text if options.json else _table(result))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--out", type=Path, help="also write the JSON object here")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(_cores()))
    parser.add_argument("--model", type=Path, help="another Llama checkpoint directory")
    return parser.parse_args()


def _cores() -> set[int]:
    import os

    return os.sched_getaffinity(0)


def _saved_model() -> Path:
    """Returns the benchmark's checkpoint, written on first use."""
    return write_checkpoint(ROOT / "build" / "llama-135m")


def _measure(
    peers: dict[str, Peer], rounds: int
) -> tuple[dict[str, dict[str, list[float]]], dict[str, dict[str, list[int]]]]:
    """Returns engine -> task -> tokens per second of each round, and ids of the first round."""
    rates: dict[str, dict[str, list[float]]] = {n: {t.name: [] for t in TASKS} for n in peers}
    outputs: dict[str, dict[str, list[int]]] = {n: {} for n in peers}
    for turn in range(-1, rounds):  # the first turn warms up
        for task in TASKS:
            for name, peer in peers.items():
                rate, ids = task.run(peer, seed=max(turn, 0))
                if turn >= 0:
                    rates[name][task.name].append(rate)
                    outputs[name].setdefault(task.name, ids)
        _say(f"round {turn + 1} of {rounds} done")
    return rates, outputs


def _row(
    task: Task,
    rates: dict[str, dict[str, list[float]]],
    outputs: dict[str, dict[str, list[int]]],
) -> dict[str, Any]:
    """Returns medians, ratios and how many leading ids agree with ours."""
    own = rates["ours"][task.name]
    row: dict[str, Any] = {"task": task.name, "op": task.op, "batch": task.batch}
    row["tokens_per_s"] = {n: round(statistics.median(r[task.name]), 1) for n, r in rates.items()}
    row["ours_over"] = {
        name: round(statistics.median(a / b for a, b in zip(own, of[task.name], strict=True)), 3)
        for name, of in rates.items()
        if name != "ours"
    }
    row["same_leading_ids"] = {
        name: _common(outputs["ours"][task.name], ids[task.name])
        for name, ids in outputs.items()
        if name != "ours"
    }
    return row


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Returns how many ids at the start are the same."""
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))


def _add_fractions(result: dict[str, Any], weight_bytes: int) -> None:
    """Adds to decode rows what part of the read bandwidth the weights alone take."""
    limit = result["read_bandwidth_gb_s"] * 1e9 / weight_bytes
    for row in result["tasks"]:
        if row["op"] == "decode":
            row["fraction_of_bandwidth"] = {
                name: round(rate / row["batch"] / limit, 3)
                for name, rate in row["tokens_per_s"].items()
            }


def _profiles(model: Path) -> Iterator[tuple[str, dict[str, float]]]:
    """Yields (decode task, share of our step by part)."""
    from benchmarks.peers.ours import Ours

    ours = Ours()
    ours.load(model, len(_cores()))
    for task in TASKS:
        if task.op == "decode":
            prompts = random_prompts(task.batch, PROMPT_TOKENS, ours.vocab_size, 0)
            shares = ours.profile(prompts, DECODE_TOKENS)
            yield task.name, {part: round(share, 3) for part, share in shares.items()}


def _table(result: dict[str, Any]) -> str:
    """Returns the result as text."""
    names = list(result["engines"])
    lines = [
        f"{result['date']}, {result['device']}, {result['cores']} cores, "
        f"{result['read_bandwidth_gb_s']} GB/s read",
        *(f"{name}: {result['engines'][name]['version']}" for name in names),
        "",
        f"{'tokens/s':<18}" + "".join(f"{name:>14}" for name in names),
    ]
    for row in result["tasks"]:
        cells = "".join(f"{row['tokens_per_s'][name]:>14.1f}" for name in names)
        lines.append(f"{row['task']:<18}{cells}")
        ratios = "".join(f"{row['ours_over'][name]:>14.2f}" for name in names[1:])
        lines.append(f"{'  ours / theirs':<18}{'':>14}{ratios}")
        if "fraction_of_bandwidth" in row:
            cells = "".join(f"{row['fraction_of_bandwidth'][name]:>14.2f}" for name in names)
            lines.append(f"{'  of bandwidth':<18}{cells}")
    lines.append("")
    for task, shares in result["step_time_by_part"].items():
        ordered = sorted(shares.items(), key=lambda item: -item[1])
        lines.append(f"{task}: " + ", ".join(f"{part} {share:.0%}" for part, share in ordered))
    return "\n".join(lines)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
