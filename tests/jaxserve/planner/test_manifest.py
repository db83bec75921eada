"""What deploys a plan: manifests for Kubernetes, and a script that measures it."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from jaxserve import planner
from jaxserve.cli import app
from jaxserve.errors import UsageError
from jaxserve.partitioning.hardware import slice_of
from jaxserve.partitioning.layout_file import read_layout
from jaxserve.planner.manifest import benchmark_script, deployment, hosts, served_model

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")

LOAD = {"input_tokens": 1000, "output_tokens": 200, "batch": (1, 16)}


@pytest.fixture(scope="module")
def plan() -> planner.Plan:
    return planner.search("llama-3-8b", "v5e:2x2", tpot_s=0.05, **LOAD)


@pytest.fixture(scope="module")
def large() -> planner.Plan:
    return planner.search("llama-3-70b", "v5e:4x4", max_replicas=1, **LOAD)


def options_of(command: str) -> set[str]:
    """Returns the options of a command, as "serve" or "bench serve"."""
    found: Any = typer.main.get_command(app)
    for word in command.split():
        found = found.commands[word]
    return {name for one in found.params for name in one.opts}


def given(arguments: list[str]) -> dict[str, str]:
    return {name: value for name, _, value in (one.partition("=") for one in arguments)}


def patched(folder: Path) -> dict[str, Any]:
    """Returns the set of a folder with the changes of its kustomization."""
    rules = yaml.safe_load((folder / "kustomization.yaml").read_text())
    (source,) = rules["resources"]
    found = {
        one["kind"]: one
        for path in (folder / source).glob("*.yaml")
        for one in yaml.safe_load_all(path.read_text())
    }
    for patch in rules["patches"]:
        document = found[patch["target"]["kind"]]
        assert document["metadata"]["name"] == patch["target"]["name"]
        for change in yaml.safe_load(patch["patch"]):
            *way, last = change["path"].split("/")[1:]
            at = document
            for part in way:
                at = at[int(part) if isinstance(at, list) else part]
            if last == "-":
                assert change["op"] == "add"
                at.append(change["value"])
            else:
                assert change["op"] == "replace" and last in at
                at[last] = change["value"]
    return found | {"": rules}


def test_a_manifest_asks_for_the_chips_of_one_copy(plan: planner.Plan):
    documents = list(yaml.safe_load_all(deployment(plan)["kubernetes.yaml"]))
    option = plan.best.option
    (service,) = (one for one in documents if one["kind"] == "Service")
    (server,) = (one for one in documents if one["kind"] == "Deployment")
    assert server["spec"]["replicas"] == option.replicas
    pod = server["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": option.part.num_chips}
    shape = "x".join(map(str, option.part.shape))
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == shape
    assert service["spec"]["selector"] == server["spec"]["template"]["metadata"]["labels"]
    said = given(container["args"])
    assert said.keys() <= options_of("serve")
    assert said["--model"] == "/models/llama-3-8b"
    assert int(said["--max-sequences"]) == plan.best.batch
    assert int(said["--max-step-tokens"]) > plan.best.batch
    names = {volume["name"] for volume in pod["volumes"]}
    assert names == {mount["name"] for mount in container["volumeMounts"]}


def test_a_copy_over_many_hosts_is_a_set_for_the_plans_slice(large: planner.Plan, tmp_path: Path):
    paths = {str(path.relative_to(tmp_path)) for path in large.save(tmp_path)}
    assert "kubernetes.yaml" not in paths and "pods/kustomization.yaml" in paths
    found = patched(tmp_path / "pods")
    group = found["LeaderWorkerSet"]["spec"]["leaderWorkerTemplate"]
    pod = group["workerTemplate"]["spec"]
    (container,) = pod["containers"]
    # A 4x4 slice of v5e is four hosts of four chips.
    assert group["size"] == 4
    assert container["resources"]["limits"]["google.com/tpu"] == 4
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4"
    said = given(container["args"])
    assert said.keys() <= options_of("serve")
    assert said["--layout"] == "/layout/layout.json" and said["--model"] == "/models/llama-3-70b"
    assert {"--group-secret-file", "--health-port"} <= said.keys()
    # The layout's file says the mesh.
    assert not {"--mesh", "--attention"} & said.keys()
    (made,) = found[""]["configMapGenerator"]
    assert {"name": "layout", "configMap": {"name": made["name"]}} in pod["volumes"]
    layout = read_layout(tmp_path / "pods" / made["files"][0])
    assert layout.mesh.num_devices == 16
    scaling = found["HorizontalPodAutoscaler"]["spec"]
    copies = found["LeaderWorkerSet"]["spec"]["replicas"]
    assert scaling["minReplicas"] == scaling["maxReplicas"] == copies == 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("v5e:2x4", (1, 8)),
        ("v5e:4x4", (4, 4)),
        ("v6e:4x8", (8, 4)),
        ("v4:2x2x1", (1, 4)),
        ("v5p:4x4x4", (16, 4)),
        ("h100:8", (1, 8)),
        ("h100:2x8", (2, 8)),
    ],
)
def test_slices_of_many_hosts_have_four_chips_on_each(name: str, expected: tuple[int, int]):
    assert hosts(slice_of(name)) == expected


def test_gpus_are_asked_for_by_their_names():
    single = planner.search("llama-3-8b", "h100:8", **LOAD)
    (server,) = (
        one
        for one in yaml.safe_load_all(deployment(single)["kubernetes.yaml"])
        if one["kind"] == "Deployment"
    )
    pod = server["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    assert set(pod["containers"][0]["resources"]["limits"]) == {"nvidia.com/gpu"}
    assert given(pod["containers"][0]["args"])["--backend"] == "gpu"


@pytest.mark.parametrize(
    ("model", "checkpoint", "served"),
    [
        ("llama-3-8b", None, "/models/llama-3-8b"),
        ("llama-3-8b", "/mnt/eight", "/mnt/eight"),
        ("tiny", None, "tiny"),
        ("checkpoints/mine/config.json", None, "/models/mine"),
        ("checkpoints/mine", None, "/models/mine"),
    ],
)
def test_servers_load_a_directory_that_they_see(
    plan: planner.Plan, model: str, checkpoint: str | None, served: str
):
    named = planner.Plan(model, plan.found)
    assert served_model(named, checkpoint) == served
    assert f"--model={served}\n" in deployment(named, checkpoint)["kubernetes.yaml"]


def test_a_directory_that_pods_cannot_find_is_refused_before_the_search(tmp_path: Path):
    words = ["plan", "llama-3-8b", "--slice", "v5e:2x2", "--isl", "10", "--osl", "10"]
    out = tmp_path / "out"
    words += ["--save-dir", str(out), "--checkpoint", "here/llama"]
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, UsageError)
    assert "give the directory as the servers see it" in str(done.exception)
    assert not out.exists()


def test_what_serves_no_plan_is_said_to_be_left_out(tmp_path: Path):
    words = ["plan", "llama-3-8b", "--slice", "v5e:2x2", "--isl", "100", "--osl", "10"]
    words += ["--weights", "int4", "--batch", "1:4", "--save-dir", str(tmp_path)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0
    assert "left out what serves the plan: the runtime does not do weights in int4" in done.stderr
    assert not (tmp_path / "layout.json").exists()


def test_the_script_sends_the_plans_load(plan: planner.Plan):
    text = benchmark_script(plan)
    (command,) = re.findall(r"^jaxserve (bench serve .*?[^\\])$", text, re.MULTILINE | re.DOTALL)
    words = shlex.split(re.sub(r"\\\n|\$\{2:.*?\}", "", command))[2:]
    assert '${2:+--api-key-file "$2"}' in command
    said = dict(zip(words[::2], words[1::2], strict=True))
    assert said.keys() <= options_of("bench serve")
    assert (said["--isl"], said["--osl"]) == ("1000", "200")
    assert said["--slo-tpot"] == "50ms"
    started = next(line for line in text.splitlines() if line.startswith("#   jaxserve serve"))
    assert {word for word in started.split() if word.startswith("--")} <= options_of("serve")
    assert "--max-step-tokens" in started
