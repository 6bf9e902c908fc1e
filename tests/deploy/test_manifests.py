"""The Helm chart, rendered by Go's template engine, and deploy/k8s, which is that rendering: valid, alike, and what the
server needs to drain, to be probed and to run without rights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import kubernetes_validate
import pytest
import yaml

from deploy.charts import CHART, EVERYTHING, MANIFESTS, render, values
from octavo.node.supervisor import STOP_SECONDS
from octavo.settings import Settings, known_names

OPERATORS = {"ServiceMonitor"}  # kinds that Kubernetes itself has no schema of
MODEL = {"model": {"existingClaim": "weights", "subPath": "qwen"}, "apiKeysSecret": "octavo-keys"}
PLACED: dict[str, Any] = {
    "replicas": 3,
    "resources": {"limits": {"nvidia.com/gpu": 1}},
    "nodeSelector": {"kubernetes.io/arch": "amd64"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
    "env": {"MAX_BODY_BYTES": "4194304", "SERVED_MODEL_NAME": 'a "quoted" name'},
}
VARIANTS = {"default": {}, "everything": EVERYTHING, "model": MODEL, "placed": PLACED}


@pytest.fixture(scope="module")
def rendered() -> dict[str, dict[str, dict[str, Any]]]:
    """Documents by file name, for each of the variants."""
    return {
        variant: {name: yaml.safe_load(text) for name, text in render(changes).items()}
        for variant, changes in VARIANTS.items()
    }


def pod(documents: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return documents["deployment.yaml"]["spec"]["template"]["spec"]


def container(documents: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return pod(documents)["containers"][0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_chart_renders_what_kubernetes_accepts(rendered: dict[str, Any], variant: str) -> None:
    documents = rendered[variant]
    for document in documents.values():
        if document["kind"] not in OPERATORS:
            kubernetes_validate.validate(document, "1.37", strict=True)
    assert {"deployment.yaml", "service.yaml", "poddisruptionbudget.yaml"} <= set(documents)


def test_a_wrong_manifest_is_noticed(rendered: dict[str, Any]) -> None:
    broken = json.loads(json.dumps(rendered["default"]["deployment.yaml"]))
    broken["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, "1.37", strict=True)


def test_the_manifests_are_the_rendered_chart(rendered: dict[str, Any]) -> None:
    written = {path.name: yaml.safe_load(path.read_text()) for path in sorted(MANIFESTS.glob("*.yaml"))}
    assert written == rendered["everything"], "cd tests && python -m deploy.charts --write"


def test_values_have_the_shape_that_the_schema_wants() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    validate = kubernetes_validate_schema(schema)
    for changes in VARIANTS.values():
        validate(values(changes))
    with pytest.raises(Exception, match="string"):
        validate(values({"env": {"MAX_BODY_BYTES": 4194304}}))  # Helm would render 4.194304e+06


def kubernetes_validate_schema(schema: dict[str, Any]) -> Any:
    jsonschema = pytest.importorskip("jsonschema")
    return lambda given: jsonschema.validate(given, schema)


def test_what_is_given_arrives(rendered: dict[str, Any]) -> None:
    environ = {item["name"]: item.get("value") for item in container(rendered["placed"])["env"]}
    assert environ == {
        "DRAIN_SECONDS": "60",
        "LOG_LEVEL": "INFO",
        "MAX_BODY_BYTES": "4194304",
        "SERVED_MODEL_NAME": 'a "quoted" name',
    }
    assert container(rendered["placed"])["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert pod(rendered["placed"])["tolerations"] == PLACED["tolerations"]
    assert rendered["placed"]["deployment.yaml"]["spec"]["replicas"] == 3
    mounts = {item["name"]: item for item in container(rendered["model"])["volumeMounts"]}
    assert mounts["model"] == {"name": "model", "mountPath": "/models", "subPath": "qwen", "readOnly": True}
    keys = next(item for item in container(rendered["model"])["env"] if item["name"] == "API_KEYS")
    assert keys["valueFrom"]["secretKeyRef"] == {"name": "octavo-keys", "key": "API_KEYS"}


def test_every_variable_is_one_that_the_server_reads(rendered: dict[str, Any]) -> None:
    for documents in rendered.values():
        assert {item["name"] for item in container(documents)["env"]} <= known_names()


def test_ports_are_the_servers_defaults(rendered: dict[str, Any]) -> None:
    settings = Settings.from_environ({})
    ports = {item["name"]: item["containerPort"] for item in container(rendered["default"])["ports"]}
    assert ports == {
        "http": settings.push_mode_http_port,
        "grpc": settings.grpc_port,
        "health": settings.http_port,
        "metrics": settings.metrics_port,
    }
    offered = {item["targetPort"]: item["port"] for item in rendered["default"]["service.yaml"]["spec"]["ports"]}
    assert offered == ports


def test_probes_ask_the_health_pages(rendered: dict[str, Any]) -> None:
    one = container(rendered["default"])
    pages = {name: one[name]["httpGet"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert {name: page["path"] for name, page in pages.items()} == {
        "startupProbe": "/v2/health/ready",
        "readinessProbe": "/v2/health/ready",
        "livenessProbe": "/v2/health/live",
    }
    assert {page["port"] for page in pages.values()} == {"health"}
    start = one["startupProbe"]["periodSeconds"] * one["startupProbe"]["failureThreshold"]
    assert start >= Settings.from_environ({}).start_seconds


def test_a_pod_has_the_time_that_draining_takes(rendered: dict[str, Any]) -> None:
    one = container(rendered["default"])
    drain = int(next(item["value"] for item in one["env"] if item["name"] == "DRAIN_SECONDS"))
    pause = int(one["lifecycle"]["preStop"]["exec"]["command"][1])
    ends = STOP_SECONDS["gateway"] + max(STOP_SECONDS["triton"], STOP_SECONDS["engine"]) + 5
    assert pod(rendered["default"])["terminationGracePeriodSeconds"] >= pause + drain + ends


def test_a_pod_has_no_rights_and_its_folders(rendered: dict[str, Any]) -> None:
    spec, one = pod(rendered["default"]), container(rendered["default"])
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] == 10001  # USER of the Dockerfiles
    assert one["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    volumes = {item["name"]: item for item in spec["volumes"]}
    assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
    assert {item["mountPath"] for item in one["volumeMounts"]} == {"/dev/shm", "/tmp"}


def selectors(document: Any) -> Iterator[dict[str, str]]:
    """Every set of labels that chooses pods or services."""
    if isinstance(document, dict):
        for name, value in document.items():
            if name == "matchLabels" or (name == "selector" and "app.kubernetes.io/name" in value):
                yield value
            yield from selectors(value)


def test_all_of_it_means_the_same_pods(rendered: dict[str, Any]) -> None:
    documents = rendered["everything"]
    labels = documents["deployment.yaml"]["spec"]["template"]["metadata"]["labels"]
    found = [found for document in documents.values() for found in selectors(document)]
    assert len(found) == 4
    assert all(one == labels for one in found)
    scaled = documents["horizontalpodautoscaler.yaml"]["spec"]["scaleTargetRef"]
    assert scaled["name"] == documents["deployment.yaml"]["metadata"]["name"]


def test_the_service_monitor_has_what_its_operator_needs(rendered: dict[str, Any]) -> None:
    spec = rendered["everything"]["servicemonitor.yaml"]["spec"]
    ports = {item["name"] for item in rendered["everything"]["service.yaml"]["spec"]["ports"]}
    assert {item["port"] for item in spec["endpoints"]} <= ports
    assert spec["endpoints"][0]["path"] == "/metrics"
    labels = rendered["everything"]["service.yaml"]["metadata"]["labels"]
    assert spec["selector"]["matchLabels"].items() <= labels.items()
