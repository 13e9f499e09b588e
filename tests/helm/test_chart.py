"""What the chart makes, for every set of values: exactly these objects, valid for Kubernetes 1.30 to 1.37."""

import json
from functools import cache
from typing import Any

import kubernetes_validate.utils
import pytest
import yaml
from kubernetes_validate.utils import validate

from .chart import CHART, OPTIONS, SWITCHES, Json, containers, helm, matrix, names, nested, pick, pods, render, template

KUBERNETES = [f"1.{minor}" for minor in range(30, 38)]
ALWAYS = {
    ("ConfigMap", "slipstream-environment"), ("ConfigMap", "slipstream-settings"), ("ConfigMap", "slipstream-specs"),
    ("ServiceAccount", "slipstream-airflow"), ("ServiceAccount", "slipstream-step"),
    ("ServiceAccount", "slipstream-release"),
    ("Role", "slipstream-airflow"), ("RoleBinding", "slipstream-airflow"),
}  # fmt: skip
BY_SWITCH = {
    "mlflow.enabled": {(kind, "slipstream-mlflow") for kind in ("Deployment", "Service", "ServiceAccount")},
    "webhook.enabled": {(kind, "slipstream-webhook") for kind in ("Deployment", "Service", "ServiceAccount")},
    "kserve.enabled": {
        ("Role", "slipstream-release"), ("RoleBinding", "slipstream-release"), ("ServiceAccount", "slipstream-serving"),
    },
    "trainer.enabled": {("TrainingRuntime", "slipstream-training")},
    "cache.enabled": {("PersistentVolumeClaim", "slipstream-cache")},
    "networkPolicy.enabled": {
        ("NetworkPolicy", f"slipstream-{name}") for name in ("default-deny", "names-and-store", "step")
    },
}  # fmt: skip
CUSTOM = ("TrainingRuntime",)
"""Kinds that are not Kubernetes' own."""
BY_TWO = {
    ("webhook.enabled", "kserve.enabled"): {("Role", "slipstream-webhook"), ("RoleBinding", "slipstream-webhook")},
    ("networkPolicy.enabled", "kserve.enabled"): {("NetworkPolicy", "slipstream-release")},
    ("networkPolicy.enabled", "mlflow.enabled"): {("NetworkPolicy", "slipstream-mlflow")},
    ("networkPolicy.enabled", "webhook.enabled"): {("NetworkPolicy", "slipstream-webhook")},
}
"""What two switches bring together."""


def test_lint_is_strict_and_silent() -> None:
    done = helm("lint", "--strict", str(CHART))
    assert done.returncode == 0, done.stdout
    assert "WARNING" not in done.stdout and "ERROR" not in done.stdout


@pytest.mark.parametrize("values", OPTIONS, ids=lambda v: next(iter(v)))
def test_lint_with_options(values: Json, tmp_path: Any) -> None:
    (tmp_path / "values.yaml").write_text(yaml.safe_dump(nested(values)))
    done = helm("lint", "--strict", str(CHART), "--values", str(tmp_path / "values.yaml"))
    assert done.returncode == 0, done.stdout


def test_each_switch_brings_exactly_its_objects() -> None:
    for values, objects in matrix():
        if set(SWITCHES) <= set(values):
            on = {switch for switch in SWITCHES if values[switch]}
            expected = ALWAYS.union(*(BY_SWITCH[s] for s in on))
            expected = expected.union(*(made for pair, made in BY_TWO.items() if set(pair) <= on))
            assert names(objects) == expected, values
            assert len(objects) == len(expected)


def test_every_object_is_valid_in_every_version(monkeypatch: pytest.MonkeyPatch) -> None:
    # Each call would read and parse megabytes of definitions again.
    monkeypatch.setattr(kubernetes_validate.utils, "schema_contents", cache(kubernetes_validate.utils.schema_contents))
    own = {json.dumps(o, sort_keys=True) for _, objects in matrix() for o in objects}
    different = {text for text in own if json.loads(text)["kind"] not in CUSTOM}
    assert len(different) > 60
    for version in KUBERNETES:
        for text in different:
            assert validate(json.loads(text), version, strict=True) == version
    broken = json.loads(next(text for text in different if '"kind": "Service"' in text))
    broken["spec"]["prots"] = []
    with pytest.raises(kubernetes_validate.ValidationError, match="prots"):
        validate(broken, KUBERNETES[0], strict=True)


def test_nothing_belongs_to_the_release_that_a_rollout_needs() -> None:
    """An upgrade, a rollback and an uninstall touch what the chart makes: no served model and no step's pod is."""
    kinds = {o["kind"] for _, objects in matrix() for o in objects}
    assert kinds == {
        "ConfigMap", "Deployment", "NetworkPolicy", "PersistentVolumeClaim", "PodDisruptionBudget", "Role",
        "RoleBinding", "Service", "ServiceAccount", "TrainingRuntime",
    }  # fmt: skip


def test_the_cache_outlives_the_release() -> None:
    claim = pick(render({"cache.enabled": True}), "PersistentVolumeClaim", "slipstream-cache")
    assert claim["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}


def test_only_what_reads_the_environment_is_restarted_by_a_change_of_it() -> None:
    before, after = render({}), render({"runs": "s3://elsewhere/runs"})
    assert pods(before) != pods(after)
    changed = {o["metadata"]["name"] for o, p in zip(before, after, strict=True) if o != p}
    assert changed == {"slipstream-environment", "slipstream-mlflow", "slipstream-webhook"}


@pytest.mark.parametrize(
    "values",
    [
        {"steps.resources": {"default": {"memory": "8Gi"}}, "steps.keepFailedHours": 1},
        {"specs.files": {"a": "name: a"}},
        {"trainer.enabled": True},
        {"cache.enabled": True},
    ],
    ids=lambda v: next(iter(v)),
)
def test_other_changes_restart_nothing(values: Json) -> None:
    assert pods(render({})) == pods(render(values))


def test_deployments_keep_an_old_pod_until_the_new_one_is_ready() -> None:
    for name in ("slipstream-mlflow", "slipstream-webhook"):
        deployment = pick(render({}), "Deployment", name)["spec"]
        assert deployment["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
        for container in deployment["template"]["spec"]["containers"]:
            assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(container)


def test_selectors_match_their_pods_and_no_step() -> None:
    step = {"app.kubernetes.io/name": "slipstream", "app.kubernetes.io/component": "step", "slipstream/step": "build"}
    for _, objects in matrix():
        for deployment in (o for o in objects if o["kind"] == "Deployment"):
            wanted = deployment["spec"]["selector"]["matchLabels"]
            assert wanted.items() <= deployment["spec"]["template"]["metadata"]["labels"].items()
            assert not wanted.items() <= step.items()
            service = pick(objects, "Service", deployment["metadata"]["name"])
            assert service["spec"]["selector"] == wanted


def test_names_and_labels_are_within_kubernetes_limits() -> None:
    for objects in (render({}, release="x" * 53), *(objects for _, objects in matrix())):
        for made in objects:
            assert len(made["metadata"]["name"]) <= 63
            assert all(len(value) <= 63 for value in made["metadata"]["labels"].values())
            assert {"app.kubernetes.io/name", "app.kubernetes.io/instance", "app.kubernetes.io/component",
                    "app.kubernetes.io/part-of", "app.kubernetes.io/version", "app.kubernetes.io/managed-by",
                    "helm.sh/chart"} == set(made["metadata"]["labels"])  # fmt: skip


def test_rendering_is_deterministic() -> None:
    values = dict.fromkeys(SWITCHES, True) | {"specs.files": {"b": "name: b", "a": "name: a"}}
    assert template(values).stdout == template(values).stdout


def test_containers_have_resources() -> None:
    for _, objects in matrix():
        for pod in pods(objects):
            for container in containers(pod):
                assert {"cpu", "memory"} <= set(container["resources"]["requests"])
                assert "memory" in container["resources"]["limits"]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"mlflow.enable": True}, "additional properties 'enable' not allowed"),
        ({"webhok": {}}, "additional properties 'webhok' not allowed"),
        ({"steps.resources": {"train": {"cpu": 1}}}, "'train'"),
        ({"steps.resources": {"build": {"cpus": 1}}}, "additional properties 'cpus' not allowed"),
        ({"steps.resources": {"build": {"memory": 4}}}, "got number, want string"),
        ({"steps.resources": {"build": {"memory": "4 GB"}}}, "does not match pattern"),
        ({"steps.nodePools": [{"gpu": 1}]}, "missing property 'steps'"),
        ({"mlflow.replicas": "two"}, "got string, want integer"),
        ({"mlflow.replicas": 0}, "minimum"),
        ({"mlflow.database": {"secret": "a", "key": "b", "value": "postgresql://u:p@h/d"}}, "'value' not allowed"),
        ({"storage.secret": "Not A Name"}, "does not match pattern"),
        ({"storage.secretKey": "abc"}, "additional properties 'secretKey' not allowed"),
        ({"runs": "/var/lib/runs"}, "does not match pattern"),
        ({"runs": ""}, "does not match pattern"),
        ({"specs.files": {"Bad Name": "name: x"}}, "does not match pattern"),
        ({"airflow.url": "airflow:8080"}, "does not match pattern"),
        ({"images.pullPolicy": "Sometimes"}, "value must be one of"),
        ({"cache.accessMode": "ReadOnlyMany"}, "value must be one of"),
        ({"kserve.runtime": "triton"}, "value must be one of"),
        ({"podSecurity.runAsUser": 0}, "minimum"),
        ({"networkPolicy.databasePorts": [70000]}, "maximum"),
        ({"mlflow.enabled": False}, "mlflow.url: give the address"),
        ({"specs.location": "s3://b/p", "specs.files": {"a": "name: a"}}, "not both"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_what_is_wrong_is_refused_and_named(values: Json, said: str) -> None:
    done = template(values)
    assert done.returncode != 0
    assert said in done.stderr


def test_the_chart_is_of_this_version_and_says_which_kubernetes_it_needs() -> None:
    from slipstream.digests import versions

    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == versions("slipstream")["slipstream"]
    for version, installs in (("1.19.0", False), ("1.20.2", True), ("1.30.0", True), ("1.37.1", True)):
        done = helm("template", "s", str(CHART), "--kube-version", version)
        assert (done.returncode == 0) == installs, done.stderr
