"""What deploy/ says against the code: metrics, flags, routes, times."""

import asyncio
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer.main

pytest.importorskip("prometheus_client", reason="prometheus-client is not installed")
pytest.importorskip("fastapi", reason="fastapi is not installed")
yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")

from jaxserve.cli import app  # noqa: E402
from jaxserve.serving.answer import Answer  # noqa: E402
from jaxserve.serving.fake_service import fake_service  # noqa: E402
from jaxserve.serving.http.app import create_app  # noqa: E402
from jaxserve.serving.http.guard import OPEN_PATHS  # noqa: E402
from jaxserve.serving.prometheus import exposition  # noqa: E402
from jaxserve.serving.request import SamplingParams  # noqa: E402
from jaxserve.serving.server_options import ServerOptions  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
LABEL = re.compile(r"([a-z_]+)(?:=~|!~|!=|=)")


@pytest.fixture(scope="module")
def page() -> str:
    """Returns the metrics of a server that answered a request."""

    async def go() -> str:
        async with fake_service() as service:
            params = SamplingParams(max_tokens=4, seed=0)
            request = service.intake.request("abc", params)
            async with await Answer.open(service, request) as answer:
                await answer.completions()
            return exposition(service).decode()

    return asyncio.run(go())


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    return json.loads((DEPLOY / "grafana.json").read_text())


@pytest.fixture(scope="module")
def manifest() -> dict[str, dict[str, Any]]:
    text = (DEPLOY / "kubernetes.yaml").read_text()
    return {part["kind"]: part for part in yaml.safe_load_all(text)}


@pytest.fixture(scope="module")
def container(manifest) -> dict[str, Any]:
    (found,) = manifest["Deployment"]["spec"]["template"]["spec"]["containers"]
    return found


@pytest.fixture(scope="module")
def flags() -> dict[str, Any]:
    """Returns the options of `jaxserve serve` by flag."""
    command: Any = typer.main.get_command(app)
    return {flag: option for option in command.commands["serve"].params for flag in option.opts}


def expressions(dashboard: dict[str, Any]) -> list[str]:
    panels = [target["expr"] for p in dashboard["panels"] for target in p.get("targets", [])]
    queries = [v["query"]["query"] for v in dashboard["templating"]["list"] if v["type"] == "query"]
    return panels + queries


def test_every_metric_of_the_dashboard_is_published(dashboard, page: str):
    published = set(re.findall(r"^(\w+)[{ ]", page, re.MULTILINE))
    # A gauge that has no value without a model.
    published |= set(re.findall(r"^# TYPE (\w+) gauge$", page, re.MULTILINE))
    asked = {name for e in expressions(dashboard) for name in re.findall(r"jaxserve_\w+", e)}
    assert len(asked) > 20
    assert asked - published == set()


def test_labels_of_the_dashboard_are_published(dashboard, page: str):
    known = {"instance", "le", *re.findall(r"[{,](\w+)=", page)}
    for expression in expressions(dashboard):
        selected = {
            name for part in re.findall(r"{(.*?)}", expression) for name in LABEL.findall(part)
        }
        grouped = {
            name.strip()
            for part in re.findall(r"by \((.*?)\)", expression)
            for name in part.split(",")
        }
        assert (selected | grouped) <= known, expression


def test_panels_do_not_overlap_and_have_targets(dashboard):
    taken: set[tuple[int, int]] = set()
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
        assert panel["type"] == "row" or (panel["targets"] and panel["description"])


def test_arguments_of_the_container_are_flags(container, flags):
    for argument in container["args"]:
        flag, _, value = argument.partition("=")
        assert flag in flags, argument
        assert value, argument


def test_the_drain_ends_before_the_pod_is_killed(manifest, container):
    pod = manifest["Deployment"]["spec"]["template"]["spec"]
    (grace,) = [a.partition("=")[2] for a in container["args"] if a.startswith("--drain-grace=")]
    pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] >= pause + float(grace) + 5


def test_probes_ask_routes_that_need_no_key(container, flags):
    async def routes() -> set[str]:
        async with fake_service() as service:
            return {
                str(getattr(r, "path", "")) for r in create_app(service, ServerOptions()).routes
            }

    known = asyncio.run(routes())
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked = container[probe]["httpGet"]
        assert asked["path"] in known & OPEN_PATHS
        assert asked["port"] in ports
    assert ports == {"http": flags["--http-port"].default, "grpc": flags["--grpc-port"].default}


def test_service_and_volumes_of_the_manifest_fit_together(manifest, container):
    pod = manifest["Deployment"]["spec"]["template"]
    assert pod["metadata"]["labels"] == manifest["Service"]["spec"]["selector"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["spec"]["volumes"]
    }
    claims = [v["persistentVolumeClaim"]["claimName"] for v in pod["spec"]["volumes"][:1]]
    assert claims == [manifest["PersistentVolumeClaim"]["metadata"]["name"]]


def test_the_image_starts_a_server_with_extras_that_exist(flags):
    text = (DEPLOY / "Dockerfile").read_text()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert {"serve", "tpu", "cuda"} <= set(extras)
    for name in ("ENTRYPOINT", "CMD"):
        (line,) = re.findall(rf"^{name} (\[.*\])$", text, re.MULTILINE)
        words = json.loads(line)
        assert all(word in flags for word in words if word.startswith("--")), line
    assert "STOPSIGNAL SIGTERM" in text
    assert "USER 10001" in text


def test_the_image_leaves_out_nothing_that_the_wheel_needs():
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().split()
    sources = [path for path in (ROOT / "jaxserve").iterdir() if path.is_symlink()]
    needed = {"jaxserve", "pyproject.toml", "README.md", "LICENSE"}
    needed |= {path.resolve().name for path in sources}
    assert len(needed) > 6
    assert not needed & set(ignored)
