"""Measures offline throughput beside vLLM and Hugging Face, on the same requests in one run.

    python benchmarks/throughput.py               # a table; --json prints one JSON object instead
    python benchmarks/throughput.py --out benchmarks/results/throughput.json

All requests of a trace with ShareGPT-like lengths (`jaxserve/benchmark/trace.py`) are there at the
start, each with the number of tokens it is to get; end-of-text ends nothing. Every engine runs the
135M-parameter checkpoint of `decode.py` in bfloat16, greedy, on all cores, and they take turns: in
each round every engine runs the whole trace once, one engine working at a time. Hugging Face gets
static batches: requests as they come, padded on the left, each batch until its longest is done. Its
warm-up tries batches of 8 and 16 on the trace's first 16 requests, and the rounds take the faster.
Reported are medians over the rounds and the median of the rounds' ratios. Peers are found as
`benchmarks/peers/README.md` says; most of the time is Hugging Face's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import machine  # noqa: E402  (the repository's root comes first)
from benchmarks.peers.client import PYTHON_VARIABLES, Peer, installed  # noqa: E402
from benchmarks.peers.model import CONFIG, write_checkpoint  # noqa: E402
from jaxserve.benchmark.trace import TraceRequest, TraceSpec, make_trace  # noqa: E402

PEERS = ("vllm_cpu", "huggingface")
STATIC_BATCHES = (8, 16)


@dataclass(frozen=True)
class Run:
    """One engine's turn on the trace."""

    seconds: float
    tokens: int
    requests: int
    output: list[int]
    extra: dict[str, Any]

    @property
    def tokens_per_s(self) -> float:
        """Returns output tokens per second."""
        return self.tokens / self.seconds

    @property
    def requests_per_s(self) -> float:
        """Returns requests per second."""
        return self.requests / self.seconds


def main() -> None:
    """Runs the comparison and prints it."""
    options = _options()
    spec = TraceSpec(
        requests=options.requests,
        seed=options.seed,
        vocab_size=CONFIG["vocab_size"],
        context=CONFIG["max_position_embeddings"],
        scale=options.scale,
    )
    trace = make_trace(spec)
    model = write_checkpoint(ROOT / "build" / "llama-135m")
    found = installed()
    if missing := [PYTHON_VARIABLES[name] for name in PEERS if name not in found]:
        _say(f"not measured, {', '.join(missing)} not set: see benchmarks/peers/README.md")
    with ExitStack() as stack:
        peers = {"ours": stack.enter_context(Peer.start("ours_trace", sys.executable))}
        for name in PEERS:
            if name in found:
                peers[name] = stack.enter_context(Peer.start(name, found[name]))
        loaded = {}
        for name, peer in peers.items():
            _say(f"loading {name}")
            loaded[name] = peer.call(op="load", model=str(model), threads=options.threads)
        batch, tried = _warm_up(peers, trace)
        rounds = []
        for turn in range(options.rounds):
            rounds.append({name: _run(peer, trace, batch) for name, peer in peers.items()})
            _say(f"round {turn + 1} of {options.rounds} done")
    result = {
        "benchmark": "throughput",
        **machine.facts(),
        "model": "Llama shape, 135M parameters, random weights, bfloat16",
        "trace": _trace_facts(spec, trace),
        "rounds": options.rounds,
        "engines": loaded,
        "static_batch": batch,
        "static_batch_requests_per_s": tried,
        **_figures(rounds),
    }
    text = json.dumps(result, indent=1)
    if options.out is not None:
        options.out.write_text(text + "\n")
    print(text if options.json else _table(result))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--out", type=Path, help="also write the JSON object here")
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the mean lengths")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    return parser.parse_args()


def _warm_up(
    peers: dict[str, Peer], trace: list[TraceRequest]
) -> tuple[int | None, dict[int, float]]:
    """Returns the faster static batch and the requests per second of each.

    Every engine has a turn, because its first may compile or allocate.
    """
    tried: dict[int, float] = {}
    for name, peer in peers.items():
        _say(f"warming up {name}")
        if name != "huggingface":
            _run(peer, trace, None)
            continue
        for batch in STATIC_BATCHES:
            first = trace[: max(STATIC_BATCHES)]
            tried[batch] = round(_run(peer, first, batch).requests_per_s, 3)
    return max(tried, key=tried.__getitem__, default=None), tried


def _run(peer: Peer, trace: list[TraceRequest], batch: int | None) -> Run:
    answer = peer.call(
        op="trace",
        prompts=[list(request.prompt) for request in trace],
        outputs=[request.output_tokens for request in trace],
        batch=batch,
    )
    wanted = sum(request.output_tokens for request in trace)
    if answer["tokens"] != wanted:
        raise SystemExit(f"{peer.name} generated {answer['tokens']} tokens instead of {wanted}")
    return Run(answer["seconds"], answer["tokens"], len(trace), answer["output"], answer["extra"])


def _trace_facts(spec: TraceSpec, trace: list[TraceRequest]) -> dict[str, Any]:
    prompts = [len(request.prompt) for request in trace]
    outputs = [request.output_tokens for request in trace]
    return {
        "lengths": "log-normal, ShareGPT",
        "requests": spec.requests,
        "seed": spec.seed,
        "scale": spec.scale,
        **{
            name: {"total": sum(n), "mean": round(statistics.mean(n), 1), "max": max(n)}
            for name, n in (("prompt_tokens", prompts), ("output_tokens", outputs))
        },
    }


def _figures(rounds: list[dict[str, Run]]) -> dict[str, Any]:
    """Returns medians over the rounds, and medians of each round's ratios."""
    names = list(rounds[0])
    own_output = rounds[0]["ours"].output
    return {
        "seconds": {n: [round(turn[n].seconds, 2) for turn in rounds] for n in names},
        "output_tokens_per_s": {n: _median(turn[n].tokens_per_s for turn in rounds) for n in names},
        "requests_per_s": {n: _median(turn[n].requests_per_s for turn in rounds) for n in names},
        # The work is the same, so tokens and requests per second have the ratio of the seconds.
        "ours_over": {
            n: _median(turn[n].seconds / turn["ours"].seconds for turn in rounds)
            for n in names
            if n != "ours"
        },
        "same_leading_ids": {
            n: _common(own_output, rounds[0][n].output) for n in names if n != "ours"
        },
        "ours": rounds[-1]["ours"].extra,
    }


def _median(values: Any) -> float:
    return round(statistics.median(values), 3)


def _common(a: list[int], b: list[int]) -> int:
    """Returns how many ids at the start are the same."""
    same = [x == y for x, y in zip(a, b, strict=False)]
    return same.index(False) if False in same else len(same)


def _table(result: dict[str, Any]) -> str:
    """Returns the result as text."""
    trace = result["trace"]
    lines = [
        f"{result['date']}, {result['device']}, {result['cores']} cores",
        f"{trace['requests']} requests, {trace['prompt_tokens']['mean']} prompt and "
        f"{trace['output_tokens']['mean']} output tokens in the mean",
        *(f"{name}: {facts['version']}" for name, facts in result["engines"].items()),
        "",
        f"{'':<14}{'output tokens/s':>16}{'requests/s':>12}{'ours / theirs':>15}",
    ]
    for name in result["seconds"]:
        ratio = result["ours_over"].get(name)
        batch = f" x {result['static_batch']}" if name == "huggingface" else ""
        lines.append(
            f"{name + batch:<14}{result['output_tokens_per_s'][name]:>16.1f}"
            f"{result['requests_per_s'][name]:>12.3f}" + (f"{ratio:>15.2f}" if ratio else "")
        )
    lines += [f"{name}: {value}" for name, value in result["ours"].items()]
    return "\n".join(lines)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
