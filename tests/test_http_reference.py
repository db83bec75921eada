"""docs/http-api.md against the code: routes and fields."""

import asyncio
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

pytest.importorskip("prometheus_client", reason="prometheus-client is not installed")
pytest.importorskip("fastapi", reason="fastapi is not installed")

from jaxserve.serving.fake_service import fake_service
from jaxserve.serving.http.app import create_admin_app, create_app
from jaxserve.serving.http.logprobs import LOWEST
from jaxserve.serving.http.schemas import ChatRequest, CompletionRequest, Generation
from jaxserve.serving.server_options import ServerOptions

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "http-api.md").read_text()


def first_cells(part: str) -> set[str]:
    """Returns the names in the first column of the tables of a part of the page."""
    rows = [line for line in part.splitlines() if re.match(r"\| `\w+`", line)]
    return {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}


def names(kind: type[msgspec.Struct]) -> set[str]:
    return {field.encode_name for field in msgspec.structs.fields(kind)}


def test_every_route_is_described_and_every_described_route_exists():
    async def routes() -> set[str]:
        async with fake_service() as service:
            options = ServerOptions()
            apps = create_app(service, options), create_admin_app(service, options)
        made: list[Any] = [route for app in apps for route in app.routes]
        return {
            f"{'POST' if 'POST' in route.methods else 'GET'} {route.path.replace(':path', '')}"
            for route in made
        }

    assert set(re.findall(r"`((?:GET|POST) [^`]+)`", PAGE)) == asyncio.run(routes())


def test_every_field_is_described_and_every_described_field_exists():
    fields = PAGE[PAGE.index("## Fields") : PAGE.index("## Answers")]
    common, _, rest = fields.partition("Completions alone:")
    completions, _, chats = rest.partition("Chats alone:")
    assert first_cells(common) == names(Generation)
    assert first_cells(completions) == names(CompletionRequest) - names(Generation)
    assert first_cells(chats) == names(ChatRequest) - names(Generation)


def test_the_lowest_log_probability_is_the_one_written():
    assert f"{LOWEST:g}" in PAGE
