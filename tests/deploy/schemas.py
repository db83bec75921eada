"""What Kubernetes takes of the kinds that deploy/ uses, as far as we use it, as JSON Schema.

Written from the published names: a field that is misspelt, misplaced or of another type is found
without a cluster.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

STRING: Schema = {"type": "string"}
WORD: Schema = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"}
COUNT: Schema = {"type": "integer", "minimum": 0}
PORT: Schema = {"type": "integer", "minimum": 1, "maximum": 65535}
SWITCH: Schema = {"type": "boolean"}
LABELS: Schema = {"type": "object", "additionalProperties": STRING}
QUANTITY: Schema = {"type": ["string", "integer"], "pattern": "^[0-9]+(m|[KMGT]i?)?$"}


def fields(needed: Schema | None = None, **others: Schema) -> Schema:
    """Returns the schema of an object with exactly these fields, the first of them needed."""
    needed = needed or {}
    return {
        "type": "object",
        "properties": needed | others,
        "required": list(needed),
        "additionalProperties": False,
    }


def many(items: Schema) -> Schema:
    return {"type": "array", "items": items, "minItems": 1}


def one_of(*words: str) -> Schema:
    return {"enum": list(words)}


METADATA = fields({"name": WORD}, labels=LABELS, annotations=LABELS)
PROBE = fields(
    {"httpGet": fields({"path": STRING, "port": {"type": ["string", "integer"]}})},
    periodSeconds=COUNT,
    timeoutSeconds=COUNT,
    failureThreshold=COUNT,
    initialDelaySeconds=COUNT,
)
QUANTITIES: Schema = {"type": "object", "additionalProperties": QUANTITY}
CONTAINER = fields(
    {"name": WORD, "image": STRING},
    imagePullPolicy=one_of("Always", "IfNotPresent", "Never"),
    command=many(STRING),
    args=many(STRING),
    env=many(fields({"name": STRING}, value=STRING)),
    ports=many(fields({"name": WORD, "containerPort": PORT})),
    resources=fields(requests=QUANTITIES, limits=QUANTITIES),
    startupProbe=PROBE,
    readinessProbe=PROBE,
    livenessProbe=PROBE,
    lifecycle=fields(preStop=fields(sleep=fields({"seconds": COUNT}))),
    securityContext=fields(
        allowPrivilegeEscalation=SWITCH,
        readOnlyRootFilesystem=SWITCH,
        capabilities=fields(drop=many(STRING)),
    ),
    volumeMounts=many(fields({"name": WORD, "mountPath": STRING}, subPath=STRING, readOnly=SWITCH)),
)
VOLUME: Schema = fields(
    {"name": WORD},
    persistentVolumeClaim=fields({"claimName": WORD}, readOnly=SWITCH),
    secret=fields({"secretName": WORD}, defaultMode=COUNT),
    emptyDir=fields(medium=one_of("", "Memory"), sizeLimit=QUANTITY),
) | {"minProperties": 2, "maxProperties": 2}
POD = fields(
    {"containers": many(CONTAINER)},
    automountServiceAccountToken=SWITCH,
    terminationGracePeriodSeconds=COUNT,
    restartPolicy=one_of("Always", "OnFailure", "Never"),
    nodeSelector=LABELS,
    securityContext=fields(
        runAsNonRoot=SWITCH,
        runAsUser=COUNT,
        runAsGroup=COUNT,
        fsGroup=COUNT,
        seccompProfile=fields({"type": one_of("RuntimeDefault", "Localhost", "Unconfined")}),
    ),
    volumes=many(VOLUME),
)
POD_TEMPLATE = fields({"metadata": fields(labels=LABELS, annotations=LABELS), "spec": POD})
SELECTOR = fields({"matchLabels": LABELS})
PARENTS = many(fields({"name": WORD}, namespace=WORD, sectionName=WORD))
BACKENDS = many(fields({"name": WORD}, group=STRING, kind=STRING, port=PORT))

LEADER_WORKER_SET = fields(
    {
        "leaderWorkerTemplate": fields(
            {"size": {"type": "integer", "minimum": 1}, "workerTemplate": POD_TEMPLATE},
            leaderTemplate=POD_TEMPLATE,
            restartPolicy=one_of("RecreateGroupOnPodRestart", "RecreateGroupAfterStart", "None"),
        )
    },
    replicas=COUNT,
    startupPolicy=one_of("LeaderCreated", "LeaderReady"),
    networkConfig=fields(subdomainPolicy=one_of("Shared", "UniquePerReplica")),
)
JOB = fields(
    {"template": POD_TEMPLATE},
    parallelism=COUNT,
    completions=COUNT,
    completionMode=one_of("Indexed", "NonIndexed"),
    backoffLimit=COUNT,
)
JOB_SET = fields(
    {
        "replicatedJobs": many(
            fields({"name": WORD, "template": fields({"spec": JOB})}, replicas=COUNT)
        )
    },
    network=fields(enableDNSHostnames=SWITCH, publishNotReadyAddresses=SWITCH, subdomain=WORD),
    failurePolicy=fields(maxRestarts=COUNT),
)
SERVICE = fields(
    {
        "selector": LABELS,
        "ports": many(
            fields(
                {"name": WORD, "port": PORT},
                targetPort={"type": ["string", "integer"]},
                appProtocol=STRING,
            )
        ),
    }
)
DISRUPTION = fields({"selector": SELECTOR}, maxUnavailable=COUNT, minAvailable=COUNT)
PODS_METRIC = fields(
    {
        "type": one_of("Pods"),
        "pods": fields(
            {
                "metric": fields({"name": STRING}),
                "target": fields({"type": one_of("AverageValue"), "averageValue": QUANTITY}),
            }
        ),
    }
)
SCALER = fields(
    {
        "scaleTargetRef": fields({"apiVersion": STRING, "kind": STRING, "name": WORD}),
        "maxReplicas": {"type": "integer", "minimum": 1},
    },
    minReplicas=COUNT,
    metrics=many(PODS_METRIC),
    behavior=fields(
        scaleDown=fields(stabilizationWindowSeconds=COUNT),
        scaleUp=fields(stabilizationWindowSeconds=COUNT),
    ),
)
GATEWAY = fields(
    {
        "gatewayClassName": WORD,
        "listeners": many(
            fields(
                {"name": WORD, "port": PORT, "protocol": one_of("HTTP", "HTTPS", "TCP", "TLS")},
                tls=fields(
                    {"certificateRefs": many(fields({"name": WORD}))},
                    mode=one_of("Terminate", "Passthrough"),
                ),
            )
        ),
    }
)
HTTP_ROUTE = fields(
    {
        "rules": many(
            fields(
                matches=many(
                    fields(path=fields({"type": one_of("PathPrefix", "Exact"), "value": STRING}))
                ),
                backendRefs=BACKENDS,
            )
        )
    },
    parentRefs=PARENTS,
)
GRPC_ROUTE = fields({"rules": many(fields(backendRefs=BACKENDS))}, parentRefs=PARENTS)
INFERENCE_POOL = fields(
    {
        "selector": SELECTOR,
        "targetPorts": many(fields({"number": PORT})) | {"maxItems": 8},
        # The port may be left out only of what is no service.
        "endpointPickerRef": fields(
            {"name": WORD, "port": fields({"number": PORT})},
            group=STRING,
            kind=one_of("Service"),
            failureMode=one_of("FailOpen", "FailClose"),
        ),
    },
    appProtocol=one_of("http", "kubernetes.io/h2c"),
)

SPECS: dict[tuple[str, str], Schema] = {
    ("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet"): LEADER_WORKER_SET,
    ("jobset.x-k8s.io/v1alpha2", "JobSet"): JOB_SET,
    ("v1", "Service"): SERVICE,
    ("policy/v1", "PodDisruptionBudget"): DISRUPTION,
    ("autoscaling/v2", "HorizontalPodAutoscaler"): SCALER,
    ("gateway.networking.k8s.io/v1", "Gateway"): GATEWAY,
    ("gateway.networking.k8s.io/v1", "HTTPRoute"): HTTP_ROUTE,
    ("gateway.networking.k8s.io/v1", "GRPCRoute"): GRPC_ROUTE,
    ("inference.networking.k8s.io/v1", "InferencePool"): INFERENCE_POOL,
}


def problems(value: Any, schema: Schema, where: str = "") -> list[str]:
    """Returns what is wrong with a value, with the place; the part of JSON Schema used above."""
    found: list[str] = []
    kinds = schema.get("type")
    if kinds is not None and not _is(value, [kinds] if isinstance(kinds, str) else kinds):
        return [f"{where}: {value!r} is no {kinds}"]
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{where}: {value!r} is none of {schema['enum']}")
    if isinstance(value, str) and "pattern" in schema:
        import re

        if re.search(schema["pattern"], value) is None:
            found.append(f"{where}: {value!r} does not match {schema['pattern']}")
    if isinstance(value, int) and not schema.get("minimum", value) <= value <= schema.get(
        "maximum", value
    ):
        found.append(f"{where}: {value} is out of range")
    if isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            found.append(f"{where}: {len(value)} items")
        for index, item in enumerate(value):
            found += problems(item, schema.get("items", {}), f"{where}[{index}]")
    if isinstance(value, dict):
        found += _problems_of_object(value, schema, where)
    return found


def _problems_of_object(value: dict[str, Any], schema: Schema, where: str) -> list[str]:
    found = [
        f"{where}.{name} is missing" for name in schema.get("required", ()) if name not in value
    ]
    least, most = schema.get("minProperties", 0), schema.get("maxProperties", len(value))
    if not least <= len(value) <= most:
        found.append(f"{where}: {len(value)} fields")
    known, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    for name, item in value.items():
        if name in known:
            found += problems(item, known[name], f"{where}.{name}")
        elif others is False:
            found.append(f"{where}.{name} is no field")
        elif others is not True:
            found += problems(item, others, f"{where}.{name}")
    return found


def _is(value: Any, kinds: list[str]) -> bool:
    types = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}
    return any(
        isinstance(value, types[kind]) and (kind != "integer" or not isinstance(value, bool))
        for kind in kinds
    )


def check(document: dict[str, Any]) -> list[str]:
    """Returns what is wrong with a manifest."""
    key = document.get("apiVersion", ""), document.get("kind", "")
    if key not in SPECS:
        return [f"{key} is no kind that we use"]
    schema = fields(
        {"apiVersion": STRING, "kind": STRING, "metadata": METADATA, "spec": SPECS[key]}
    )
    return problems(document, schema, document["kind"])
