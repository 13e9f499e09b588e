"""Renders the chart, offline and each set of values once."""

import itertools
import json
import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm/slipstream"
Json = dict[str, Any]

SWITCHES: dict[str, tuple[Any, Any]] = {
    "mlflow.enabled": (True, False),
    "webhook.enabled": (True, False),
    "kserve.enabled": (True, False),
    "trainer.enabled": (True, False),
    "networkPolicy.enabled": (True, False),
    "cache.enabled": (True, False),
}
"""What the objects depend on: all 64 combinations are rendered."""
OPTIONS: list[Json] = [
    {"airflow.serviceAccount.create": False, "airflow.serviceAccount.namespace": "airflow"},
    {"mlflow.migrate": True, "mlflow.replicas": 3, "mlflow.hosts": ["mlflow.example.org"]},
    {"mlflow.enabled": False, "mlflow.url": "https://mlflow.example.org", "webhook.url": "https://hooks.example.org"},
    {"specs.location": "s3://bucket/specs"},
    {"storage.endpoint": "http://minio:9000", "storage.region": "eu-central-1"},
    {"storage.secret": "", "serviceAccounts.step.annotations": {"cloud/role": "slipstream"}},
    {"cache.enabled": True, "cache.existingClaim": "ours", "steps.codeConfigMap": "code", "steps.secrets": ["data"]},
    {"cache.enabled": True, "cache.storageClass": "nfs"},
    {"kserve.namespace": "serving", "kserve.runtime": "stock", "kserve.maxReplicas": 3, "kserve.ingress": "http://gw"},
    {"kserve.serviceAccount": "theirs", "steps.environment": {"A": "b", "NUMBER": "1"}, "steps.hostNetwork": True},
    {"images.registry": "registry.example.org/team/", "images.tag": "1.2.3", "images.pullSecrets": ["pull"]},
    {"podSecurity.runAsUser": None, "podSecurity.runAsGroup": None},
    {"mlflow.nodeSelector": {"disk": "ssd"}, "webhook.tolerations": [{"key": "spot", "operator": "Exists"}]},
    {
        "networkPolicy.dnsPorts": [53, 8053],
        "networkPolicy.mlflowFrom": [{"namespaceSelector": {"matchLabels": {"name": "ingress"}}}],
        "networkPolicy.webhookFrom": [{"ipBlock": {"cidr": "10.0.0.0/8"}}],
        "networkPolicy.stepsTo": [{"ports": [{"port": 3306, "protocol": "TCP"}]}],
    },
]
"""Everything else that changes what is rendered, each in addition to the defaults."""


@cache
def tools() -> Path:
    """Folder with helm and kubectl."""
    done = subprocess.run([str(ROOT / "scripts/helm-tools")], capture_output=True, text=True, check=True)
    return Path(done.stdout.strip())


def helm(*arguments: str, given: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run helm, with no cluster in reach; `given` is its standard input."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("KUBE", "HELM"))}
    environment |= {"KUBECONFIG": os.devnull}
    return subprocess.run(
        [str(tools() / "helm"), *arguments],
        input=given, env=environment, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


def nested(flat: Json) -> Json:
    """`{"a.b": 1}` as `{"a": {"b": 1}}`."""
    values: Json = {}
    for path, value in flat.items():
        *parents, name = path.split(".")
        inner = values
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[name] = value
    return values


def template(values: Json, release: str = "slipstream", namespace: str = "ml") -> subprocess.CompletedProcess[str]:
    """`helm template` with values given by dotted names, defaults elsewhere."""
    given = json.dumps(nested(values))
    return helm("template", release, str(CHART), "--namespace", namespace, "--values", "-", given=given)


def render(values: Json, release: str = "slipstream") -> list[Json]:
    """The objects, as a list that may be changed."""
    found: list[Json] = json.loads(_rendered(json.dumps(values, sort_keys=True), release))
    return found


@cache
def _rendered(values: str, release: str) -> str:
    done = template(json.loads(values), release)
    assert done.returncode == 0, done.stderr
    return json.dumps([d for d in yaml.load_all(done.stdout, Loader=yaml.CSafeLoader) if d])


def matrix() -> Iterator[tuple[Json, list[Json]]]:
    """Every set of values, with its objects."""
    sets = [dict(zip(SWITCHES, chosen, strict=True)) for chosen in itertools.product(*SWITCHES.values())]
    sets = [v | ({} if v["mlflow.enabled"] else {"mlflow.url": "http://mlflow.example.org"}) for v in sets] + OPTIONS
    with ThreadPoolExecutor(4) as threads:  # helm waits more than it computes
        yield from zip(sets, threads.map(render, sets), strict=True)


def pick(objects: list[Json], kind: str, name: str) -> Json:
    """The one object of this kind and name."""
    [found] = [o for o in objects if (o["kind"], o["metadata"]["name"]) == (kind, name)]
    return found


def names(objects: list[Json]) -> set[tuple[str, str]]:
    """(kind, name) of each object."""
    return {(o["kind"], o["metadata"]["name"]) for o in objects}


def pods(objects: list[Json]) -> list[Json]:
    """The pod templates. Those of a TrainingRuntime are completed by each job (dags/runtimes/trainjob.py)."""
    return [o["spec"]["template"] for o in objects if o["kind"] == "Deployment"]


def containers(pod: Json) -> list[Json]:
    """All containers of a pod template."""
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]
