"""The rights in the cluster are exactly the calls in the code: each call has its rule, each rule its call."""

import re
from dataclasses import dataclass
from functools import cache

import pytest

from .chart import ROOT, Json, matrix, names, render

RUNTIME = "dags/runtimes"
KSERVE = "tasks/slipstream/traffic/kserve_api.py"
OPERATOR = "operators/pod.py"
POD_MANAGER = "utils/pod_manager.py"
HOOK = "hooks/kubernetes.py"
PROVIDER = "airflow/providers/cncf/kubernetes"
"""Airflow's provider for Kubernetes, whose operator the runtime uses."""


@dataclass(frozen=True)
class Call:
    """A call to the Kubernetes API."""

    account: str
    source: str
    text: str
    """What the source contains."""
    group: str
    resource: str
    verb: str
    switch: str | None = None
    """Value that brings the rule; none for what is always there."""

    @property
    def rule(self) -> tuple[str, str, str, str]:
        """Who may do what with what."""
        return (self.account, self.group, self.resource, self.verb)


AIRFLOW, RELEASE, WEBHOOK = "slipstream-airflow", "slipstream-release", "slipstream-webhook"
INFERENCE = ("serving.kserve.io", "inferenceservices")
TRAINING = ("trainer.kubeflow.org", "trainjobs")
TABLE = (
    Call(AIRFLOW, POD_MANAGER, "_client.create_namespaced_pod(", "", "pods", "create"),
    Call(AIRFLOW, POD_MANAGER, "_client.read_namespaced_pod(", "", "pods", "get"),
    Call(AIRFLOW, HOOK, "core_v1_client.read_namespaced_pod(", "", "pods", "get"),
    Call(AIRFLOW, OPERATOR, "client.list_namespaced_pod(", "", "pods", "list"),
    Call(AIRFLOW, RUNTIME, "client.list_namespaced_pod(", "", "pods", "list"),
    Call(AIRFLOW, OPERATOR, "client.patch_namespaced_pod(", "", "pods", "patch"),
    Call(AIRFLOW, OPERATOR, "client.delete_namespaced_pod(", "", "pods", "delete"),
    Call(AIRFLOW, POD_MANAGER, "_client.delete_namespaced_pod(", "", "pods", "delete"),
    Call(AIRFLOW, RUNTIME, "client.delete_namespaced_pod(", "", "pods", "delete"),
    Call(AIRFLOW, POD_MANAGER, "_client.read_namespaced_pod_log(", "", "pods/log", "get"),
    Call(AIRFLOW, RUNTIME, "_core.read_namespaced_pod_log(", "", "pods/log", "get"),
    Call(AIRFLOW, POD_MANAGER, "_client.list_namespaced_event(", "", "events", "list"),
    Call(RELEASE, KSERVE, "get_namespaced_custom_object(", *INFERENCE, "get", "kserve.enabled"),
    Call(RELEASE, KSERVE, "create_namespaced_custom_object(", *INFERENCE, "create", "kserve.enabled"),
    Call(RELEASE, KSERVE, "replace_namespaced_custom_object(", *INFERENCE, "update", "kserve.enabled"),
    Call(RELEASE, KSERVE, "delete_namespaced_custom_object(", *INFERENCE, "delete", "kserve.enabled"),
    Call(RELEASE, KSERVE, "list_namespaced_pod(", "", "pods", "list", "kserve.enabled"),
    Call(RELEASE, KSERVE, "connect_get_namespaced_pod_proxy_with_path(", "", "pods/proxy", "get", "kserve.enabled"),
    # The receiver's watchdog finishes what the release steps began (release/watchdog.py), with the same calls.
    Call(WEBHOOK, KSERVE, "get_namespaced_custom_object(", *INFERENCE, "get", "kserve.enabled"),
    Call(WEBHOOK, KSERVE, "create_namespaced_custom_object(", *INFERENCE, "create", "kserve.enabled"),
    Call(WEBHOOK, KSERVE, "replace_namespaced_custom_object(", *INFERENCE, "update", "kserve.enabled"),
    Call(WEBHOOK, KSERVE, "delete_namespaced_custom_object(", *INFERENCE, "delete", "kserve.enabled"),
    Call(WEBHOOK, KSERVE, "list_namespaced_pod(", "", "pods", "list", "kserve.enabled"),
    Call(WEBHOOK, KSERVE, "connect_get_namespaced_pod_proxy_with_path(", "", "pods/proxy", "get", "kserve.enabled"),
)
TRAINER = (
    Call(AIRFLOW, RUNTIME, "create_namespaced_custom_object(", *TRAINING, "create", "trainer.enabled"),
    Call(AIRFLOW, RUNTIME, "get_namespaced_custom_object(", *TRAINING, "get", "trainer.enabled"),
    Call(AIRFLOW, RUNTIME, "list_namespaced_custom_object(", *TRAINING, "list", "trainer.enabled"),
    Call(AIRFLOW, RUNTIME, "delete_namespaced_custom_object(", *TRAINING, "delete", "trainer.enabled"),
)
UNUSED = {
    (OPERATOR, "connect_get_namespaced_pod_exec"),  # only with an Istio sidecar
    (POD_MANAGER, "connect_get_namespaced_pod_exec"),  # only with do_xcom_push
    (OPERATOR, "read_namespaced_pod_log"),  # only when deferrable
}
"""Calls of the operator that the runtime's arguments leave out; test_the_operator_is_used_so asserts that they do."""
CALL = re.compile(r"\b((?:create|read|get|list|patch|replace|delete|connect_\w+?|watch)_namespaced_\w+)")


@cache
def _source(name: str) -> str | None:
    """Text of a source file or folder; None for the provider's where it is not installed."""
    if (ROOT / name).is_dir():
        return "".join(p.read_text(encoding="utf-8") for p in sorted((ROOT / name).glob("*.py")))
    if (ROOT / name).exists():
        return (ROOT / name).read_text(encoding="utf-8")
    found = sorted((ROOT / ".envs/airflow").glob(f"lib/python3*/site-packages/{PROVIDER}/{name}"))
    return found[-1].read_text(encoding="utf-8") if found else None


def _rules(objects: list[Json]) -> set[tuple[str, str, str, str]]:
    """(account, API group, resource, verb) of all that is granted."""
    granted = set()
    for binding in (o for o in objects if o["kind"] == "RoleBinding"):
        [subject] = binding["subjects"]
        [role] = [o for o in objects if o["kind"] == "Role" and o["metadata"]["name"] == binding["roleRef"]["name"]]
        assert role["metadata"].get("namespace") == binding["metadata"].get("namespace")
        for rule in role["rules"]:
            granted |= {
                (subject["name"], group, resource, verb)
                for group in rule["apiGroups"] for resource in rule["resources"] for verb in rule["verbs"]
            }  # fmt: skip
    return granted


def test_the_rules_are_exactly_the_calls() -> None:
    defaults = {"kserve.enabled": True, "trainer.enabled": False, "webhook.enabled": True}
    for values, objects in matrix():
        on = defaults | values
        expected = {
            call.rule for call in (*TABLE, *TRAINER)
            if (call.switch is None or on[call.switch]) and (call.account != WEBHOOK or on["webhook.enabled"])
        }  # fmt: skip
        assert _rules(objects) == expected, values


@pytest.mark.parametrize("call", [*TABLE, *TRAINER], ids=lambda c: f"{c.account}-{c.source}-{c.text[:-1]}")
def test_each_rule_has_its_call(call: Call) -> None:
    source = _source(call.source)
    if source is None:
        pytest.skip("apache-airflow-providers-cncf-kubernetes is not installed in .envs/airflow")
    assert call.text in source


@pytest.mark.parametrize("source", [RUNTIME, KSERVE, OPERATOR, POD_MANAGER])
def test_each_call_has_its_rule(source: str) -> None:
    text = _source(source)
    if text is None:
        pytest.skip("apache-airflow-providers-cncf-kubernetes is not installed in .envs/airflow")
    known = {(c.source, re.sub(r".*\.|\($", "", c.text)) for c in (*TABLE, *TRAINER)} | UNUSED
    made = {(source, name) for name in CALL.findall(text)}
    assert made and made <= known


def test_the_operator_is_used_so() -> None:
    text = _source(RUNTIME)
    assert text is not None
    for argument in ('"do_xcom_push": False', '"deferrable": False'):
        assert argument in text


def test_the_module_for_kserve_says_the_same() -> None:
    """`ACCESS` there is what its errors point at."""
    text = _source(KSERVE)
    assert text is not None
    names_of = {"GROUP": INFERENCE[0], "PLURAL": INFERENCE[1]}
    block = text[text.index("ACCESS:") : text.index("TIMEOUT_S")]
    said = set()
    for group, resource, verbs in re.findall(r'\((\w+|""), (\w+|"[\w/]+"), \(([^)]*)\)\)', block):
        said |= {
            (RELEASE, names_of.get(group, group.strip('"')), names_of.get(resource, resource.strip('"')), verb)
            for verb in re.findall(r'"(\w+)"', verbs)
        }
    assert said == {c.rule for c in TABLE if c.account == RELEASE}


def test_the_receiver_only_reads() -> None:
    text = _source("tasks/slipstream/release/releases.py")
    assert text is not None
    drift = text[text.index("def drift(") :].partition("\ndef ")[0]
    assert set(re.findall(r"controller\.(\w+)\(", drift)) == {"routes", "deployed"}


def test_accounts_that_only_compute_or_store_have_no_rights() -> None:
    for _, objects in matrix():
        bound = {s["name"] for o in objects if o["kind"] == "RoleBinding" for s in o["subjects"]}
        assert not bound & {"slipstream-step", "slipstream-mlflow", "slipstream-serving"}
        assert not [kind for kind, _ in names(objects) if kind.startswith("Cluster")]


def test_rights_reach_where_the_services_are_and_the_account_is() -> None:
    objects = render({"kserve.namespace": "serving", "airflow.serviceAccount.namespace": "airflow"})
    places = {
        o["metadata"]["name"]: (o["metadata"].get("namespace"), o["subjects"][0]["namespace"])
        for o in objects if o["kind"] == "RoleBinding"
    }  # fmt: skip
    assert places == {
        "slipstream-airflow": (None, "airflow"),
        "slipstream-release": ("serving", "ml"),
        "slipstream-webhook": ("serving", "ml"),
    }


def test_a_service_account_of_the_airflow_release_can_be_used() -> None:
    objects = render({"airflow.serviceAccount.create": False, "airflow.serviceAccount.name": "airflow-scheduler"})
    assert ("ServiceAccount", "airflow-scheduler") not in names(objects)
    assert {rule[0] for rule in _rules(objects)} == {"airflow-scheduler", RELEASE, WEBHOOK}
