"""What deploys a plan: manifests for Kubernetes and a script that measures it.

    deployment(plan)                     # {"kubernetes.yaml": ...}, or a folder for `kubectl -k`
    benchmark_script(plan)

A copy of the model on one host is a Deployment. One that spans several hosts is a LeaderWorkerSet:
that of `deploy/pods`, copied, and changed for the plan's slice by a patch.
"""

from __future__ import annotations

import re
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from jaxserve.checkpoint.locate import EMBEDDED
from jaxserve.errors import UsageError
from jaxserve.partitioning.hardware import ChipSlice, Fabric

if TYPE_CHECKING:
    from jaxserve.planner.answers import Plan

_ACCELERATORS = {
    "v4": "tpu-v4-podslice",
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
    "tpu7x": "tpu7x",
    "a100": "nvidia-a100-80gb",
    "h100": "nvidia-h100-80gb",
    "h200": "nvidia-h200-141gb",
    "b200": "nvidia-b200",
    "l4": "nvidia-l4",
}
"""Labels of Google Kubernetes Engine's nodes."""

_HOPPER = ("h100", "h200")

_TPU_HOST = 4
"""Chips of a host in TPU slices of several hosts; one host alone may have eight."""

_SET = "leaderworkerset"


def check_checkpoint(checkpoint: str | None) -> None:
    """Raises a UsageError for a checkpoint that pods could not find."""
    if checkpoint is not None and not PurePosixPath(checkpoint).is_absolute():
        raise UsageError(
            f"--checkpoint {checkpoint!r} is no absolute path: give the directory as the servers "
            "see it, such as /models/llama-3-70b in their volume jaxserve-models"
        )


def served_model(plan: Plan, checkpoint: str | None = None) -> str:
    """Returns what the servers load: a directory in their volume, or a model that is shipped.

    Args:
        checkpoint: the directory; by default one of the model's name in /models.
    """
    check_checkpoint(checkpoint)
    if checkpoint is None and plan.model in EMBEDDED:
        return plan.model
    path = PurePosixPath(plan.model)
    named = path.parent if path.name == "config.json" else path
    return checkpoint or f"/models/{named.name or 'model'}"


def hosts(part: ChipSlice) -> tuple[int, int]:
    """Returns (hosts of a slice, chips of each)."""
    if part.num_chips <= part.chip.host_chips:
        return 1, part.num_chips
    each = part.chip.host_chips if part.chip.fabric is Fabric.SWITCH else _TPU_HOST
    return -(-part.num_chips // each), each


def deployment(plan: Plan, checkpoint: str | None = None) -> dict[str, str]:
    """Returns the files that deploy a plan, by name.

    Args:
        checkpoint: see `served_model`.

    Raises:
        UsageError: the checkpoint is no absolute path.
    """
    model = served_model(plan, checkpoint)
    count, _ = hosts(plan.best.option.part)
    return {"kubernetes.yaml": _single(plan, model)} if count == 1 else _group(plan, model)


def _arguments(plan: Plan, model: str) -> list[str]:
    """Returns what the plan says to a server."""
    best, chip = plan.best, plan.best.option.part.chip
    backend = "gpu" if chip.name in _HOPPER else "tpu" if _is_tpu(plan) else "xla"
    return [
        f"--model={model}",
        "--layout=/layout/layout.json",
        f"--backend={backend}",
        *plan.rounding,
        f"--max-sequences={best.batch}",
        f"--max-step-tokens={plan.step_tokens}",
    ]


def _is_tpu(plan: Plan) -> bool:
    return plan.best.option.part.chip.fabric in (Fabric.PLANE, Fabric.TORUS)


def _image(plan: Plan) -> str:
    return "jaxserve:tpu" if _is_tpu(plan) else "jaxserve:cuda"


def _notes(plan: Plan, model: str) -> list[str]:
    """Returns what stands above a manifest."""
    best = plan.best
    lines = [
        f"# {plan.model} on {plan.found.on}: {best.option}.",
        f"# Estimated: {best.tokens_per_s:,.0f} tokens/s, first token {best.ttft_s * 1e3:,.0f} ms, "
        f"{best.tpot_s * 1e3:,.1f} ms a token; within {plan.steps['decode'].band:.0%}.",
        "#",
        f"# Before: an image {_image(plan)} (deploy/README.md), and",
    ]
    if model.startswith("/models/"):
        lines += [
            f"#   a volume claim jaxserve-models that holds the checkpoint as {model[8:]}/",
            "#   (another place: plan again with --checkpoint)",
        ]
    elif model.startswith("/"):
        lines.append(f"#   {model} in the pods: mount the volume that holds the checkpoint there")
    return lines


def _single(plan: Plan, model: str) -> str:
    """Returns a manifest of servers on one host each, behind one address."""
    part = plan.best.option.part
    notes = [
        *_notes(plan, model),
        "#   kubectl create configmap jaxserve-layout --from-file=layout.json",
        "#   kubectl create secret generic jaxserve-keys --from-file=keys=FILE",
        "",
    ]
    selector = [f"{name}: {value}" for name, value in _selector(part).items()]
    return "\n".join(notes) + _MANIFEST.format(
        replicas=plan.best.option.replicas,
        selector="\n        ".join(selector),
        image=_image(plan),
        arguments="".join(f"\n            - {one}" for one in _arguments(plan, model)),
        resource=_resource(plan),
        count=part.num_chips,
    )


def _resource(plan: Plan) -> str:
    return "google.com/tpu" if _is_tpu(plan) else "nvidia.com/gpu"


def _selector(part: ChipSlice) -> dict[str, str]:
    name = _ACCELERATORS.get(part.chip.name, part.chip.name)
    if part.chip.fabric not in (Fabric.PLANE, Fabric.TORUS):
        return {"cloud.google.com/gke-accelerator": name}
    return {
        "cloud.google.com/gke-tpu-accelerator": name,
        "cloud.google.com/gke-tpu-topology": "x".join(map(str, part.shape)),
    }


def _group(plan: Plan, model: str) -> dict[str, str]:
    """Returns a folder: that of `deploy/pods` for groups of hosts, changed for the plan's slice."""
    found = {
        f"pods/{folder}/{one.name}": one.read_text(encoding="utf-8")
        for folder in ("base", _SET)
        for one in _folder(folder).iterdir()
        if one.name.endswith(".yaml")
    }
    count, each = hosts(plan.best.option.part)
    given = _arguments(plan, model)
    said = {option.partition("=")[0] for option in given} | {"--mesh", "--attention"}
    text = found[f"pods/{_SET}/set.yaml"]
    kept = [
        option
        for option in re.findall(r"^ +- (--\S+)$", text, re.MULTILINE)
        if option.partition("=")[0] not in said
    ]
    spec = "/spec/leaderWorkerTemplate/workerTemplate/spec"
    inside = f"{spec}/containers/0"
    values = {
        "/spec/replicas": str(plan.best.option.replicas),
        "/spec/leaderWorkerTemplate/size": str(count),
        f"{spec}/nodeSelector": _mapping(_selector(plan.best.option.part)),
        f"{inside}/image": _image(plan),
        f"{inside}/args": "".join(f"\n          - {option}" for option in [*given, *kept]),
        f"{inside}/resources": "".join(
            f"\n          {kind}: {{{_resource(plan)}: {each}, memory: 64Gi}}"
            for kind in ("requests", "limits")
        ),
    }
    copies = plan.best.option.replicas
    found["pods/kustomization.yaml"] = "\n".join(_notes(plan, model)) + _KUSTOMIZATION.format(
        set=_SET,
        spec=spec,
        inside=inside,
        changes="".join(_change(path, value) for path, value in values.items()),
        copies="".join(_change(f"/spec/{name}Replicas", str(copies)) for name in ("min", "max")),
    )
    return found


def _folder(name: str) -> Traversable:
    return files("jaxserve.planner") / "pods" / name


def _mapping(values: dict[str, str]) -> str:
    return "".join(f"\n          {name}: {value}" for name, value in values.items())


def _change(path: str, value: str) -> str:
    """Returns one change of a JSON patch."""
    return f"\n      - op: replace\n        path: {path}\n        value:{_after(value)}"


def _after(value: str) -> str:
    return value if value.startswith("\n") else f" {value}"


_KUSTOMIZATION = """
#   secrets jaxserve-keys, jaxserve-group, jaxserve-tls and a volume claim jaxserve-cache
#   (docs/pods.md)
# Then:
#   kubectl apply -k pods
apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
resources:
  - {set}
configMapGenerator:
  - name: jaxserve-layout
    files: [layout.json]
generatorOptions:
  # The set names it, and kustomize would not rename it there.
  disableNameSuffixHash: true
patches:
  - target: {{kind: LeaderWorkerSet, name: jaxserve-pod}}
    patch: |-{changes}
      - op: add
        path: {inside}/volumeMounts/-
        value: {{name: layout, mountPath: /layout, readOnly: true}}
      - op: add
        path: {spec}/volumes/-
        value:
          name: layout
          configMap: {{name: jaxserve-layout}}
  # The plan's copies; a greater maxReplicas lets more of them start under load.
  - target: {{kind: HorizontalPodAutoscaler, name: jaxserve-pod}}
    patch: |-{copies}
"""


_MANIFEST = """
apiVersion: v1
kind: Service
metadata:
  name: jaxserve
  labels: {{app.kubernetes.io/name: jaxserve}}
spec:
  selector: {{app.kubernetes.io/name: jaxserve}}
  ports:
    - {{name: http, port: 8000, targetPort: http}}
    - {{name: grpc, port: 8001, targetPort: grpc, appProtocol: kubernetes.io/h2c}}
---
apiVersion: apps/v1
kind: Deployment
metadata:
  name: jaxserve
  labels: {{app.kubernetes.io/name: jaxserve}}
spec:
  replicas: {replicas}
  selector:
    matchLabels: {{app.kubernetes.io/name: jaxserve}}
  template:
    metadata:
      labels: {{app.kubernetes.io/name: jaxserve}}
    spec:
      automountServiceAccountToken: false
      terminationGracePeriodSeconds: 75
      nodeSelector:
        {selector}
      containers:
        - name: jaxserve
          image: {image}
          args:{arguments}
            - --api-key-file=/keys/keys
            - --drain-grace=60
          ports:
            - {{name: http, containerPort: 8000}}
            - {{name: grpc, containerPort: 8001}}
          resources:
            limits: {{{resource}: {count}}}
          startupProbe:
            httpGet: {{path: /health/ready, port: http}}
            periodSeconds: 2
            failureThreshold: 900
          readinessProbe:
            httpGet: {{path: /health/ready, port: http}}
            periodSeconds: 2
            failureThreshold: 1
          volumeMounts:
            - {{name: models, mountPath: /models, readOnly: true}}
            - {{name: layout, mountPath: /layout, readOnly: true}}
            - {{name: keys, mountPath: /keys, readOnly: true}}
      volumes:
        - name: models
          persistentVolumeClaim: {{claimName: jaxserve-models, readOnly: true}}
        - name: layout
          configMap: {{name: jaxserve-layout}}
        - name: keys
          secret: {{secretName: jaxserve-keys}}
"""


def benchmark_script(plan: Plan, checkpoint: str | None = None) -> str:
    """Returns a shell script that measures a server of the plan beside its estimates."""
    best, demand = plan.best, plan.found.demand
    copies = best.option.replicas
    rate = (demand.rate or 0.7 * best.requests_per_s) / copies
    limits = [
        f" --slo-{name} {value * 1e3:g}ms"
        for name, value in (("ttft", demand.ttft_s), ("tpot", demand.tpot_s))
        if value is not None
    ]
    started = [f"--model {served_model(plan, checkpoint)}", "--layout layout.json", *plan.rounding]
    started += [f"--max-sequences {best.batch}", f"--max-step-tokens {plan.step_tokens}"]
    return f"""#!/bin/sh
# Measures one copy of {plan.model} ({best.option}), started with
#   jaxserve serve {" ".join(started)}
# Estimated of each copy, for {demand.input_tokens} tokens in and {demand.output_tokens} out:
# {best.tokens_per_s / copies:,.0f} tokens/s, first token {best.ttft_s * 1e3:,.0f} ms, \
{best.tpot_s * 1e3:,.1f} ms a token; within {plan.steps["decode"].band:.0%}.
# Usage: sh benchmark.sh [URL] [FILE of API keys]
set -eu
URL=${{1:-http://127.0.0.1:8000}}
jaxserve bench serve --url "$URL" ${{2:+--api-key-file "$2"}} \\
    --rate {rate:.3g} --requests {max(32, 4 * best.batch)} \\
    --isl {demand.input_tokens} --osl {demand.output_tokens} \\
    --context {demand.context_tokens}{"".join(limits)} --plot measured.png
"""
