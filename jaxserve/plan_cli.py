"""`jaxserve plan`, `estimate` and `max-context`: which slice and layout serve a model.

Nothing is loaded or run, but that `plan search --verify` compiles and `plan calibrate` measures.
"""

from __future__ import annotations

import json
import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from jaxserve.errors import JaxserveError, UsageError


class _Short(TyperGroup):
    """A group whose first argument may be a model: `plan MODEL` is `plan search MODEL`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            args = ["search", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_Short,
    help="Search slices, layouts and batches for a model and a load. `plan MODEL` is search: "
    "jaxserve plan llama-3-70b --slice v5e:4x4 --isl 4000 --osl 500",
    no_args_is_help=True,
)
hardware = typer.Typer(help="The chips that are known, and where their numbers come from.")
app.add_typer(hardware, name="hardware")


class Goal(StrEnum):
    """What is best."""

    COST = "cost"
    LATENCY = "latency"
    THROUGHPUT = "throughput"


class Phase(StrEnum):
    """Kind of step."""

    PREFILL = "prefill"
    DECODE = "decode"


ModelArgument = Annotated[
    str, typer.Argument(help="a name such as llama-3-70b, a directory, or a config.json")
]
SliceOption = Annotated[str, typer.Option("--slice", help="CHIP:SIZES, as v5e:4x4 or h100:8")]
HardwareOption = Annotated[Path | None, typer.Option("--hardware", help="TOML file of more chips")]
JsonOption = Annotated[bool, typer.Option("--json", help="print one JSON object")]
InputOption = Annotated[int, typer.Option("--isl", help="input tokens of a request")]
OutputOption = Annotated[int, typer.Option("--osl", help="output tokens of a request")]
TtftOption = Annotated[str | None, typer.Option(help="to the first token, as 800ms or 2s")]
TpotOption = Annotated[str | None, typer.Option(help="from a token to the next, as 30ms")]
WeightsOption = Annotated[str, typer.Option(help="bfloat16, int8, fp8, int4; several with commas")]
KvOption = Annotated[str, typer.Option(help="bfloat16, int8, fp8, int4; several with commas")]
BatchOption = Annotated[str, typer.Option(help="LEAST:MOST sequences of a copy of the model")]
MeshChoice = Annotated[
    str | None, typer.Option("--mesh", help="devices along x, y and z, as 4,4,4; else the best")
]
AttentionChoice = Annotated[
    str, typer.Option(help="heads, heads-batch, heads-batch-xy, batch or sequence")
]


@app.command()
def search(
    model: ModelArgument,
    slice_name: SliceOption,
    isl: InputOption,
    osl: OutputOption,
    ttft: TtftOption = None,
    tpot: TpotOption = None,
    rate: Annotated[float | None, typer.Option(help="requests per second in all")] = None,
    objective: Annotated[Goal, typer.Option(help="what is best")] = Goal.THROUGHPUT,
    batch: BatchOption = "1:512",
    weights: WeightsOption = "bfloat16",
    kv: KvOption = "bfloat16",
    attention: Annotated[
        str | None, typer.Option(help="choose from these alone; several with commas")
    ] = None,
    layout: Annotated[
        str | None, typer.Option(help="choose prefill from these alone; several with commas")
    ] = None,
    disaggregate: Annotated[
        bool, typer.Option("--disaggregate", help="prefill may have chips of its own")
    ] = False,
    replicas: Annotated[int, typer.Option(help="most copies of the model")] = 256,
    expert: Annotated[int, typer.Option(help="no layout has this axis yet")] = 1,
    pipeline: Annotated[
        int, typer.Option(help="most stages of layers, which are priced and not run yet")
    ] = 1,
    top: Annotated[int, typer.Option(help="answers to show")] = 5,
    explain: Annotated[bool, typer.Option("--explain", help="show every term")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="compile the steps for the slice and compare")
    ] = False,
    save_dir: Annotated[
        Path | None, typer.Option(help="write report, layout, manifest and script here")
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(help="directory of the weights as pods see it; else /models/MODEL"),
    ] = None,
    hardware_file: HardwareOption = None,
    json_output: JsonOption = False,
) -> None:
    """Find the best layouts of a model on a slice for a load."""
    from jaxserve import planner
    from jaxserve.planner.ask import check_expert
    from jaxserve.planner.manifest import check_checkpoint

    check_expert(expert)
    check_checkpoint(checkpoint)
    plan = planner.search(
        model,
        slice_name,
        input_tokens=isl,
        output_tokens=osl,
        ttft_s=_seconds(ttft, "--ttft"),
        tpot_s=_seconds(tpot, "--tpot"),
        rate=rate,
        objective=objective.value,
        batch=_range(batch),
        weights=_names(weights),
        kv=_names(kv),
        attention=_names(attention),
        layout=_names(layout),
        disaggregate=disaggregate,
        max_replicas=replicas,
        max_stages=pipeline,
        top=top,
        hardware=hardware_file,
    )
    fields = plan.fields()
    failed = plan.found.best == ()
    if verify and not failed:
        from jaxserve.planner.verify import verified

        checked = verified(plan)
        fields["verified"] = checked.fields()
    if json_output:
        typer.echo(json.dumps(fields))
    else:
        _print(plan.explained() if explain and not failed else plan)
        if verify and not failed:
            _print(checked)  # pyright: ignore[reportPossiblyUnboundVariable]
    if failed:
        raise JaxserveError(f"{model} on {slice_name}: {plan.found.why}")
    if save_dir is not None:
        for path in plan.save(save_dir, checkpoint):
            typer.echo(f"wrote {path}", err=True)
        if lacking := plan.best.option.not_run():
            left = f"left out what serves the plan: the runtime does not do {'; '.join(lacking)}"
            typer.echo(left, err=True)
        if verify:
            path = save_dir / "verified.json"
            path.write_text(json.dumps(fields["verified"], indent=2) + "\n", encoding="utf-8")
            typer.echo(f"wrote {path}", err=True)
    if verify:
        checked.check()  # pyright: ignore[reportPossiblyUnboundVariable]


@app.command()
def size(
    model: ModelArgument,
    rate: Annotated[float, typer.Option(help="requests per second")],
    isl: InputOption,
    osl: OutputOption,
    chip: Annotated[str | None, typer.Option(help="choose from these; several with commas")] = None,
    ttft: TtftOption = None,
    tpot: TpotOption = None,
    max_chips: Annotated[int, typer.Option(help="of the largest slice that is tried")] = 64,
    weights: WeightsOption = "bfloat16",
    kv: KvOption = "bfloat16",
    batch: BatchOption = "1:512",
    hardware_file: HardwareOption = None,
    json_output: JsonOption = False,
) -> None:
    """Find the cheapest slice for a rate and its limits."""
    from jaxserve import planner
    from jaxserve.planner.show import sizes

    plans = planner.size(
        model,
        rate=rate,
        input_tokens=isl,
        output_tokens=osl,
        chip=_names(chip),
        ttft_s=_seconds(ttft, "--ttft"),
        tpot_s=_seconds(tpot, "--tpot"),
        max_chips=max_chips,
        weights=_names(weights),
        kv=_names(kv),
        batch=_range(batch),
        hardware=hardware_file,
    )
    if json_output:
        rows = [plan.fields() | {"usd_hour": plan.found.on.usd_hour} for plan in plans]
        typer.echo(json.dumps({"slices": rows}))
    else:
        _print(sizes(plans))


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="plan.json, or the output of estimate --json")],
    second: Annotated[Path, typer.Argument(help="another one")],
    json_output: JsonOption = False,
) -> None:
    """Show two plans or estimates term by term."""
    from jaxserve.planner.compare import compared, read

    names = first.name, second.name
    if first.name == second.name:
        names = str(first), str(second)
    found = compared(read(first), read(second), names)
    if json_output:
        typer.echo(json.dumps(found.fields()))
    else:
        _print(found)


@app.command()
def calibrate(
    out: Annotated[Path, typer.Option(help="TOML file that is written")] = Path("hardware.toml"),
    name: Annotated[str, typer.Option(help="of the chip in that file")] = "here",
    seconds: Annotated[float, typer.Option(help="that a point may take")] = 0.3,
    devices: Annotated[str | None, typer.Option(help="cpu:8 pretends eight devices")] = None,
    measured: Annotated[
        Path | None,
        typer.Option("--from", help="what bench --against --json printed, to be taken over"),
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Measure memory, matrix products and collectives here, and write them as a chip."""
    from jaxserve.planner.calibrate import calibrated
    from jaxserve.planner.ingest import ingested, read_comparison

    if measured is None:
        made = calibrated(name, seconds, devices)
    elif devices is not None:
        raise UsageError("--from takes over what was measured; leave --devices out")
    else:
        made = ingested(read_comparison(measured), name)
    made.write(out)
    if json_output:
        typer.echo(json.dumps(made.fields() | {"path": str(out)}))
    else:
        _print(made)
        typer.echo(f"wrote {out}; use it with --hardware {out} --slice {name}:{made.num_devices}")


@hardware.command(name="list")
def list_hardware(hardware_file: HardwareOption = None, json_output: JsonOption = False) -> None:
    """List the chips."""
    from jaxserve.partitioning.hardware import chips
    from jaxserve.planner.show_hardware import chip_fields, chip_table

    known = chips(hardware_file)
    if json_output:
        typer.echo(json.dumps({name: chip_fields(chip) for name, chip in known.items()}))
    else:
        _print(chip_table(known.values()))


@hardware.command(name="show")
def show_hardware(
    chip: Annotated[str, typer.Argument(help="its name, such as v5e")],
    hardware_file: HardwareOption = None,
    json_output: JsonOption = False,
) -> None:
    """Show the numbers of a chip with their sources."""
    from jaxserve.partitioning.hardware import chips
    from jaxserve.planner.show_hardware import chip_fields, values_table

    known = chips(hardware_file)
    if chip not in known:
        raise UsageError(f"chip {chip!r} is not known; known: {', '.join(known)}")
    if json_output:
        typer.echo(json.dumps(chip_fields(known[chip])))
    else:
        _print(values_table(known[chip]))


def estimate(
    model: ModelArgument,
    slice_name: SliceOption,
    phase: Annotated[Phase, typer.Option(help="prefill or decode")] = Phase.DECODE,
    batch: Annotated[int, typer.Option(help="sequences")] = 1,
    context: Annotated[
        int, typer.Option(help="tokens before the step; of a prefill, in it")
    ] = 2048,
    weights: Annotated[str, typer.Option(help="bfloat16, int8, fp8 or int4")] = "bfloat16",
    kv: Annotated[str, typer.Option(help="bfloat16, int8, fp8 or int4")] = "bfloat16",
    layout: Annotated[
        str | None, typer.Option(help="ws1d, ws2d, wg-x, wg-xy or wg-xyz; else the fastest")
    ] = None,
    attention: AttentionChoice = "heads",
    mesh: MeshChoice = None,
    hardware_file: HardwareOption = None,
    json_output: JsonOption = False,
) -> None:
    """Estimate the time and memory of one step, term by term."""
    from jaxserve import planner

    found = planner.estimate(
        model,
        slice_name,
        phase=phase.value,
        batch=batch,
        context=context,
        weights=weights,
        kv=kv,
        layout=layout,
        attention=attention,
        mesh=mesh,
        hardware=hardware_file,
    )
    if json_output:
        typer.echo(json.dumps(found.fields()))
    else:
        _print(found)


def max_context(
    model: ModelArgument,
    slice_name: SliceOption,
    batch: Annotated[int, typer.Option(help="sequences")],
    attention: AttentionChoice = "heads",
    kv: Annotated[str, typer.Option(help="bfloat16, int8, fp8 or int4")] = "bfloat16",
    hbm_fraction: Annotated[
        float, typer.Option(help="share of the memory for keys and values")
    ] = 0.3,
    mesh: MeshChoice = None,
    hardware_file: HardwareOption = None,
    json_output: JsonOption = False,
) -> None:
    """Find the longest context that a share of the memory holds."""
    from jaxserve import planner

    found = planner.max_context(
        model,
        slice_name,
        batch=batch,
        attention=attention,
        kv=kv,
        hbm_fraction=hbm_fraction,
        mesh=mesh,
        hardware=hardware_file,
    )
    if json_output:
        typer.echo(json.dumps(found.fields()))
    else:
        _print(found)


def _print(shown: Any) -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=False)
    # Tables are cut where a terminal is narrow, and are whole in a file.
    Console(highlight=False, width=console.width if console.is_terminal else 120).print(shown)


def _seconds(text: str | None, option: str) -> float | None:
    """Returns the seconds of "800ms", "0.8s" or "0.8"."""
    if text is None:
        return None
    if (found := re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(ms|s|us)?\s*", text)) is None:
        raise UsageError(f"{option} {text!r} is no time; give it as 800ms or 0.8s")
    return float(found[1]) * {"s": 1.0, None: 1.0, "ms": 1e-3, "us": 1e-6}[found[2]]


def _range(text: str) -> tuple[int, int]:
    """Returns the bounds of "1:512", or of "64", which is both."""
    low, _, high = text.partition(":")
    try:
        return int(low), int(high or low)
    except ValueError:
        raise UsageError(f"--batch {text!r} is not LEAST:MOST, as in 1:512") from None


def _names(text: str | None) -> list[str]:
    return [] if not text else [name.strip() for name in text.split(",")]
