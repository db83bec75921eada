"""`jaxserve bench`: measures the engine on this machine, or a server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from jaxserve.benchmark.serve_cli import serve
from jaxserve.errors import JaxserveError, UsageError
from jaxserve.mesh_cli import (
    AttentionOption,
    DevicesOption,
    KvDtypeOption,
    LayoutOption,
    MeshOption,
    PrefillLayoutOption,
    QuantizeOption,
)

app = typer.Typer(help="Measure the engine on this machine, or a server.", no_args_is_help=True)
app.command()(serve)


@app.callback(invoke_without_command=True)
def _bench(
    context: typer.Context,
    against: Annotated[
        Path | None,
        typer.Option(help="layout.json whose estimates are held against this machine"),
    ] = None,
    model: Annotated[
        str, typer.Option("--model", "-m", help="of that layout: tiny, a directory or a name")
    ] = "tiny",
    quantize: QuantizeOption = None,
    kv_dtype: KvDtypeOption = None,
    json_output: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Measure the engine on this machine, or a server."""
    if context.invoked_subcommand is not None:
        if against is not None:
            raise UsageError("--against stands alone: jaxserve bench --against layout.json")
        return
    if against is None:
        raise UsageError("give a command, or --against layout.json; see jaxserve bench --help")
    from rich.console import Console

    from jaxserve.benchmark.against import Rounding
    from jaxserve.benchmark.against import against as hold

    found = hold(model, against, Rounding(quantize, kv_dtype))
    if json_output:
        typer.echo(json.dumps(found.fields()))
    else:
        Console(width=110, highlight=False).print(found)


@app.command()
def throughput(
    model: Annotated[
        str,
        typer.Option("--model", "-m", help="tiny, tiny-draft, a checkpoint directory or a name"),
    ] = "tiny",
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16 or float32; by default as the checkpoint")
    ] = None,
    quantize: QuantizeOption = None,
    kv_dtype: KvDtypeOption = None,
    mesh: MeshOption = None,
    layout: LayoutOption = None,
    prefill_layout: PrefillLayoutOption = None,
    attention: AttentionOption = None,
    devices: DevicesOption = None,
    requests: Annotated[int, typer.Option(help="how many")] = 200,
    rate: Annotated[
        float | None, typer.Option(help="arrivals per second (Poisson); by default all at once")
    ] = None,
    seed: Annotated[int, typer.Option(help="same seed, same requests")] = 0,
    scale: Annotated[float, typer.Option(help="factor on the mean lengths")] = 1.0,
    slo_ttft: Annotated[
        float | None, typer.Option(help="seconds to the first token that count as good")
    ] = None,
    slo_tpot: Annotated[
        float | None, typer.Option(help="seconds per further token that count as good")
    ] = None,
    max_sequences: Annotated[int | None, typer.Option(help="sequences that run at once")] = None,
    max_step_tokens: Annotated[int | None, typer.Option(help="tokens of one step")] = None,
    page_size: Annotated[int | None, typer.Option(help="tokens in a page of the cache")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="draw latencies and load into this .png, .svg or .pdf")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="no progress")] = False,
) -> None:
    """Serve a synthetic trace with ShareGPT-like lengths and print what it took."""
    from jaxserve.benchmark.metrics import Slo
    from jaxserve.benchmark.plot import check_installed, save_plot
    from jaxserve.benchmark.report import table
    from jaxserve.benchmark.run import Job, measure

    if plot is not None:
        check_installed(plot)
    sizes = {
        "max_sequences": max_sequences,
        "max_step_tokens": max_step_tokens,
        "page_size": page_size,
    }
    sharding = {
        "mesh": mesh,
        "layout": layout,
        "prefill_layout": prefill_layout,
        "attention": attention,
        "devices": devices,
    }
    job = Job(
        model=model,
        dtype=dtype,
        quantize=quantize,
        kv_dtype=kv_dtype,
        requests=requests,
        rate=rate,
        seed=seed,
        scale=scale,
        slo=Slo(slo_ttft, slo_tpot),
        engine={name: size for name, size in sizes.items() if size is not None},
        sharding={name: said for name, said in sharding.items() if said is not None},
        quiet=quiet,
    )
    result = measure(job)
    fields = result.fields()
    typer.echo(json.dumps(fields) if json_output else table(fields))
    if plot is not None:
        save_plot(result, plot)
    if result.failures:
        raise JaxserveError(
            f"{len(result.failures)} of {len(result.records)} requests failed, the first with: "
            f"{result.failures[0]}"
        )
