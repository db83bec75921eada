"""What deploys a plan: a manifest for Kubernetes and a script that measures it."""

from __future__ import annotations

from typing import TYPE_CHECKING

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


def manifest(plan: Plan) -> str:
    """Returns a manifest: a server for each copy of the model, behind one address.

    A copy whose slice has several hosts is a JobSet's work and not this file's, which says so.
    """
    best = plan.best
    option = best.option
    part, chip = option.part, option.part.chip
    hosts = -(-part.num_chips // chip.host_chips)
    notes = [
        f"# {plan.model} on {plan.found.on}: {option}.",
        f"# Estimated: {best.tokens_per_s:,.0f} tokens/s, first token {best.ttft_s * 1e3:,.0f} ms, "
        f"{best.tpot_s * 1e3:,.1f} ms a token.",
        "#",
        "# Before: an image (deploy/README.md), and",
        "#   kubectl create configmap jaxserve-layout --from-file=layout.json",
        "#   kubectl create secret generic jaxserve-keys --from-file=keys=FILE",
    ]
    if hosts > 1:
        notes.append(
            f"# A copy spans {hosts} hosts: one pod a host, started together, for which one "
            "Deployment is not enough: see deploy/pods."
        )
    resource = "nvidia.com/gpu" if chip.fabric is Fabric.SWITCH else "google.com/tpu"
    per_host = min(part.num_chips, chip.host_chips)
    return "\n".join(notes) + _MANIFEST.format(
        replicas=option.replicas,
        selector=_selector(part),
        model=plan.model,
        batch=best.batch,
        step=max(best.chunk * best.group, 512),
        rounding="".join(f"\n            - {option}" for option in plan.rounding),
        resource=resource,
        count=per_host,
    )


def _selector(part: ChipSlice) -> str:
    name = _ACCELERATORS.get(part.chip.name, part.chip.name)
    if part.chip.fabric is Fabric.SWITCH:
        return f"cloud.google.com/gke-accelerator: {name}"
    topology = "x".join(map(str, part.shape))
    return (
        f"cloud.google.com/gke-tpu-accelerator: {name}\n"
        f"        cloud.google.com/gke-tpu-topology: {topology}"
    )


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
          image: jaxserve:latest
          args:
            - --model={model}
            - --layout=/layout/layout.json{rounding}
            - --max-sequences={batch}
            - --max-step-tokens={step}
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
            - {{name: layout, mountPath: /layout, readOnly: true}}
            - {{name: keys, mountPath: /keys, readOnly: true}}
      volumes:
        - name: layout
          configMap: {{name: jaxserve-layout}}
        - name: keys
          secret: {{secretName: jaxserve-keys}}
"""


def benchmark_script(plan: Plan) -> str:
    """Returns a shell script that measures a server of the plan beside its estimates."""
    best, demand = plan.best, plan.found.demand
    copies = best.option.replicas
    rate = (demand.rate or 0.7 * best.requests_per_s) / copies
    limits = [
        f" --slo-{name} {value * 1e3:g}ms"
        for name, value in (("ttft", demand.ttft_s), ("tpot", demand.tpot_s))
        if value is not None
    ]
    rounding = "".join(f" {option}" for option in plan.rounding)
    return f"""#!/bin/sh
# Measures one copy of {plan.model} ({best.option}), started with
#   jaxserve serve --model DIR --layout layout.json{rounding} --max-sequences {best.batch}
# Estimated of each copy, for {demand.input_tokens} tokens in and {demand.output_tokens} out:
# {best.tokens_per_s / copies:,.0f} tokens/s, first token {best.ttft_s * 1e3:,.0f} ms, \
{best.tpot_s * 1e3:,.1f} ms a token.
# The load's lengths are ShareGPT's, 161 tokens in and 338 out on average: --scale changes them.
set -eu
URL=${{1:-http://127.0.0.1:8000}}
jaxserve bench serve --url "$URL" --rate {rate:.3g} --requests {max(32, 4 * best.batch)} \\
    --context {demand.context_tokens}{"".join(limits)} --plot measured.png
"""
