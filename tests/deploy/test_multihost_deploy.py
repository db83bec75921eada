"""deploy/pods: every folder is built as kustomize would, and checked against schema and code."""

import asyncio
import copy
from math import prod
from pathlib import Path
from typing import Any

import pytest
import typer.main

pytest.importorskip("prometheus_client", reason="prometheus-client is not installed")
pytest.importorskip("fastapi", reason="fastapi is not installed")
yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")

from jaxserve.cli import app  # noqa: E402
from jaxserve.serving.fake_service import fake_service  # noqa: E402
from jaxserve.serving.http.guard import OPEN_PATHS  # noqa: E402
from jaxserve.serving.multihost.group import DEFAULT_PORT  # noqa: E402
from jaxserve.serving.prometheus import exposition  # noqa: E402

from .schemas import check  # noqa: E402

PODS = Path(__file__).resolve().parents[2] / "deploy" / "pods"
SETS = ("leaderworkerset", "jobset")
FOLDERS = [kind + slice_ for kind in SETS for slice_ in ("", "-v5p", "-v6e")]
CHIPS_PER_HOST = 4
PICKED = ("vllm:num_requests_waiting", "vllm:num_requests_running", "vllm:kv_cache_usage_perc")


def built(folder: Path) -> list[dict[str, Any]]:
    """Returns the manifests of a folder: its resources, patched."""
    rules = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert set(rules) <= {"apiVersion", "kind", "resources", "patches"}
    found: list[dict[str, Any]] = []
    for name in rules["resources"]:
        path = folder / name
        found += (
            built(path.resolve()) if path.is_dir() else list(yaml.safe_load_all(path.read_text()))
        )
    for patch in rules.get("patches", ()):
        target = patch["target"]
        (document,) = [
            d
            for d in found
            if (d["kind"], d["metadata"]["name"]) == (target["kind"], target["name"])
        ]
        for change in yaml.safe_load(patch["patch"]):
            applied(document, **change)
    return found


def applied(document: Any, op: str, path: str, value: Any = None) -> None:
    """Changes a document as a JSON patch does."""
    *way, last = [part.replace("~1", "/") for part in path.split("/")[1:]]
    for part in way:
        document = document[_key(document, part)]
    key = _key(document, last)
    assert op in ("add", "replace", "remove")
    if op != "add":
        document.pop(key) if op == "remove" else document[key]  # what is changed exists
    if op != "remove":
        document[key] = value


def _key(document: Any, part: str) -> Any:
    return int(part) if isinstance(document, list) else part


def one(documents: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (found,) = [document for document in documents if document["kind"] == kind]
    return found


def pod(documents: list[dict[str, Any]]) -> tuple[int, dict[str, Any]]:
    """Returns (hosts of a group, the template of its pods)."""
    for document in documents:
        if document["kind"] == "LeaderWorkerSet":
            group = document["spec"]["leaderWorkerTemplate"]
            return group["size"], group["workerTemplate"]
        if document["kind"] == "JobSet":
            (job,) = [part["template"]["spec"] for part in document["spec"]["replicatedJobs"]]
            assert job["parallelism"] == job["completions"]
            return job["completions"], job["template"]
    raise AssertionError("no set")


@pytest.fixture(params=FOLDERS)
def documents(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return built(PODS / request.param)


def test_every_manifest_fits_its_schema(documents: list[dict[str, Any]]) -> None:
    assert len(documents) >= 7
    for document in documents:
        assert check(document) == []


def test_a_misspelt_field_is_found() -> None:
    documents = built(PODS / "leaderworkerset")
    wrong = copy.deepcopy(one(documents, "LeaderWorkerSet"))
    wrong["spec"]["leaderWorkerTemplate"]["sise"] = 4
    assert check(wrong) == ["LeaderWorkerSet.spec.leaderWorkerTemplate.sise is no field"]
    wrong = copy.deepcopy(one(documents, "Service"))
    wrong["spec"]["ports"][0]["port"] = "8000"
    assert check(wrong) == ["Service.spec.ports[0].port: '8000' is no integer"]


def test_hosts_chips_and_mesh_fit_together(documents: list[dict[str, Any]]) -> None:
    hosts, template = pod(documents)
    spec = template["spec"]
    (container,) = spec["containers"]
    topology = spec["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = prod(map(int, topology.split("x")))
    (mesh,) = [a.partition("=")[2] for a in container["args"] if a.startswith("--mesh=")]
    assert prod(map(int, mesh.split(","))) == chips == hosts * CHIPS_PER_HOST
    for amounts in container["resources"].values():
        assert amounts["google.com/tpu"] == CHIPS_PER_HOST


def test_the_container_fits_the_command(documents: list[dict[str, Any]]) -> None:
    command: Any = typer.main.get_command(app)
    flags = {
        f: o for option in command.commands["serve"].params for f in option.opts for o in [option]
    }
    _, template = pod(documents)
    spec = template["spec"]
    (container,) = spec["containers"]
    given = {name: value for name, _, value in (a.partition("=") for a in container["args"])}
    assert set(given) <= set(flags)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {
        "http": flags["--http-port"].default,
        "grpc": flags["--grpc-port"].default,
        "coordinator": DEFAULT_PORT,
        "plans": DEFAULT_PORT + 1,
    }
    # Probes are the same for all ranks, so those above 0 tell health where rank 0 serves.
    assert int(given["--health-port"]) == ports["http"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked = container[probe]["httpGet"]
        assert asked["port"] == "http"
        assert asked["path"] in OPEN_PATHS
    pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    grace = float(given["--drain-grace"])
    assert spec["terminationGracePeriodSeconds"] >= pause + grace + 10
    startup = container["startupProbe"]
    waits_s = startup["periodSeconds"] * startup["failureThreshold"]
    assert waits_s > float(given["--join-timeout"])
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in spec["volumes"]}
    places = {mount["mountPath"] for mount in container["volumeMounts"]}
    for flag in ("--model", "--api-key-file", "--group-secret-file"):
        assert any(given[flag].startswith(f"{place}/") for place in places)


def test_requests_go_to_rank_0_alone(documents: list[dict[str, Any]]) -> None:
    index = {
        "LeaderWorkerSet": "leaderworkerset.sigs.k8s.io/worker-index",
        "JobSet": "batch.kubernetes.io/job-completion-index",
    }
    (label,) = [index[d["kind"]] for d in documents if d["kind"] in index]
    _, template = pod(documents)
    wanted = template["metadata"]["labels"] | {label: "0"}
    service, pool = one(documents, "Service"), one(documents, "InferencePool")
    assert service["spec"]["selector"] == pool["spec"]["selector"]["matchLabels"] == wanted
    budget = one(documents, "PodDisruptionBudget")
    assert budget["spec"]["selector"]["matchLabels"] == template["metadata"]["labels"]


def test_no_service_has_the_name_that_a_set_needs(documents: list[dict[str, Any]]) -> None:
    """The controllers make a headless service of the set's name, unless there is one."""
    (own,) = [
        d["metadata"]["name"] for d in documents if d["kind"] in ("LeaderWorkerSet", "JobSet")
    ]
    assert one(documents, "Service")["metadata"]["name"] != own


def test_one_host_at_a_time_may_go(documents: list[dict[str, Any]]) -> None:
    hosts, _ = pod(documents)
    spec = one(documents, "PodDisruptionBudget")["spec"]
    if any(d["kind"] == "JobSet" for d in documents):  # whose pods have no scale
        assert spec["minAvailable"] == hosts - 1 and "maxUnavailable" not in spec
    else:
        assert spec["maxUnavailable"] == 1


def test_each_kind_of_route_has_a_listener_with_tls(documents: list[dict[str, Any]]) -> None:
    listeners = {one["name"]: one for one in one(documents, "Gateway")["spec"]["listeners"]}
    taken = [
        parent["sectionName"]
        for kind in ("HTTPRoute", "GRPCRoute")
        for parent in one(documents, kind)["spec"]["parentRefs"]
    ]
    assert sorted(taken) == sorted(listeners)
    for listener in listeners.values():
        assert listener["protocol"] == "HTTPS" and listener["tls"]["certificateRefs"]


def test_routes_lead_to_what_is_there(documents: list[dict[str, Any]]) -> None:
    names = {(d["kind"], d["metadata"]["name"]) for d in documents}
    ports = {port["port"] for port in one(documents, "Service")["spec"]["ports"]}
    for kind in ("HTTPRoute", "GRPCRoute"):
        spec = one(documents, kind)["spec"]
        assert all(("Gateway", parent["name"]) in names for parent in spec["parentRefs"])
        for backend in [b for rule in spec["rules"] for b in rule["backendRefs"]]:
            assert (backend.get("kind", "Service"), backend["name"]) in names
            assert backend.get("port", 8000) in ports


def test_groups_scale_by_metrics_that_are_published() -> None:
    async def published() -> str:
        async with fake_service() as service:
            return exposition(service).decode()

    page = asyncio.run(published())
    documents = built(PODS / "leaderworkerset")
    scaler = one(documents, "HorizontalPodAutoscaler")["spec"]
    for metric in scaler["metrics"]:
        assert f"\n{metric['pods']['metric']['name']}{{" in page
    target = scaler["scaleTargetRef"]
    scaled = one(documents, target["kind"])
    assert (target["apiVersion"], target["name"]) == (
        scaled["apiVersion"],
        scaled["metadata"]["name"],
    )


def test_an_endpoint_picker_finds_the_load_without_a_key(documents: list[dict[str, Any]]) -> None:
    """Pickers read gauges of these names, the memory as a share of 1, and send no credentials."""

    async def published() -> str:
        async with fake_service() as service:
            return exposition(service).decode()

    page = asyncio.run(published())
    values = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
    for name in PICKED:
        assert f"# TYPE {name} gauge\n" in page
        (value,) = [value for key, value in values.items() if key.startswith(f"{name}{{")]
        assert 0 <= float(value) <= 1
    _, template = pod(documents)
    (container,) = template["spec"]["containers"]
    assert "--open-metrics" in container["args"]
    (port,) = one(documents, "InferencePool")["spec"]["targetPorts"]
    assert port["number"] in [p["containerPort"] for p in container["ports"] if p["name"] == "http"]
