"""The HTTP server as an ASGI application.

    app = create_app(service, options)
    await make_server(app, options.host, options.http_port).serve()

Everything that costs something stands before the routes, in `guard.Guard`; routes read the body
that it has read. FastAPI finds the route and describes it; bodies are msgspec's.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

import jaxserve
from jaxserve.serving.gate import Gate
from jaxserve.serving.http import admin, chat, completions, info, kserve, page, schemas, tokens
from jaxserve.serving.http.errors import FieldError, answer
from jaxserve.serving.http.generate import Site
from jaxserve.serving.http.guard import Guard
from jaxserve.serving.http.limits import RequestLimits
from jaxserve.serving.http.openapi import operation, set_schema
from jaxserve.serving.keys import Keys
from jaxserve.serving.server_options import ServerOptions
from jaxserve.serving.service import Load, Service

_PREFLIGHT_S = 600

_BODIES = (
    schemas.CompletionRequest,
    completions.CompletionBody,
    schemas.ChatRequest,
    chat.ChatBody,
    schemas.TokenizeRequest,
    tokens.TokenizeBody,
    schemas.DetokenizeRequest,
    tokens.DetokenizeBody,
    info.ModelsBody,
    info.ModelBody,
    info.VersionBody,
    info.HealthBody,
    Load,
    kserve.LiveBody,
    kserve.ReadyBody,
    kserve.ModelReadyBody,
    kserve.ServerMetadata,
    kserve.ModelMetadata,
    kserve.InferRequest,
    kserve.InferBody,
    kserve.GenerateRequest,
    kserve.GenerateBody,
)


def create_app(
    service: Service,
    options: ServerOptions,
    *,
    gate: Gate | None = None,
    limits: RequestLimits | None = None,
) -> FastAPI:
    """Returns the application of a server.

    Args:
        gate: counts what is under way, over all servers of the service; None makes one.
        limits: bounds of headers, bodies and streams.
    """
    limits = limits or RequestLimits()
    site = Site(service, options, limits)
    keys = Keys.of(options)
    app = _bare("jaxserve", "Serves a language model.")
    _add_openai(app, site)
    _add_kserve(app, site)
    _add_info(app, site)
    _add_pages(app)
    set_schema(app, _BODIES, keys is not None)
    app.add_middleware(
        Guard,
        options=options,
        gate=gate or Gate.of(options),
        keys=keys,
        service=service,
        limits=limits,
    )
    if options.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=options.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-request-id"],
            expose_headers=["x-request-id", "retry-after"],
            max_age=_PREFLIGHT_S,
        )
    return app


def create_admin_app(service: Service, options: ServerOptions) -> FastAPI:
    """Returns the application of the admin port: profile, drain, load."""
    desk = admin.Admin(service)
    app = _bare("jaxserve admin", "Operates a server.")
    post, get = app.post, app.get

    @post("/admin/profile", **operation(admin.ProfileBody, admin.ProfileRequest))
    async def profile(http: Request) -> Response:
        return await desk.profile(http)

    @post("/admin/drain", **operation(admin.StateBody))
    async def drain() -> Response:
        return desk.drain()

    @get("/admin/load", **operation(admin.LoadBody))
    async def load() -> Response:
        return await desk.load()

    set_schema(app, admin.BODIES, options.api_key_file is not None)
    # A full server must still be operable.
    gate = Gate(admin.MAX_REQUESTS, admin.MAX_BYTES, options.max_body_bytes)
    app.add_middleware(Guard, options=options, gate=gate, keys=Keys.of(options))
    return app


def _bare(title: str, description: str) -> FastAPI:
    """Returns an application without routes but its schema, whose errors are ours."""
    app = FastAPI(
        title=title,
        version=jaxserve.__version__,
        description=description,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )

    def refuse(_: Request, error: Exception) -> Response:
        return answer(error)

    def malformed(_: Request, error: Exception) -> Response:
        return answer(FieldError(str(error), None))

    app.add_exception_handler(HTTPException, refuse)
    app.add_exception_handler(RequestValidationError, malformed)
    return app


def _add_openai(app: FastAPI, site: Site) -> None:
    """Adds the routes of OpenAI's interface, and tokenisation."""

    @app.post(
        "/v1/completions",
        summary="Continue prompts",
        **operation(completions.CompletionBody, schemas.CompletionRequest, streams=True),
    )
    async def complete(http: Request) -> Response:
        return await completions.complete(site, http)

    @app.post(
        "/v1/chat/completions",
        summary="Answer a conversation",
        **operation(chat.ChatBody, schemas.ChatRequest, streams=True),
    )
    async def converse(http: Request) -> Response:
        return await chat.chat(site, http)

    @app.get("/v1/models", summary="List models", **operation(info.ModelsBody))
    async def models() -> Response:
        return info.models(site)

    @app.get("/v1/models/{name:path}", summary="Describe a model", **operation(info.ModelBody))
    async def model(name: str) -> Response:
        return info.model(site, name)

    @app.post(
        "/tokenize",
        summary="Text to tokens",
        **operation(tokens.TokenizeBody, schemas.TokenizeRequest),
    )
    async def tokenize(http: Request) -> Response:
        return await tokens.tokenize(site, http)

    @app.post(
        "/detokenize",
        summary="Tokens to text",
        **operation(tokens.DetokenizeBody, schemas.DetokenizeRequest),
    )
    async def detokenize(http: Request) -> Response:
        return await tokens.detokenize(site, http)


def _add_kserve(app: FastAPI, site: Site) -> None:
    """Adds the routes of the Open Inference Protocol; those of one model last."""

    @app.get("/v2/health/live", summary="Live (KServe)", **operation(kserve.LiveBody, also=[503]))
    async def server_live() -> Response:
        return kserve.server_live(site)

    @app.get(
        "/v2/health/ready", summary="Ready (KServe)", **operation(kserve.ReadyBody, also=[503])
    )
    async def server_ready() -> Response:
        return kserve.server_ready(site)

    @app.get("/v2", summary="Server metadata (KServe)", **operation(kserve.ServerMetadata))
    async def server_metadata() -> Response:
        return kserve.server_metadata()

    @app.get(
        "/v2/models/{name:path}/ready",
        summary="Model ready (KServe)",
        **operation(kserve.ModelReadyBody, also=[503]),
    )
    async def model_ready(name: str) -> Response:
        return kserve.model_ready(site, name)

    @app.get(
        "/v2/models/{name:path}",
        summary="Model metadata (KServe)",
        **operation(kserve.ModelMetadata),
    )
    async def model_metadata(name: str) -> Response:
        return kserve.model_metadata(site, name)

    @app.post(
        "/v2/models/{name:path}/infer",
        summary="Infer (KServe)",
        **operation(kserve.InferBody, kserve.InferRequest),
    )
    async def infer(http: Request, name: str) -> Response:
        return await kserve.infer(site, http, name)

    @app.post(
        "/v2/models/{name:path}/generate",
        summary="Generate (KServe)",
        **operation(kserve.GenerateBody, kserve.GenerateRequest),
    )
    async def generate(http: Request, name: str) -> Response:
        return await kserve.generate(site, http, name, stream=False)

    @app.post(
        "/v2/models/{name:path}/generate_stream",
        summary="Generate, streamed (KServe)",
        **operation("text/event-stream", kserve.GenerateRequest),
    )
    async def generate_stream(http: Request, name: str) -> Response:
        return await kserve.generate(site, http, name, stream=True)


def _add_info(app: FastAPI, site: Site) -> None:
    """Adds the routes that tell of the server."""

    @app.get("/health", summary="Live", **operation(info.HealthBody, also=[503]))
    async def live() -> Response:
        return info.live(site)

    @app.get("/health/ready", summary="Ready", **operation(info.HealthBody, also=[503]))
    async def ready() -> Response:
        return info.ready(site)

    @app.get("/version", summary="Version", **operation(info.VersionBody))
    async def version() -> Response:
        return info.version()

    @app.get("/load", summary="Load", **operation(Load))
    async def load() -> Response:
        return await info.load(site)

    @app.get("/metrics", summary="Prometheus metrics", **operation("text/plain"))
    async def metrics() -> Response:
        return info.metrics(site)


def _add_pages(app: FastAPI) -> None:
    """Adds the page at the root, and the reference made of the schema."""
    shown: dict[str, Any] = {"include_in_schema": False}

    @app.get("/", **shown)
    async def root() -> Response:
        return page.chat_page()

    @app.get("/docs", **shown)
    async def docs() -> Response:
        return page.reference_page(app.openapi())
