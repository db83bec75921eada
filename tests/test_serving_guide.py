"""docs/serving.md against the code: flags, defaults, metrics, errors, limits."""

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest
import typer.main

pytest.importorskip("prometheus_client", reason="prometheus-client is not installed")
pytest.importorskip("fastapi", reason="fastapi is not installed")

from jaxserve.cli import app
from jaxserve.serving import answer, gate, request, status, streams
from jaxserve.serving.fake_service import fake_service
from jaxserve.serving.http import bodies, schemas
from jaxserve.serving.http.app import create_admin_app, create_app
from jaxserve.serving.keys import MIN_KEY_CHARS
from jaxserve.serving.prometheus import exposition
from jaxserve.serving.server_options import ServerOptions
from jaxserve.serving.supervisor import Backoff

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "serving.md").read_text()
IN_WORDS = {"--model-name", "--dtype", "--kv-mib", "--max-prompt-tokens"}
"""Flags whose default follows from the model."""


def section(title: str) -> str:
    """Returns the part of the page under a heading."""
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert found, title
    return found[1]


def rows(title: str) -> list[list[str]]:
    """Returns the cells of the rows of a section's first table, its head left out."""
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.fixture(scope="module")
def options() -> dict[str, Any]:
    """Returns the options of `jaxserve serve` by flag."""
    command: Any = typer.main.get_command(app)
    found = command.commands["serve"].params
    return {flag: option for option in found if option.name != "help" for flag in option.opts}


def test_every_flag_is_described_and_every_described_flag_exists(options):
    described = {flag for row in rows("Flags") for flag in re.findall(r"`(--?[\w-]+)`", row[0])}
    assert described == set(options)


def test_flags_named_elsewhere_exist(options):
    ours = {"--help", "--serve", "--url", "--rate", "--duration", "--slo-ttft", "--slo-tpot"}
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", PAGE))
    assert named - ours <= set(options)


def test_defaults_are_those_of_the_command(options):
    for flags, default, _ in rows("Flags"):
        for flag in re.findall(r"`(--[\w-]+)`", flags):
            value = options[flag].default
            if flag in IN_WORDS:
                assert value is None, flag
            elif value is None or value is False:
                assert default in ("none", "off"), flag
            else:
                shown = f"{value:g}" if isinstance(value, float) else str(value)
                assert default.strip("`") == shown, flag


def test_every_metric_is_described_and_every_described_metric_exists():
    async def page() -> str:
        async with fake_service() as service:
            return exposition(service).decode()

    text = asyncio.run(page())
    kinds = dict(re.findall(r"^# TYPE (\S+) (\w+)$", text, re.MULTILINE))
    published = {name for name in kinds if name.startswith("jaxserve_")}
    table = {
        name: bool(row[1]) for row in rows("Metrics") for name in re.findall(r"`(\w+)`", row[0])
    }
    assert set(table) == published
    for name, aliased in table.items():
        assert aliased == (name.replace("jaxserve_", "vllm:", 1) in kinds), name


def test_every_error_is_described_with_its_codes():
    table = {
        (row[0], row[1], code) for row in rows("Errors") for code in re.findall(r"`(\w+)`", row[2])
    }
    known = {(str(s.http), s.grpc, s.code) for s in (*status._TABLE.values(), status.INTERNAL)}
    assert table == known


def test_limits_are_those_of_the_code():
    text = section("Limits")
    for value in (
        f"| {bodies.MAX_DEPTH} |",
        f"{gate.MAX_BYTES >> 20} MiB",
        f"{request.MAX_STOPS}, {request.MAX_STOP_TOKENS}",
        f"{request.MAX_BIASED_TOKENS}, {request.MAX_ALLOWED_TOKENS}, {request.MAX_BAD_WORDS}",
        f"{request.MAX_PROMPTS}, {schemas.MAX_MESSAGES}",
        f"at most {request.MAX_LOGPROBS}",
        f"{streams.MAX_PENDING:,} tokens",
        f"{answer.MAX_LOGPROB_ENTRIES:,}",
    ):
        assert value in text, value
    assert f"at least {MIN_KEY_CHARS} characters" in section("Security")
    assert f"up to {Backoff().most_s:g} seconds" in section("When something fails")


def test_routes_that_are_named_exist():
    async def routes() -> set[str]:
        async with fake_service() as service:
            made = create_app(service, ServerOptions()), create_admin_app(service, ServerOptions())
        return {str(getattr(route, "path", "")) for one in made for route in one.routes}

    named = set(re.findall(r"[`\d ](/(?:health|v1|v2|metrics|admin|docs)[\w/]*)", PAGE))
    assert len(named) > 8
    collectors = {"/v1/traces"}  # of OpenTelemetry
    assert named - collectors <= asyncio.run(routes())
