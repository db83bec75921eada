"""`jaxserve serve`: a model behind HTTP and gRPC."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jaxserve.mesh_cli import (
    AttentionOption,
    BackendOption,
    DevicesOption,
    KvDtypeOption,
    LayoutOption,
    MeshOption,
    PrefillLayoutOption,
    QuantizeOption,
    Sharding,
)

if TYPE_CHECKING:
    from jaxserve.serving.multihost.group import Group
    from jaxserve.serving.server_options import ServerOptions
    from jaxserve.serving.wire import Start


class LogFormat(StrEnum):
    """How log lines look; AUTO is text on a terminal and JSON elsewhere."""

    AUTO = "auto"
    JSON = "json"
    TEXT = "text"


class Policy(StrEnum):
    """Who is served first."""

    FCFS = "fcfs"
    FAIR = "fair"


def serve(
    model: Annotated[
        str,
        typer.Option("--model", "-m", help="tiny, a checkpoint directory or its gs:// address"),
    ] = "tiny",
    model_name: Annotated[
        str | None, typer.Option(help="what requests call it; by default as --model")
    ] = None,
    host: Annotated[str, typer.Option(help="address of HTTP and gRPC")] = "127.0.0.1",
    http_port: Annotated[int, typer.Option(help="0 takes a free one, -1 leaves HTTP out")] = 8000,
    grpc_port: Annotated[int, typer.Option(help="0 takes a free one, -1 leaves gRPC out")] = 8001,
    admin_port: Annotated[
        int, typer.Option(help="of the admin routes, on 127.0.0.1; -1 leaves them out")
    ] = -1,
    api_key_file: Annotated[Path | None, typer.Option(help="lines `name key`")] = None,
    open_metrics: Annotated[
        bool, typer.Option("--open-metrics", help="no key for /metrics, which balancers read")
    ] = False,
    tls_cert: Annotated[Path | None, typer.Option(help="PEM file")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM file")] = None,
    tls_client_ca: Annotated[
        Path | None, typer.Option(help="PEM file; clients need a certificate that it signed")
    ] = None,
    allow_plaintext: Annotated[
        bool, typer.Option("--allow-plaintext", help="no TLS on an address that others reach")
    ] = False,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="pages of this origin may call; may be repeated")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16 or float32; by default as the checkpoint")
    ] = None,
    backend: BackendOption = "xla",
    quantize: QuantizeOption = None,
    kv_dtype: KvDtypeOption = None,
    mesh: MeshOption = None,
    layout: LayoutOption = None,
    prefill_layout: PrefillLayoutOption = None,
    attention: AttentionOption = None,
    devices: DevicesOption = None,
    max_sequences: Annotated[int, typer.Option(help="sequences that run at once")] = 32,
    max_step_tokens: Annotated[int, typer.Option(help="tokens of one step")] = 512,
    kv_mib: Annotated[
        int | None, typer.Option("--kv-mib", help="memory for keys and values, in MiB")
    ] = None,
    policy: Annotated[
        Policy, typer.Option(help="fcfs: oldest first; fair: equal shares by API key")
    ] = Policy.FCFS,
    max_requests: Annotated[int, typer.Option(help="requests under way at once")] = 1024,
    max_waiting_tokens: Annotated[int, typer.Option(help="prompt tokens that wait")] = 4_000_000,
    max_body_mib: Annotated[int, typer.Option(help="largest request, in MiB")] = 4,
    max_prompt_tokens: Annotated[int | None, typer.Option(help="longest prompt")] = None,
    max_n: Annotated[int, typer.Option(help="most completions of a request")] = 16,
    max_logprobs: Annotated[int, typer.Option(help="most likeliest tokens of a request")] = 20,
    request_timeout: Annotated[
        float | None, typer.Option(help="seconds that a request may take")
    ] = None,
    drain_grace: Annotated[
        float, typer.Option(help="seconds for requests under way after SIGTERM")
    ] = 30.0,
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="write prompts into the log")
    ] = False,
    log_format: Annotated[LogFormat, typer.Option(help="auto, json or text")] = LogFormat.AUTO,
    otel_endpoint: Annotated[
        str | None, typer.Option(help="send traces to this OTLP/HTTP address")
    ] = None,
    coordinator: Annotated[
        str | None, typer.Option(help="HOST:PORT of rank 0; plans take the port after it")
    ] = None,
    num_processes: Annotated[
        int | None, typer.Option(help="processes that serve the model together")
    ] = None,
    process_id: Annotated[
        int | None, typer.Option(help="rank of this one; rank 0 answers requests")
    ] = None,
    group_secret_file: Annotated[
        Path | None, typer.Option(help="what all processes know and strangers do not")
    ] = None,
    join_timeout: Annotated[
        float, typer.Option(help="seconds in which all processes have to be there")
    ] = 300.0,
    health_port: Annotated[
        int, typer.Option(help="of ranks above 0, for health alone; -1 leaves it out")
    ] = -1,
) -> None:
    """Serve a model: OpenAI-compatible HTTP, gRPC, health, metrics."""
    began_s = time.perf_counter()
    from jaxserve.serving import logs
    from jaxserve.serving.model_files import name_of
    from jaxserve.serving.options import EngineOptions
    from jaxserve.serving.server_options import ServerOptions
    from jaxserve.serving.wire import Start

    options = ServerOptions(
        model_name=model_name or name_of(model),
        host=host,
        http_port=_port(http_port),
        grpc_port=_port(grpc_port),
        admin_port=_port(admin_port),
        api_key_file=api_key_file,
        open_metrics=open_metrics,
        tls_cert=tls_cert,
        tls_key=tls_key,
        tls_client_ca=tls_client_ca,
        allow_plaintext=allow_plaintext,
        cors_origins=tuple(cors_origin or ()),
        max_body_bytes=max_body_mib << 20,
        max_prompt_tokens=max_prompt_tokens,
        max_n=max_n,
        max_logprobs=max_logprobs,
        max_requests=max_requests,
        max_waiting_tokens=max_waiting_tokens,
        drain_grace_s=drain_grace,
        request_timeout_s=request_timeout,
        log_prompts=log_prompts,
        log_json=log_format is LogFormat.JSON
        or (log_format is LogFormat.AUTO and not sys.stderr.isatty()),
    )
    engine = EngineOptions(
        max_sequences=max_sequences,
        max_step_tokens=max_step_tokens,
        kv_bytes=None if kv_mib is None else kv_mib << 20,
        policy=policy.value,
        max_queued_requests=max_requests,
        max_queued_tokens=max_waiting_tokens,
    )
    logs.set_up(options.log_json)
    if otel_endpoint is not None:
        from jaxserve.serving import tracing

        tracing.set_up(otel_endpoint, options.model_name)
    group = _group(coordinator, num_processes, process_id, group_secret_file, join_timeout)
    launch = Start(
        model,
        dtype,
        backend,
        engine,
        options.log_json,
        devices=devices,
        quantize=quantize,
        kv_dtype=kv_dtype,
        group=group,
    )
    sharding = Sharding(mesh, layout, prefill_layout, attention)
    work = _run(launch, sharding, options, began_s, _port(health_port))
    raise typer.Exit(asyncio.run(work))


def _group(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    secret_file: Path | None,
    join_s: float,
) -> Group | None:
    """Returns the group that this process belongs to, by its options or its environment."""
    from jaxserve.errors import UsageError
    from jaxserve.serving.multihost.environment import choose

    try:
        secret = b"" if secret_file is None else secret_file.read_bytes().strip()
    except OSError as error:
        raise UsageError(f"{secret_file} cannot be read: {error.strerror}") from error
    return choose(
        os.environ,
        coordinator=coordinator,
        num_processes=num_processes,
        process_id=process_id,
        secret=secret,
        join_s=join_s,
    )


async def _run(
    launch: Start,
    sharding: Sharding,
    options: ServerOptions,
    began_s: float,
    health_port: int | None,
) -> int:
    """Returns the exit status of the server."""
    import msgspec

    from jaxserve.serving.model_files import ModelFiles, kv_rounding, quantization
    from jaxserve.serving.supervisor import RemoteService

    files = ModelFiles.find(launch.model, launch.dtype)
    layout = sharding.choose(files.info.config, files.dtype)
    # Refused before a process is started.
    quantization(launch.quantize, files.info)
    kv_rounding(launch.kv_dtype)
    launch = msgspec.structs.replace(launch, layout=layout)
    if launch.group is not None and not launch.group.leads:
        from jaxserve.serving.multihost.member import Member

        return await Member(launch, health_port, options.host, options.drain_grace_s).run()
    name = options.model_name
    service = RemoteService(launch, files.intake(name), files.card(name))
    start = await service.launch()
    from jaxserve.serving.server import Server  # takes a second, in which the engine starts

    try:
        return await Server(service, options, began_s=began_s).run()
    finally:
        await asyncio.gather(start, return_exceptions=True)


def _port(number: int) -> int | None:
    return None if number == -1 else number
