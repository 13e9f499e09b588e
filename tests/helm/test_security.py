"""Every pod passes the restricted profile, nothing secret is rendered, and nothing is reached that need not be.

The rules are those of the Pod Security Standards (kubernetes.io/docs/concepts/security/pod-security-standards), under
their names there; `restricted` includes `baseline`.
"""

import copy
import json
from collections.abc import Callable

import pytest

from .chart import Json, containers, matrix, pick, pods, render

ALLOWED_VOLUMES = {
    "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret",
}  # fmt: skip
SAFE_SYSCTLS = {
    "kernel.shm_rmid_forced", "net.ipv4.ip_local_port_range", "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.tcp_syncookies", "net.ipv4.ping_group_range",
}  # fmt: skip


def _security(pod: Json) -> list[Json]:
    """Security contexts of the pod and of its containers."""
    return [pod["spec"].get("securityContext", {}), *(c.get("securityContext", {}) for c in containers(pod))]


def _effective(pod: Json, field: str) -> list[object]:
    """A field for each container: its own, else the pod's."""
    default = pod["spec"].get("securityContext", {}).get(field)
    return [c.get("securityContext", {}).get(field, default) for c in containers(pod)]


def _probes(pod: Json) -> list[Json]:
    kinds = ("startupProbe", "readinessProbe", "livenessProbe")
    return [p for c in containers(pod) for k in kinds for p in (c.get(k, {}).get("httpGet", {}),)]


RULES: dict[str, Callable[[Json], bool]] = {
    "HostProcess": lambda p: not any(s.get("windowsOptions", {}).get("hostProcess") for s in _security(p)),
    "Host Namespaces": lambda p: not any(p["spec"].get(k) for k in ("hostNetwork", "hostPID", "hostIPC")),
    "Privileged Containers": lambda p: not any(s.get("privileged") for s in _security(p)),
    "HostPath Volumes": lambda p: not any("hostPath" in v for v in p["spec"].get("volumes", [])),
    "Host Ports": lambda p: not any(port.get("hostPort") for c in containers(p) for port in c.get("ports", [])),
    "Host Probes / Lifecycle Hooks": lambda p: not any("host" in probe for probe in _probes(p)),
    "AppArmor": lambda p: not any("appArmorProfile" in s for s in _security(p)),
    "SELinux": lambda p: not any("seLinuxOptions" in s for s in _security(p)),
    "/proc Mount Type": lambda p: not any(s.get("procMount", "Default") != "Default" for s in _security(p)),
    "Sysctls": lambda p: {y["name"] for s in _security(p) for y in s.get("sysctls", [])} <= SAFE_SYSCTLS,
    "Volume Types": lambda p: all(set(v) - {"name"} <= ALLOWED_VOLUMES for v in p["spec"].get("volumes", [])),
    "Privilege Escalation": lambda p: all(
        c.get("securityContext", {}).get("allowPrivilegeEscalation") is False for c in containers(p)
    ),
    "Running as Non-root": lambda p: all(value is True for value in _effective(p, "runAsNonRoot")),
    "Running as Non-root user": lambda p: not any(value == 0 for value in _effective(p, "runAsUser")),
    "Seccomp": lambda p: all(
        isinstance(v, dict) and v["type"] in ("RuntimeDefault", "Localhost") for v in _effective(p, "seccompProfile")
    ),
    "Capabilities": lambda p: all(
        c.get("securityContext", {}).get("capabilities", {}).get("drop") == ["ALL"]
        and set(c["securityContext"]["capabilities"].get("add", [])) <= {"NET_BIND_SERVICE"}
        for c in containers(p)
    ),
}
"""Rule → whether a pod template keeps it."""

BREACHES: dict[str, Json] = {
    "HostProcess": {"windowsOptions": {"hostProcess": True}},
    "Privileged Containers": {"privileged": True},
    "AppArmor": {"appArmorProfile": {"type": "Unconfined"}},
    "SELinux": {"seLinuxOptions": {"type": "spc_t"}},
    "/proc Mount Type": {"procMount": "Unmasked"},
    "Sysctls": {"sysctls": [{"name": "kernel.msgmax", "value": "1"}]},
    "Privilege Escalation": {"allowPrivilegeEscalation": True},
    "Running as Non-root": {"runAsNonRoot": False},
    "Running as Non-root user": {"runAsUser": 0},
    "Seccomp": {"seccompProfile": {"type": "Unconfined"}},
    "Capabilities": {"capabilities": {"drop": ["ALL"], "add": ["SYS_ADMIN"]}},
}
"""Rule → what breaks it in a container's security context."""


@pytest.mark.parametrize("rule", RULES)
def test_every_pod_passes_the_restricted_profile(rule: str) -> None:
    for values, objects in matrix():
        for pod in pods(objects):
            assert RULES[rule](pod), (rule, values)


@pytest.mark.parametrize("rule", BREACHES)
def test_a_breach_is_noticed(rule: str) -> None:
    pod = copy.deepcopy(pods(render({}))[0])
    pod["spec"]["containers"][0]["securityContext"] |= BREACHES[rule]
    assert [name for name, kept in RULES.items() if not kept(pod)] == [rule]


def test_containers_cannot_change_their_image() -> None:
    for _, objects in matrix():
        for pod in pods(objects):
            assert all(c["securityContext"]["readOnlyRootFilesystem"] is True for c in containers(pod))
            mounted = [{m["mountPath"] for m in c["volumeMounts"]} for c in containers(pod)]
            assert all({"/tmp", "/var/lib/slipstream"} <= paths for paths in mounted)
            assert pod["spec"]["enableServiceLinks"] is False


def test_secrets_are_only_named() -> None:
    """No Secret is made, and whatever is called after one is a reference or the name of one."""
    for _, objects in matrix():
        assert not [o for o in objects if o["kind"] == "Secret"]
        for pod in pods(objects):
            for variable in (v for c in containers(pod) for v in c.get("env", [])):
                if any(word in variable["name"] for word in ("SECRET", "PASSWORD", "USER", "BACKEND_STORE", "KEY")):
                    assert "value" not in variable and "secretKeyRef" in variable["valueFrom"], variable["name"]
        for data in (o["data"] for o in objects if o["kind"] == "ConfigMap"):
            assert not any(word in key for key in data for word in ("SECRET", "PASSWORD", "ACCESS_KEY"))


def test_a_database_address_is_no_argument() -> None:
    """Arguments are shown by `kubectl describe` and by every process list."""
    for container in (c for p in pods(render({"mlflow.migrate": True})) for c in containers(p)):
        assert "backend-store-uri" not in json.dumps(container["args"])
        assert "command" not in container  # the image's first process passes signals on


def test_tokens_are_mounted_only_where_the_cluster_is_called() -> None:
    for values, objects in matrix():
        kserve = values.get("kserve.enabled", True)
        for deployment in (o for o in objects if o["kind"] == "Deployment"):
            expected = kserve and deployment["metadata"]["name"] == "slipstream-webhook"
            assert deployment["spec"]["template"]["spec"]["automountServiceAccountToken"] is expected
        for account in (o for o in objects if o["kind"] == "ServiceAccount"):
            # The pods of Airflow's chart rely on their account's setting.
            assert account["automountServiceAccountToken"] is (account["metadata"]["name"] == "slipstream-airflow")


def _selects(selector: Json, labels: Json) -> bool:
    wanted = selector.get("matchLabels", {}).items() <= labels.items()
    return wanted and all(
        e["operator"] == "In" and labels.get(e["key"]) in e["values"] for e in selector.get("matchExpressions", [])
    )


STEP = {"app.kubernetes.io/name": "slipstream", "app.kubernetes.io/component": "step", "slipstream/step": "build"}
"""Labels of a step's pod (dags/runtimes/kubernetes.py)."""


def _policies(objects: list[Json], labels: Json) -> list[Json]:
    return [o["spec"] for o in objects if o["kind"] == "NetworkPolicy" and _selects(o["spec"]["podSelector"], labels)]


def test_every_pod_is_denied_what_is_not_allowed() -> None:
    for values, objects in matrix():
        if not values.get("networkPolicy.enabled", True):
            continue
        for labels in (STEP, *(p["metadata"]["labels"] for p in pods(objects))):
            denied = [p for p in _policies(objects, labels) if not p.get("ingress") and not p.get("egress")]
            assert any(set(p["policyTypes"]) == {"Ingress", "Egress"} for p in denied), values


def _ports(objects: list[Json], labels: Json) -> set[int]:
    """TCP ports that a pod may connect to anywhere, other than DNS."""
    rules = [r for p in _policies(objects, labels) for r in p.get("egress", []) if "to" not in r]
    return {p["port"] for r in rules for p in r["ports"] if p["protocol"] == "TCP"} - {53}


def test_each_pod_reaches_what_it_needs_and_no_more() -> None:
    objects = render({"storage.endpoint": "http://minio:9000", "airflow.url": "http://airflow-api-server:8081"})
    mlflow, webhook = (
        pick(objects, "Deployment", f"slipstream-{n}")["spec"]["template"]["metadata"]["labels"]
        for n in ("mlflow", "webhook")
    )
    assert _ports(objects, STEP) == {9000, 5000}
    assert _ports(objects, STEP | {"slipstream/step": "rollout"}) == {9000, 5000, 443, 6443}
    assert _ports(objects, mlflow) == {9000, 5432}
    assert _ports(objects, webhook) == {9000, 5000, 8081, 443, 6443}


def test_ports_follow_the_addresses() -> None:
    objects = render({"mlflow.enabled": False, "mlflow.url": "https://mlflow.example.org", "kserve.enabled": False})
    assert _ports(objects, STEP) == {443}
    objects = render({"mlflow.enabled": False, "mlflow.url": "http://mlflow.example.org:5001/base"})
    assert _ports(objects, STEP) == {443, 5001}


def test_only_its_clients_reach_mlflow_and_the_receiver() -> None:
    extra = {"namespaceSelector": {"matchLabels": {"name": "ingress"}}}
    objects = render({"networkPolicy.mlflowFrom": [extra]})
    [mlflow] = pick(objects, "NetworkPolicy", "slipstream-mlflow")["spec"]["ingress"]
    components = [p["podSelector"]["matchLabels"]["app.kubernetes.io/component"] for p in mlflow["from"][:2]]
    assert components == ["step", "webhook"] and mlflow["from"][2:] == [extra]
    [webhook] = pick(objects, "NetworkPolicy", "slipstream-webhook")["spec"]["ingress"]
    assert [p["podSelector"]["matchLabels"]["app.kubernetes.io/component"] for p in webhook["from"]] == ["mlflow"]


def test_an_empty_list_of_peers_does_not_mean_everybody() -> None:
    """A NetworkPolicy rule with an empty `from` allows all: without a peer there must be no rule."""
    for values, objects in matrix():
        for policy in (o["spec"] for o in objects if o["kind"] == "NetworkPolicy"):
            for rule in policy.get("ingress") or []:
                assert rule.get("from"), values


def test_training_pods_reach_one_another() -> None:
    peer = {"podSelector": {"matchLabels": {k: v for k, v in STEP.items() if k != "slipstream/step"}}}
    on, off = (
        pick(render({"trainer.enabled": value}), "NetworkPolicy", "slipstream-step")["spec"] for value in (True, False)
    )
    assert on["ingress"] == [{"from": [peer]}] and {"to": [peer]} in on["egress"]
    assert "ingress" not in off
