"""Requests made from the OpenAPI schema: whatever is sent, no failure of the server and no hang.

Each run sends the same few to each route, the slow tests thousands that differ from run to run.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from jaxserve.serving.fake_service import fake_card, fake_engine, fake_intake, fake_service
from jaxserve.serving.http.app import create_app
from jaxserve.serving.http.background import BackgroundServer, serve_in_background
from jaxserve.serving.server_options import ServerOptions
from jaxserve.serving.service import LocalService

FEW, MANY = 25, 250
"""Requests to each route and mode, of which there are more than twenty."""
TIMEOUT_S = 10.0

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]


@pytest.fixture(scope="module")
def server() -> Iterator[BackgroundServer]:
    with serve_in_background(fake_service, ServerOptions(model_name="fake")) as server:
        yield server


def openapi() -> dict[str, Any]:
    service = LocalService(fake_engine(), fake_intake(), fake_card())
    return create_app(service, ServerOptions(model_name="fake")).openapi()


ROUTES = {
    f"{method.upper()} {path}": "requestBody" in said
    for path, methods in openapi()["paths"].items()
    for method, said in methods.items()
}
"""Whether each route reads a body."""


@pytest.mark.parametrize(
    "cases", [FEW, pytest.param(MANY, marks=pytest.mark.slow)], ids=["few", "many"]
)
@pytest.mark.parametrize(
    ("route", "mode"),
    [(route, GenerationMode.POSITIVE) for route in ROUTES]
    + [(route, GenerationMode.NEGATIVE) for route, reads in ROUTES.items() if reads],
    ids=lambda value: getattr(value, "value", value),
)
def test_whatever_is_sent_is_answered_as_the_schema_says(
    server: BackgroundServer, route: str, mode: GenerationMode, cases: int
) -> None:
    schema = schemathesis.openapi.from_dict(server.app.openapi())
    schema.config.update(base_url=server.url)
    method, path = route.split(" ")
    made = schema[path][method].as_strategy(generation_mode=mode)
    statuses: Counter[int] = Counter()

    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        derandomize=cases == FEW,
        suppress_health_check=[
            HealthCheck.filter_too_much,
            HealthCheck.too_slow,
            HealthCheck.data_too_large,
            HealthCheck.large_base_example,
        ],
    )
    @given(st.data())
    def send(data: st.DataObject) -> None:
        case = data.draw(made)
        if data.draw(st.booleans()):
            # Or nearly every request would be for a model that is not there.
            if "name" in case.path_parameters:
                case.path_parameters["name"] = "fake"
            if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
                case.body["model"] = "fake"
        response = case.call(timeout=TIMEOUT_S)
        statuses[response.status_code] += 1
        case.validate_response(response, checks=CHECKS)

    send()
    print(route, mode.value, dict(statuses))  # with `-s`
    if not route.endswith("/infer"):  # data hardly ever fill a shape by chance
        assert (200 in statuses) == (mode is GenerationMode.POSITIVE)
