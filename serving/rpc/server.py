"""The gRPC server.

server = create_server(service, options)
port = listen(server, options)
await server.start()
...
await server.stop(options.drain_grace_s)
"""

from __future__ import annotations

import logging
from typing import Any

import grpc
from google.protobuf import descriptor_pool
from grpc_reflection.v1alpha import reflection, reflection_pb2

from jaxserve.errors import ConfigError, UnavailableError
from jaxserve.serving.gate import Gate
from jaxserve.serving.keys import Keys
from jaxserve.serving.rpc import health, inference, open_inference
from jaxserve.serving.rpc.call import Desk
from jaxserve.serving.server_options import ServerOptions
from jaxserve.serving.service import Service

MAX_MESSAGE_BYTES = 64 << 20
"""Largest message that the transport carries; requests have a limit of their own in the options."""

MIN_PING_S = 10
PING_S = 60
PING_TIMEOUT_S = 20
MAX_AGE_S = 3600
MAX_AGE_GRACE_S = 600

MAX_PROBES = 256
"""Health checks and watches at once, which need no key."""
MAX_PROBE_BYTES = 1 << 16

REFLECTION = ("grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection")


def create_server(
    service: Service, options: ServerOptions, gate: Gate | None = None
) -> grpc.aio.Server:
    """Returns a server of one model, which does not listen yet.

    Args:
        service: started, or to be started before requests come.
        gate: shared with other servers; None makes one.

    Raises:
        ConfigError: the file of API keys cannot be read.
    """
    keys = Keys.of(options)
    desk = Desk(
        keys,
        Gate.of(options) if gate is None else gate,
        options.request_timeout_s,
        log_prompts=options.log_prompts,
    )
    gate_of_probes = Gate(MAX_PROBES, MAX_PROBE_BYTES, MAX_PROBE_BYTES)
    probes = Desk(None, gate_of_probes, log_level=logging.DEBUG)
    names = (inference.SERVICE.full_name, open_inference.SERVICE.full_name)
    calls = inference.Inference(service, options)
    protocol = open_inference.OpenInference(service, options)
    state = health.Health(service, names)
    server = grpc.aio.server(options=_channel_options(options))
    server.add_generic_rpc_handlers(
        (
            desk.service(inference.SERVICE, calls.methods()),
            desk.service(open_inference.SERVICE, protocol.methods()),
            probes.service(health.SERVICE, state.methods()),
            *_reflection(desk, (*names, health.SERVICE.full_name, *REFLECTION)),
        )
    )
    return server


def listen(server: grpc.aio.Server, options: ServerOptions) -> int:
    """Returns the port that a server listens on.

    Raises:
        ConfigError: a file of the certificate cannot be read.
        UnavailableError: the port is taken, or the address is not this machine's.
    """
    host = f"[{options.host}]" if ":" in options.host else options.host
    address = f"{host}:{options.grpc_port or 0}"
    try:
        if (credentials := _credentials(options)) is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise UnavailableError(
            f"gRPC cannot listen on {address}: {error}; choose another port or address"
        ) from error


def _reflection(desk: Desk, names: tuple[str, ...]) -> list[grpc.GenericRpcHandler]:
    """Returns the handlers that tell clients of the services and their messages.

    The two versions of the protocol have the same messages under different names.
    """
    servicer: Any = reflection.aio.ReflectionServicer(names, descriptor_pool.Default())
    return [
        desk.conversation(
            name,
            "ServerReflectionInfo",
            servicer.ServerReflectionInfo,
            reflection_pb2.ServerReflectionRequest,
        )
        for name in REFLECTION
    ]


def _channel_options(options: ServerOptions) -> list[tuple[str, Any]]:
    """Returns what the transport is told."""
    largest = max(MAX_MESSAGE_BYTES, options.max_body_bytes)
    return [
        ("grpc.max_receive_message_length", largest),
        ("grpc.max_send_message_length", largest),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", MIN_PING_S * 1000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.keepalive_time_ms", PING_S * 1000),
        ("grpc.keepalive_timeout_ms", PING_TIMEOUT_S * 1000),
        ("grpc.max_connection_age_ms", MAX_AGE_S * 1000),
        ("grpc.max_connection_age_grace_ms", MAX_AGE_GRACE_S * 1000),
        ("grpc.so_reuseport", 0),  # a taken port is an error
    ]


def _credentials(options: ServerOptions) -> grpc.ServerCredentials | None:
    """Returns the certificates of a server; None where it encrypts nothing.

    Raises:
        ConfigError: a file cannot be read.
    """
    if options.tls_cert is None or options.tls_key is None:
        return None
    try:
        pair = (options.tls_key.read_bytes(), options.tls_cert.read_bytes())
        ca = None if options.tls_client_ca is None else options.tls_client_ca.read_bytes()
    except OSError as error:
        raise ConfigError(f"a file of the certificate cannot be read: {error}") from error
    return grpc.ssl_server_credentials(
        [pair], root_certificates=ca, require_client_auth=ca is not None
    )
