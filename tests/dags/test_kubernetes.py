"""The pod that a step becomes, and what is made of its end. Pods in a real cluster: `make test-k8s`."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slipstream import spec, storage
from slipstream.contract import Cell, StepInput
from slipstream.home import Home
from slipstream.plan.settings import Settings

ROOT = Path(__file__).parents[2]

if sys.prefix == str(ROOT / ".envs/airflow"):
    from kubernetes.client import ApiClient
    from kubernetes.client import models as k8s

SETTINGS = {
    "image": "registry/{environment}:1",
    "environment": {"HTTPS_PROXY": "http://proxy:3128"},
    "resources": {
        "default": {"cpu": 0.5, "memory": "1Gi"},
        "distill": {"gpu": 1, "node_selector": {"pool": "gpu"}, "tolerations": [{"key": "gpu", "operator": "Exists"}]},
    },
    "kubernetes": {
        "namespace": "models",
        "env_from_config_maps": ["slipstream-environment"],
        "env_from_secrets": ["store"],
        "cache_claim": "cache",
        "code_config_map": "code",
        "settings_config_map": "settings",
    },
}


@pytest.fixture
def job(home: Path, airflow_home: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    from runtimes.base import Job

    # The operator reads a configuration even to describe a pod; nothing is asked of this address.
    configuration = home / "kubeconfig"
    cluster = {"name": "c", "cluster": {"server": "http://127.0.0.1:9"}}
    context = {"name": "c", "context": {"cluster": "c", "user": "u"}}
    user = {"name": "u", "user": {}}
    configuration.write_text(
        json.dumps({"clusters": [cluster], "contexts": [context], "users": [user], "current-context": "c"})
    )
    monkeypatch.setenv("KUBECONFIG", str(configuration))

    def make(step: str, cell: Cell | None = None, uri: str = "s3://b/runs/fashion/r/spec.yaml", **changes: Any) -> Job:
        made = Job(
            step,
            uri,
            StepInput(run_key="r", cell=cell),
            Settings.model_validate(SETTINGS | changes),
            Home.from_environment(),
        )
        made.__dict__["spec"] = spec.load(ROOT / "examples/fashion.yaml")  # what `spec` would read from S3
        return made

    return make


def manifest(job: Any) -> dict[str, Any]:
    """The pod as it goes to the API server."""
    from airflow.providers.cncf.kubernetes.operators.pod import KubernetesPodOperator

    from runtimes.pods import arguments

    context = {
        "ti": SimpleNamespace(dag_id="optimize-fashion", task_id=job.step, map_index=-1, try_number=1),
        "run_id": "r",
        "dag": SimpleNamespace(parent_dag=None),
        "task": None,
    }
    pod = KubernetesPodOperator(task_id=job.step, **arguments(job)).build_pod_request_obj(context)
    return dict(ApiClient().sanitize_for_serialization(pod))


def test_the_command_is_the_one_of_every_runtime(job: Any) -> None:
    [container] = manifest(job("build", Cell(recipe="int8", target="server")))["spec"]["containers"]
    folder = "s3://b/runs/fashion/r"
    assert container["args"] == [
        "step",
        "build",
        f"--spec={folder}/spec.yaml",
        f"--inputs={folder}/build-int8@server.in.json",
        f"--outputs={folder}/build-int8@server.out.json",
    ]
    assert container["image"] == "registry/torch:1"
    assert "command" not in container or not container["command"]


LATE = SimpleNamespace(reason="Unschedulable", status="False", message="0/3 nodes have nvidia.com/gpu")
WAITING = SimpleNamespace(phase="Pending", conditions=[LATE], container_statuses=None)


@pytest.mark.parametrize(
    ("found", "leader", "says"),
    [
        ({}, SimpleNamespace(status=WAITING), "did not start within 0 s: Unschedulable: 0/3 nodes have nvidia.com/gpu"),
        ({}, None, "is Kubeflow Trainer running"),
        (None, None, "was deleted by somebody"),
    ],
    ids=["no node", "no pod", "deleted"],
)
def test_a_train_job_that_does_not_start_ends_its_task(
    job: Any, monkeypatch: pytest.MonkeyPatch, found: Any, leader: Any, says: str
) -> None:
    from airflow.sdk.exceptions import AirflowException

    from runtimes.training import TrainJob

    given = job("distill")
    hasty = given.settings.kubernetes.model_copy(update={"start_timeout_s": 0})
    given = replace(given, settings=given.settings.model_copy(update={"kubernetes": hasty}))
    made, deleted = TrainJob(ApiClient(), given, {"ti": SimpleNamespace(dag_id="d")}), []
    for name in ("_sweep", "_create"):
        monkeypatch.setattr(made, name, lambda: None)
    monkeypatch.setattr(made, "_read", lambda: found)
    monkeypatch.setattr(made, "_leader", lambda: leader)
    monkeypatch.setattr(made, "delete", lambda: deleted.append(made.name))
    with pytest.raises(AirflowException, match=re.escape(says)):
        made.run()
    assert len(deleted) == (found is not None)


def test_a_pod_passes_the_restricted_profile(job: Any) -> None:
    pod = manifest(job("distill"))["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not pod.get("hostNetwork")
    assert {kind for v in pod["volumes"] for kind in v if kind != "name"} <= {
        "emptyDir", "persistentVolumeClaim", "configMap",
    }  # fmt: skip
    for container in pod["containers"]:
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["readOnlyRootFilesystem"] is True
        assert context["capabilities"] == {"drop": ["ALL"]}


def test_resources_and_places_come_from_settings_and_spec(job: Any) -> None:
    pod = manifest(job("distill"))["spec"]
    resources = pod["containers"][0]["resources"]
    assert resources["requests"] == {"cpu": "500m", "memory": str(2**30)}
    assert resources["limits"] == {"memory": str(2**30), "nvidia.com/gpu": "1"}
    assert pod["nodeSelector"] == {"pool": "gpu"}
    assert {"key": "gpu", "operator": "Exists"} in pod["tolerations"]


def test_secrets_are_named_and_never_spelt_out(job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "do-not-show")
    made = manifest(job("retrain"))
    [container] = made["spec"]["containers"]
    assert {"secretRef": {"name": "store"}} in container["envFrom"]
    assert {"configMapRef": {"name": "slipstream-environment"}} in container["envFrom"]
    assert {"name": "HTTPS_PROXY", "value": "http://proxy:3128"} in container["env"]
    assert "do-not-show" not in str(made)


def test_only_steps_that_move_traffic_may_talk_to_the_cluster(job: Any) -> None:
    compute, release = manifest(job("retrain"))["spec"], manifest(job("rollout"))["spec"]
    assert (compute["serviceAccountName"], compute["automountServiceAccountToken"]) == ("slipstream-step", False)
    assert [v["name"] for v in release["volumes"]] == ["home", "tmp", "code", "settings"]
    assert compute["enableServiceLinks"] is False
    assert (release["serviceAccountName"], release["automountServiceAccountToken"]) == ("slipstream-release", True)


def test_documents_on_a_disk_are_out_of_reach(job: Any, tmp_path: Path) -> None:
    from airflow.sdk.exceptions import AirflowFailException

    from runtimes.kubernetes import require_store

    with pytest.raises(AirflowFailException, match="SLIPSTREAM_RUNS"):
        require_store(job("check", uri=storage.join(str(tmp_path), "spec.yaml")))


def ended(code: int, reason: str = "Error", message: str = "") -> Any:
    state = k8s.V1ContainerState(
        terminated=k8s.V1ContainerStateTerminated(exit_code=code, reason=reason, message=message)
    )
    status = k8s.V1ContainerStatus(image="i", image_id="i", name="base", ready=False, restart_count=0, state=state)
    return k8s.V1Pod(status=k8s.V1PodStatus(phase="Failed", container_statuses=[status]))


@pytest.mark.parametrize(
    ("pod", "final", "says"),
    [
        (lambda: ended(3, message="noise\nGate failed: too slow\n  by far"), True, "^Gate failed: too slow\n  by far$"),
        (lambda: ended(2, message="Bad data: no labels"), True, "^Bad data: no labels$"),
        (lambda: ended(1, message="boom"), False, "ended with exit code 1: boom"),
        (lambda: ended(137, "OOMKilled"), True, r"more than its memory limit \(1Gi\)"),
        (
            lambda: k8s.V1Pod(status=k8s.V1PodStatus(phase="Failed", reason="Evicted", message="disk")),
            False,
            "evicted: disk",
        ),
    ],
)
def test_the_end_of_a_pod_decides_about_retries(job: Any, pod: Any, final: bool, says: str) -> None:
    from airflow.sdk.exceptions import AirflowException, AirflowFailException

    from runtimes.pods import explain

    with pytest.raises(AirflowException, match=says) as raised:
        explain(job("validate"), pod())
    assert isinstance(raised.value, AirflowFailException) is final
