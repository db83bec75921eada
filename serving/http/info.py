"""Routes that tell of the server: models, health, version, load, metrics."""

from __future__ import annotations

import msgspec
from starlette.responses import Response

import jaxserve
from jaxserve.serving.http.errors import JSON
from jaxserve.serving.http.generate import Site
from jaxserve.serving.http.sampling import check_model
from jaxserve.serving.prometheus import CONTENT_TYPE, exposition
from jaxserve.serving.service import State


class ModelBody(msgspec.Struct, kw_only=True):
    """A model, as OpenAI's clients read it."""

    id: str
    object: str = "model"
    created: int
    owned_by: str
    max_model_len: int
    architecture: str
    dtype: str
    num_parameters: int
    vocab_size: int
    has_chat_template: bool


class ModelsBody(msgspec.Struct, kw_only=True):
    """The models that are served."""

    object: str = "list"
    data: list[ModelBody]


class VersionBody(msgspec.Struct):
    """The version of the server."""

    version: str


class HealthBody(msgspec.Struct):
    """Whether the server is well."""

    status: str
    reason: str = ""


def _model(site: Site) -> ModelBody:
    card, tokenizer = site.service.card, site.service.intake.tokenizer
    return ModelBody(
        id=card.name,
        created=card.created,
        owned_by=card.owner,
        max_model_len=card.max_context_tokens,
        architecture=card.architecture,
        dtype=card.dtype,
        num_parameters=card.num_parameters,
        vocab_size=card.vocab_size,
        has_chat_template=tokenizer is not None and tokenizer.has_chat_template,
    )


def models(site: Site) -> Response:
    """Returns the models that are served: one."""
    return told(ModelsBody(data=[_model(site)]))


def model(site: Site, name: str) -> Response:
    """Returns the model of this name."""
    check_model(name, site.service.card.name)
    return told(_model(site))


def version() -> Response:
    """Returns the version of the server."""
    return told(VersionBody(jaxserve.__version__))


def live(site: Site) -> Response:
    """Returns 200 as long as the server need not be started again."""
    dead = site.service.state is State.DEAD
    return _health(site, 503 if dead else 200)


def ready(site: Site) -> Response:
    """Returns 200 while requests are taken."""
    return _health(site, 200 if site.service.state is State.READY else 503)


async def load(site: Site) -> Response:
    """Returns how busy the engine is."""
    return told(await site.service.load())


def metrics(site: Site) -> Response:
    """Returns counters, gauges and histograms in Prometheus' text format."""
    return Response(exposition(site.service), media_type=CONTENT_TYPE)


def told(body: msgspec.Struct, status: int = 200) -> Response:
    """Returns a body as a response."""
    return Response(msgspec.json.encode(body), status, media_type=JSON)


def _health(site: Site, status: int) -> Response:
    body = HealthBody(str(site.service.state), site.service.reason)
    response = told(body, status)
    response.headers["cache-control"] = "no-store"
    return response
