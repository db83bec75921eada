"""The command line: `jaxserve generate | chat | serve | plan | bench | compile | info | ...`.

Results go to standard output, everything else to standard error. Exit codes: 0, 1 (failed),
2 (bad usage). Heavy modules are imported by the command that needs them.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxserve.benchmark.cli import app as bench
from jaxserve.errors import JaxserveError, UsageError
from jaxserve.mesh_cli import (
    AttentionOption,
    BackendOption,
    DevicesOption,
    KvDtypeOption,
    LayoutOption,
    MeshOption,
    Numbers,
    PrefillLayoutOption,
    QuantizeOption,
    Sharding,
)
from jaxserve.plan_cli import app as plan
from jaxserve.plan_cli import estimate, max_context
from jaxserve.serve_cli import serve

if TYPE_CHECKING:
    from jaxserve.api import LLM, TextStream
    from jaxserve.serving.options import EngineOptions
    from jaxserve.serving.runner import ModelRunner

app = typer.Typer(
    name="jaxserve",
    help="Run open-weight language models with JAX on TPU, GPU and CPU.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bench, name="bench")
app.add_typer(plan, name="plan")
app.command()(serve)
app.command()(estimate)
app.command(name="max-context")(max_context)

ModelOption = Annotated[
    str,
    typer.Option("--model", "-m", help="tiny, tiny-draft, a checkpoint directory or a hub name"),
]
DtypeOption = Annotated[
    str | None, typer.Option(help="bfloat16 or float32; by default as the checkpoint")
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="no progress, no summary")]
MaxTokensOption = Annotated[int | None, typer.Option(help="longest completion, in tokens")]
TemperatureOption = Annotated[float | None, typer.Option(help="0 (greedy) to 2")]
TopKOption = Annotated[int | None, typer.Option(help="keep the K likeliest tokens; 0 keeps all")]
TopPOption = Annotated[float | None, typer.Option(help="keep the likeliest tokens up to this mass")]
MinPOption = Annotated[
    float | None, typer.Option(help="drop tokens below this fraction of the likeliest")
]
RepetitionOption = Annotated[float | None, typer.Option(help="above 1 discourages repetition")]
PresenceOption = Annotated[float, typer.Option(help="-2 to 2, once per token of the output")]
FrequencyOption = Annotated[float, typer.Option(help="-2 to 2, per occurrence in the output")]
SeedOption = Annotated[int | None, typer.Option(help="same seed, same completion")]
StopOption = Annotated[list[str] | None, typer.Option(help="end at this text; may be repeated")]


def main() -> None:
    """Runs the command line and exits. Typer itself ends quietly on Ctrl-C and a closed pipe."""
    logging.basicConfig(format="%(levelname)s: %(message)s", stream=sys.stderr)
    try:
        app()
    except JaxserveError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)


def _version(asked: bool) -> None:
    if asked:
        from jaxserve import __version__

        typer.echo(f"jaxserve {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Run open-weight language models with JAX on TPU, GPU and CPU."""


@app.command()
def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="text to complete; read from standard input if left out")
    ] = None,
    model: ModelOption = "tiny",
    dtype: DtypeOption = None,
    backend: BackendOption = "xla",
    quantize: QuantizeOption = None,
    kv_dtype: KvDtypeOption = None,
    mesh: MeshOption = None,
    layout: LayoutOption = None,
    prefill_layout: PrefillLayoutOption = None,
    attention: AttentionOption = None,
    devices: DevicesOption = None,
    max_tokens: MaxTokensOption = None,
    min_tokens: Annotated[int | None, typer.Option(help="shortest completion, in tokens")] = None,
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    min_p: MinPOption = None,
    repetition_penalty: RepetitionOption = None,
    presence_penalty: PresenceOption = 0.0,
    frequency_penalty: FrequencyOption = 0.0,
    seed: SeedOption = None,
    stop: StopOption = None,
    stop_token_id: Annotated[list[int] | None, typer.Option(help="may be repeated")] = None,
    ignore_eos: Annotated[bool, typer.Option(help="go on past end of sequence")] = False,
    logprobs: Annotated[
        int | None, typer.Option(help="report this many likeliest tokens (with --json)")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
    quiet: QuietOption = False,
) -> None:
    """Complete a prompt, as it comes or as one JSON object."""
    from jaxserve.serving.request import SamplingParams

    params = SamplingParams.create(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        stop=tuple(stop or ()),
        stop_token_ids=tuple(stop_token_id or ()),
        ignore_eos=ignore_eos,
        logprobs=logprobs,
    )
    if logprobs is not None and not json_output:
        raise UsageError(f"--logprobs {logprobs} is shown only with --json; add --json")
    text = _prompt(prompt)
    sharding = Sharding(mesh, layout, prefill_layout, attention)
    llm = _load(model, Numbers(dtype, quantize, kv_dtype), backend, sharding, devices, quiet)
    stream = llm.stream(text, params)
    if json_output:
        for _ in stream:
            pass
        _print_json(_completion_fields(stream))
        return
    echo = sys.stdout.isatty()
    _show(stream, f"\x1b[2m{text}\x1b[0m" if echo else "", quiet)


@app.command()
def chat(
    model: ModelOption = "tiny",
    dtype: DtypeOption = None,
    backend: BackendOption = "xla",
    quantize: QuantizeOption = None,
    kv_dtype: KvDtypeOption = None,
    mesh: MeshOption = None,
    layout: LayoutOption = None,
    prefill_layout: PrefillLayoutOption = None,
    attention: AttentionOption = None,
    devices: DevicesOption = None,
    max_tokens: MaxTokensOption = None,
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    min_p: MinPOption = None,
    repetition_penalty: RepetitionOption = None,
    seed: SeedOption = None,
    stop: StopOption = None,
    system: Annotated[str | None, typer.Option(help="message that opens the conversation")] = None,
    quiet: QuietOption = False,
) -> None:
    """Talk with a model; one line a turn, empty line or Ctrl-D to end."""
    from jaxserve.serving.request import SamplingParams

    params = SamplingParams.create(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=tuple(stop or ()),
    )
    sharding = Sharding(mesh, layout, prefill_layout, attention)
    llm = _load(model, Numbers(dtype, quantize, kv_dtype), backend, sharding, devices, quiet)
    if llm.tokenizer is None or not llm.tokenizer.has_chat_template:
        raise UsageError(f"--model {model} has no chat template; use jaxserve generate")
    messages: list[dict[str, str]] = []
    if system is not None:
        messages.append({"role": "system", "content": system})
    while line := _read_turn():
        messages.append({"role": "user", "content": line})
        stream = llm.chat_stream(messages, params)
        _show(stream, "", quiet)
        messages.append({"role": "assistant", "content": stream.completion.text})


MaxSequencesOption = Annotated[int, typer.Option(help="sequences that run at once")]
MaxStepTokensOption = Annotated[int, typer.Option(help="tokens of one step")]
KvMibOption = Annotated[
    int | None, typer.Option("--kv-mib", help="memory for keys and values, in MiB")
]


@app.command(name="compile")
def compile_ahead(
    model: ModelOption = "tiny",
    dtype: DtypeOption = None,
    backend: BackendOption = "xla",
    quantize: QuantizeOption = None,
    kv_dtype: KvDtypeOption = None,
    mesh: MeshOption = None,
    layout: LayoutOption = None,
    prefill_layout: PrefillLayoutOption = None,
    attention: AttentionOption = None,
    devices: DevicesOption = None,
    max_sequences: MaxSequencesOption = 32,
    max_step_tokens: MaxStepTokensOption = 512,
    kv_mib: KvMibOption = None,
    json_output: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
    quiet: QuietOption = False,
) -> None:
    """Fill the cache of compiled programs for an engine, ahead of time; reads no weights."""
    from jaxserve.ahead import engine_ahead
    from jaxserve.compile_cache import directory
    from jaxserve.progress import Show, Unit, reporter

    options = _engine_options(max_sequences, max_step_tokens, kv_mib)
    sharding = Sharding(mesh, layout, prefill_layout, attention)
    made = engine_ahead(
        model, dtype, quantize, kv_dtype, backend, options, sharding.choose, devices
    )
    runner = made.runner
    began = time.perf_counter()
    progress = reporter(Show.SILENT if quiet else Show.AUTO)
    with progress.task("compiling", runner.num_executables, Unit.ITEMS) as advance:
        runner.warm_up(advance)
    seconds = time.perf_counter() - began
    if json_output:
        fields = {"programs": runner.num_executables, "cache": str(directory())}
        _print_json(fields | {"seconds": round(seconds, 2)})
    else:
        typer.echo(f"{runner.num_executables} programs in {seconds:.1f} s, kept in {directory()}")


@app.command()
def info(
    model: ModelOption = "tiny",
    serve: Annotated[
        bool, typer.Option("--serve", help="the memory an engine takes, from the compiler")
    ] = False,
    dtype: DtypeOption = None,
    backend: BackendOption = "xla",
    quantize: QuantizeOption = None,
    kv_dtype: KvDtypeOption = None,
    mesh: MeshOption = None,
    layout: LayoutOption = None,
    prefill_layout: PrefillLayoutOption = None,
    attention: AttentionOption = None,
    devices: DevicesOption = None,
    max_sequences: MaxSequencesOption = 32,
    max_step_tokens: MaxStepTokensOption = 512,
    kv_mib: KvMibOption = None,
    json_output: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Describe a checkpoint: architecture, parameters, memory, cache; reads no weights."""
    from jaxserve.checkpoint import inspect
    from jaxserve.checkpoint.locate import locate
    from jaxserve.info import describe, table

    if serve:
        from jaxserve.ahead import engine_ahead

        options = _engine_options(max_sequences, max_step_tokens, kv_mib)
        sharding = Sharding(mesh, layout, prefill_layout, attention)
        made = engine_ahead(
            model, dtype, quantize, kv_dtype, backend, options, sharding.choose, devices
        )
        _print_memory(made.runner, options, json_output)
        return
    facts = describe(inspect(locate(model)))
    if json_output:
        _print_json(facts)
    else:
        typer.echo(table(facts))


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Hugging Face checkpoint directory or hub name")],
    out: Annotated[Path, typer.Argument(help="directory of the Orbax checkpoint; must not exist")],
    quiet: QuietOption = False,
) -> None:
    """Write a checkpoint in Orbax's format, which loads onto any mesh."""
    from jaxserve.checkpoint import convert as convert_checkpoint
    from jaxserve.checkpoint.locate import locate
    from jaxserve.progress import Show, reporter

    convert_checkpoint(locate(source), out, reporter(Show.SILENT if quiet else Show.AUTO))
    typer.echo(out)


@app.command()
def quantize(
    source: Annotated[str, typer.Argument(help="Hugging Face checkpoint directory or hub name")],
    out: Annotated[Path, typer.Argument(help="directory of the new checkpoint; must not exist")],
    method: Annotated[
        str, typer.Option(help="int8: round weights; w8a8: and activations where it runs")
    ] = "int8",
    quiet: QuietOption = False,
) -> None:
    """Write a checkpoint whose weights are int8, half as large; it loads onto any mesh."""
    from jaxserve.checkpoint import convert as convert_checkpoint
    from jaxserve.checkpoint import inspect
    from jaxserve.checkpoint.locate import locate
    from jaxserve.progress import Show, reporter
    from jaxserve.serving.model_files import quantization

    directory = locate(source)
    chosen = quantization(method, inspect(directory))
    convert_checkpoint(directory, out, reporter(Show.SILENT if quiet else Show.AUTO), chosen)
    typer.echo(out)


def _engine_options(max_sequences: int, max_step_tokens: int, kv_mib: int | None) -> EngineOptions:
    from jaxserve.serving.options import EngineOptions

    kv_bytes = None if kv_mib is None else kv_mib << 20
    return EngineOptions(
        max_sequences=max_sequences, max_step_tokens=max_step_tokens, kv_bytes=kv_bytes
    )


def _print_memory(runner: ModelRunner, options: EngineOptions, as_json: bool) -> None:
    """Prints the memory plan of an engine, on each device, and what all have room for."""
    from dataclasses import asdict

    from jaxserve.serving.memory_plan import device_memory, memory_plan

    runner.compile_largest()
    plan = memory_plan(runner, device_memory())
    room = runner.kv_tokens
    if as_json:
        _print_json(asdict(plan) | {"total_bytes": plan.total_bytes, "kv_tokens": room})
    else:
        typer.echo(f"{plan.table()}\nroom for {room:,} tokens of {options.max_sequences} sequences")


def _load(
    model: str,
    numbers: Numbers,
    backend: str,
    sharding: Sharding,
    devices: str | None,
    quiet: bool,
) -> LLM:
    from dataclasses import asdict

    from jaxserve.api import load

    llm = load(
        model,
        backend=backend,
        devices=devices,
        show="silent" if quiet else "auto",
        **asdict(numbers),
        **asdict(sharding),
    )
    if not quiet:
        typer.echo(llm.program.summary, err=True)
    return llm


def _prompt(argument: str | None) -> str:
    """Returns the prompt: the argument, or all of standard input."""
    if argument is not None:
        return argument
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError('no prompt; give one as an argument ("def add(") or on standard input')
    with _utf8_input():
        return sys.stdin.read()


def _read_turn() -> str:
    """Returns the next line of the user, empty at the end of input."""
    try:
        with _utf8_input():
            return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


@contextmanager
def _utf8_input() -> Iterator[None]:
    """Turns bytes on standard input that are no text into a message."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UsageError(
            f"standard input is not {error.encoding} at byte {error.start} "
            f"(0x{error.object[error.start]:02x}); give it as UTF-8 text"
        ) from error


def _show(stream: TextStream, before: str, quiet: bool) -> None:
    """Prints the pieces of a completion as they come, then tokens per second."""
    began = time.perf_counter()
    sys.stdout.write(before)
    sys.stdout.flush()
    for piece in stream:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
    if quiet:
        return
    done = stream.completion
    count = done.usage.completion_tokens
    first = stream.first_token_at
    rate = (count - 1) / (time.perf_counter() - first) if count > 1 else 0.0
    typer.echo(
        f"{count} tokens ({done.finish_reason}), first after {first - began:.2f} s, "
        f"then {rate:.1f} tokens/s",
        err=True,
    )


def _completion_fields(stream: TextStream) -> dict[str, Any]:
    """Returns the fields of a `Completion` as JSON shows them; no timings."""
    import msgspec

    done = stream.completion
    fields: dict[str, Any] = msgspec.to_builtins(done)
    fields["usage"]["total_tokens"] = done.usage.total_tokens
    for name in ("logprobs", "prompt_logprobs"):
        if fields[name] is None:
            del fields[name]
    return fields


def _print_json(fields: dict[str, Any]) -> None:
    typer.echo(json.dumps(fields, ensure_ascii=False))
