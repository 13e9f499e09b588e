"""Manifests of Kubeflow Trainer, checked by hand against trainjob_types.go of release 2.2."""

from typing import Any

import pytest

from slipstream.errors import SpecError
from slipstream.frameworks.launched import Place, place
from slipstream.spec import Resources, Toleration

LABELS = {"app.kubernetes.io/name": "slipstream"}
COMMAND = ["slipstream", "step", "distill", "--spec=s3://runs/spec.yaml"]
RESOURCES = Resources(
    cpu=1.5,
    memory="4Gi",
    gpu=1,
    node_selector={"pool": "gpu"},
    tolerations=(Toleration(key="nvidia.com/gpu", operator="Exists", effect="NoSchedule"),),
)


@pytest.fixture
def trainjob(airflow_home: Any) -> Any:
    from runtimes import trainjob

    return trainjob


def job(module: Any, **changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "name": "fashion-distill-1",
        "namespace": "slipstream",
        "image": "slipstream-torch:0.1.0",
        "command": COMMAND,
        "environment": {"SLIPSTREAM_HOME": "/var/lib/slipstream", "TOKEN": {"secretKeyRef": {"name": "s", "key": "k"}}},
        "resources": RESOURCES,
        "workers": 2,
        "labels": LABELS,
        **changes,
    }
    made: dict[str, Any] = module.train_job(**given)
    return made


def test_a_train_job_runs_the_steps_own_command_in_as_many_pods(trainjob: Any) -> None:
    made = job(trainjob)
    assert (made["apiVersion"], made["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert made["metadata"] == {"name": "fashion-distill-1", "namespace": "slipstream", "labels": LABELS}
    assert made["spec"]["runtimeRef"] == {
        "apiGroup": "trainer.kubeflow.org",
        "kind": "ClusterTrainingRuntime",
        "name": "torch-distributed",
    }
    assert made["spec"]["trainer"] == {
        "image": "slipstream-torch:0.1.0",
        "command": COMMAND,
        "env": [
            {"name": "SLIPSTREAM_HOME", "value": "/var/lib/slipstream"},
            {"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}},
        ],
        "numNodes": 2,
        "numProcPerNode": 1,
        "resourcesPerNode": {
            "requests": {"cpu": "1500m", "memory": str(4 * 2**30)},
            "limits": {"memory": str(4 * 2**30), "nvidia.com/gpu": "1"},
        },
    }


def test_its_pods_are_patched_by_one_manager_and_restricted(trainjob: Any) -> None:
    volume, mount = {"name": "home", "emptyDir": {}}, {"name": "home", "mountPath": "/var/lib/slipstream"}
    pod = trainjob.Pod(service_account="slipstream-step", pull_secrets=["key"], volumes=[volume], mounts=[mount])
    (patch,) = job(trainjob, pod=pod)["spec"]["runtimePatches"]
    assert patch["manager"] == "slipstream"
    (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    assert node["name"] == "node"
    template = node["template"]["spec"]["template"]
    assert template["metadata"] == {"labels": LABELS}
    spec = template["spec"]
    (container,) = spec.pop("containers")
    security = spec.pop("securityContext")
    assert spec == {
        "serviceAccountName": "slipstream-step",
        "imagePullSecrets": [{"name": "key"}],
        "volumes": [volume],
        "nodeSelector": {"pool": "gpu"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
    }
    assert security["runAsNonRoot"] and security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["volumeMounts"] == [mount]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    # Trainer refuses variables of this container in a patch: they belong to trainer.env.
    assert container.keys() == {"name", "volumeMounts", "securityContext"}


def test_what_is_not_said_is_left_out(trainjob: Any) -> None:
    made = job(trainjob, resources=Resources(), runtime=trainjob.Reference("own", "TrainingRuntime"))
    assert made["spec"]["trainer"]["resourcesPerNode"] == {}
    assert made["spec"]["runtimeRef"]["kind"] == "TrainingRuntime"
    (patch,) = made["spec"]["runtimePatches"]
    (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    spec = node["template"]["spec"]["template"]["spec"]
    assert spec.keys() == {"securityContext", "containers", "volumes"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": "Fashion"}, "no name for a TrainJob"),
        ({"name": "1st"}, "a letter first"),
        ({"name": "a" * 41}, "at most 40"),
        ({"workers": 1}, "two or more"),
        ({"environment": {"PET_NNODES": "2"}}, "sets PET_NNODES itself"),
    ],
)
def test_what_trainer_would_refuse_is_refused(trainjob: Any, change: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        job(trainjob, **change)


def test_the_runtime_ends_all_pods_when_one_fails_and_takes_whole_secrets(trainjob: Any) -> None:
    made = trainjob.training_runtime("t", "slipstream", "image", LABELS, config_maps=["environment"], secrets=["store"])
    assert (made["kind"], made["spec"]["mlPolicy"]) == ("TrainingRuntime", {"numNodes": 1, "torch": {}})
    jobset = made["spec"]["template"]["spec"]
    assert jobset["failurePolicy"] == {"maxRestarts": 0}
    (node,) = jobset["replicatedJobs"]
    assert node["template"]["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    spec = node["template"]["spec"]
    assert spec["backoffLimit"] == 0 and spec["template"]["spec"]["restartPolicy"] == "Never"
    (container,) = spec["template"]["spec"]["containers"]
    assert container["name"] == node["name"] == "node"
    assert container["envFrom"] == [{"configMapRef": {"name": "environment"}}, {"secretRef": {"name": "store"}}]


def test_the_step_understands_what_trainer_then_sets(trainjob: Any) -> None:
    """The variables as torch.go writes them for the job above."""
    spec = job(trainjob)["spec"]["trainer"]
    pod = {
        "PET_NNODES": str(spec["numNodes"]),
        "PET_NPROC_PER_NODE": str(spec["numProcPerNode"]),
        "PET_NODE_RANK": "1",
        "PET_MASTER_ADDR": "fashion-distill-1-node-0-0.fashion-distill-1",
        "PET_MASTER_PORT": "29500",
    }
    assert set(pod) == set(trainjob.RESERVED)
    assert place(pod) == Place(1, 2, pod["PET_MASTER_ADDR"], 29500)
