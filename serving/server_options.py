"""What an operator may set of the servers.

ServerOptions(model_name="tiny", http_port=8000, grpc_port=8001)
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from jaxserve.errors import UsageError
from jaxserve.serving.request import MAX_LOGPROBS, MAX_N


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Addresses, keys and limits of the servers; `docs/serving.md` describes each.

    Attributes:
        model_name: what the model is called in requests.
        host: address that HTTP and gRPC listen on.
        http_port, grpc_port: 0 takes a free one; None leaves the server out.
        admin_port: of the admin routes, always on the loopback address; None leaves them out.
        api_key_file: lines `name key`; without it no key is asked for.
        open_metrics: `/metrics` asks for no key.
        tls_cert, tls_key: PEM files; both or neither.
        tls_client_ca: PEM file; clients need a certificate that it signed.
        allow_plaintext: serve without TLS on an address that others reach.
        cors_origins: origins whose pages may call the HTTP server.
        max_body_bytes: largest HTTP body and gRPC message.
        max_prompt_tokens: longest prompt; None is what the model's context holds.
        max_n, max_logprobs: most completions and likeliest tokens of a request.
        max_requests: requests under way at once, waiting ones included.
        max_waiting_tokens: prompt tokens that may wait.
        drain_grace_s: seconds that requests under way have to end after SIGTERM.
        request_timeout_s: longest time of a request; None leaves that to the client.
        log_prompts: prompts and completions appear in the log.
        log_json: log lines are JSON objects.
    """

    model_name: str = "tiny"
    host: str = "127.0.0.1"
    http_port: int | None = 8000
    grpc_port: int | None = 8001
    admin_port: int | None = None
    api_key_file: Path | None = None
    open_metrics: bool = False
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    allow_plaintext: bool = False
    cors_origins: tuple[str, ...] = ()
    max_body_bytes: int = 4 << 20
    max_prompt_tokens: int | None = None
    max_n: int = 16
    max_logprobs: int = MAX_LOGPROBS
    max_requests: int = 1024
    max_waiting_tokens: int = 4_000_000
    drain_grace_s: float = 30.0
    request_timeout_s: float | None = None
    log_prompts: bool = False
    log_json: bool = True

    def __post_init__(self) -> None:
        for name in ("http_port", "grpc_port", "admin_port"):
            port = getattr(self, name)
            if port is not None and not 0 <= port < 2**16:
                raise UsageError(f"{name}={port} is no port; use 1 to 65535, or 0 for a free one")
        for name, most in (("max_n", MAX_N), ("max_logprobs", MAX_LOGPROBS)):
            value = getattr(self, name)
            if not 1 <= value <= most:
                raise UsageError(f"{name}={value} is out of range; it must be from 1 to {most}")
        for name in ("max_body_bytes", "max_requests", "max_waiting_tokens"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)} must be at least 1")
        if self.max_prompt_tokens is not None and self.max_prompt_tokens < 1:
            raise UsageError(f"max_prompt_tokens={self.max_prompt_tokens} must be at least 1")
        timeout_s = self.request_timeout_s
        if self.drain_grace_s < 0 or (timeout_s is not None and timeout_s <= 0):
            raise UsageError(
                f"drain_grace_s={self.drain_grace_s} must not be below 0, and "
                f"request_timeout_s={self.request_timeout_s} must be above 0"
            )
        if "*" in self.cors_origins:
            raise UsageError("cors_origins: '*' opens the server to every page; name the origins")
        self._check_tls()

    def _check_tls(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise UsageError("tls_cert and tls_key belong together; give both or neither")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise UsageError("tls_client_ca needs tls_cert and tls_key")
        if not (self.loopback or self.tls or self.allow_plaintext):
            raise UsageError(
                f"host={self.host} is reached by others, and prompts would travel unencrypted; "
                "give tls_cert and tls_key, or allow_plaintext behind a proxy that encrypts"
            )

    @property
    def tls(self) -> bool:
        """Returns whether connections are encrypted."""
        return self.tls_cert is not None

    @property
    def loopback(self) -> bool:
        """Returns whether only this machine reaches the servers."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
