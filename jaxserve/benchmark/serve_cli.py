"""`jaxserve bench serve`: puts a server under load and prints what it took."""

from __future__ import annotations

import asyncio
import json
import math
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jaxserve.errors import JaxserveError, UsageError

if TYPE_CHECKING:
    from jaxserve.benchmark.serve import ServeJob
    from jaxserve.benchmark.serve_report import ServeResult
    from jaxserve.benchmark.serve_target import Target

_UNITS_S = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "m": 60.0, "min": 60.0, "h": 3600.0}
_DURATION = re.compile(r"(\d+\.?\d*|\.\d+)\s*(ms|us|s|min|m|h|)")

UrlOption = Annotated[
    str | None, typer.Option(help="of a server with the OpenAI interface: http://127.0.0.1:8000")
]
GrpcOption = Annotated[
    str | None, typer.Option("--grpc", help="of a jaxserve, instead: 127.0.0.1:8001")
]
RateOption = Annotated[
    str | None,
    typer.Option(help="arrivals per second (Poisson); several, as 1,2,4, are measured in turn"),
]
DurationOption = Annotated[
    str | None, typer.Option(help="instead of --requests: as many as arrive in 30s, 2m")
]
SeedOption = Annotated[
    int | None, typer.Option(help="same seed, same requests; by default never the same twice")
]
ApiKeyOption = Annotated[Path | None, typer.Option(help="the key ends its first line")]
VocabOption = Annotated[
    int | None,
    typer.Option(help="ids of prompts are below; by default as the server tells, or 1000"),
]


def serve(
    url: UrlOption = None,
    grpc: GrpcOption = None,
    rate: RateOption = None,
    requests: Annotated[int, typer.Option(help="how many at each rate")] = 100,
    duration: DurationOption = None,
    concurrency: Annotated[int | None, typer.Option(help="most requests open at once")] = None,
    seed: SeedOption = None,
    scale: Annotated[float, typer.Option(help="factor on the mean lengths")] = 1.0,
    isl: Annotated[int | None, typer.Option(help="tokens of every prompt, not drawn")] = None,
    osl: Annotated[int | None, typer.Option(help="tokens of every answer, not drawn")] = None,
    api: Annotated[str, typer.Option(help="completions or chat")] = "completions",
    model: Annotated[str | None, typer.Option(help="by default the first that it lists")] = None,
    api_key_file: ApiKeyOption = None,
    slo_ttft: Annotated[
        str | None, typer.Option(help="time to the first token that counts as good: 1s, 500ms")
    ] = None,
    slo_tpot: Annotated[
        str | None, typer.Option(help="time per further token that counts as good: 100ms")
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="most tokens of a request; by default as the server tells")
    ] = None,
    vocab_size: VocabOption = None,
    timeout: Annotated[str, typer.Option(help="longest time for one request")] = "10m",
    plot: Annotated[
        Path | None, typer.Option(help="draw latencies and goodput into this .png, .svg or .pdf")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="no progress")] = False,
) -> None:
    """Put a server under load: requests at random times, of ShareGPT-like or given lengths."""
    from jaxserve.benchmark.metrics import Slo
    from jaxserve.benchmark.plot import check_installed
    from jaxserve.benchmark.serve import ServeJob
    from jaxserve.benchmark.serve_plot import save_plot
    from jaxserve.benchmark.serve_report import table

    if plot is not None:
        check_installed(plot)
    job = ServeJob(
        rates=(None,) if rate is None else tuple(_rate(part) for part in rate.split(",")),
        requests=requests,
        duration_s=None if duration is None else _seconds("--duration", duration),
        # The prefix cache of a server knows the prompts of a run before this one.
        seed=secrets.randbelow(1 << 32) if seed is None else seed,
        scale=scale,
        slo=Slo(
            None if slo_ttft is None else _seconds("--slo-ttft", slo_ttft),
            None if slo_tpot is None else _seconds("--slo-tpot", slo_tpot),
        ),
        concurrency=concurrency,
        context=context,
        vocab_size=vocab_size,
        prompt_tokens=isl,
        output_tokens=osl,
    )
    server = Server(
        url=url,
        grpc=grpc,
        api=api,
        model=model,
        key=None if api_key_file is None else _key(api_key_file),
        timeout_s=_seconds("--timeout", timeout),
    )
    result = asyncio.run(_measured(server, job, quiet))
    fields = {"server": server.name, "interface": "grpc" if url is None else api}
    fields |= result.fields()
    typer.echo(json.dumps(fields) if json_output else table(fields))
    if plot is not None:
        save_plot(result, plot)
    if result.errors and len(result.errors) == sum(len(run.records) for run in result.runs):
        raise JaxserveError(f"no request was answered, the first because of: {result.errors[0]}")


@dataclass(frozen=True, kw_only=True)
class Server:
    """What to measure, as the command line names it."""

    url: str | None
    grpc: str | None
    api: str
    model: str | None
    key: str | None
    timeout_s: float

    def __post_init__(self) -> None:
        from jaxserve.benchmark.serve_openai import Api

        if (self.url is None) == (self.grpc is None):
            raise UsageError(
                "name one server: --url http://127.0.0.1:8000 or --grpc 127.0.0.1:8001"
            )
        if self.api not in tuple(Api):
            raise UsageError(f"--api {self.api} is unknown; use {' or '.join(Api)}")
        if self.url is None and (self.api != Api.COMPLETIONS or self.model is not None):
            raise UsageError("--api and --model go with --url; --grpc completes ids with its model")

    @property
    def name(self) -> str:
        """Returns the address."""
        return self.url or self.grpc or ""

    def connect(self) -> Target:
        """Returns the target, inside the loop that will use it."""
        from jaxserve.benchmark.serve_grpc import GrpcTarget
        from jaxserve.benchmark.serve_openai import Api, OpenAITarget

        if self.url is not None:
            return OpenAITarget(self.url, Api(self.api), self.model, self.key, self.timeout_s)
        return GrpcTarget(self.name, self.key, self.timeout_s)


async def _measured(server: Server, job: ServeJob, quiet: bool) -> ServeResult:
    from jaxserve.benchmark.serve import measure
    from jaxserve.benchmark.serve_target import CallError

    def say(text: str) -> None:
        if not quiet:
            typer.echo(text, err=True)

    try:
        return await measure(server.connect(), job, say)
    except CallError as error:
        raise JaxserveError(f"{server.name} cannot be measured: {error}") from error


def _rate(text: str) -> float | None:
    """Returns a rate; infinity is all at once."""
    try:
        rate = float(text)
    except ValueError:
        raise UsageError(f"--rate {text!r} is no number; give 2.5, or several as 1,2,4") from None
    return None if rate == math.inf else rate


def _seconds(option: str, text: str) -> float:
    """Returns a time in seconds; without a unit it is in seconds."""
    found = _DURATION.fullmatch(text.strip())
    if found is None:
        raise UsageError(f"{option} {text!r} is no time; write 100ms, 1s, 1.5 or 2m")
    return float(found[1]) * _UNITS_S[found[2]]


def _key(path: Path) -> str:
    """Returns the last word of the first line: a file of the server's has names before its keys."""
    try:
        lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--api-key-file {path} cannot be read: {error}") from error
    keys = [words[-1] for words in lines if words and not words[0].startswith("#")]
    if not keys:
        raise UsageError(f"--api-key-file {path} is empty; its first line ends with the key")
    return keys[0]
