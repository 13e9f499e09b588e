"""Manifests for a step that trains in several pods: Kubeflow Trainer v2 (API trainer.kubeflow.org/v1alpha1 as of 2.2).

A TrainJob specifies what to run in how many pods; the TrainingRuntime that it refers to specifies the pods. Trainer
turns both into a JobSet, with PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR and PET_MASTER_PORT in each pod, from which
the step's own command finds its group (slipstream/frameworks/launched.py): torchrun is not used, since its exit code is
always 1.

Two runtimes can be referred to. Trainer's own `torch-distributed` restarts a failed pod separately, up to six times,
while the others are gone; and it cannot take variables from whole ConfigMaps and Secrets. `training_runtime` creates
one that ends all pods when one fails, so that Airflow retries, and supports such variables.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from slipstream.contract import Json
from slipstream.errors import SpecError
from slipstream.spec import Resources
from slipstream.spec.fields import in_bytes

API = "trainer.kubeflow.org/v1alpha1"
MANAGER = "slipstream"
"""Manager of the runtime's patches; Kueue and others have separate entries."""
NODE = "node"
"""Name of the job and of its container in a training runtime, as Trainer's plug-in for PyTorch expects it."""
LONGEST = 40
"""Maximum length of a name: Trainer, JobSet and Job append to it, and the pods' host names end at 63."""
RESERVED = ("PET_NNODES", "PET_NPROC_PER_NODE", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT")

Manifest = Json
Variable = str | Mapping[str, object]
"""A value, or a `valueFrom` such as {"secretKeyRef": {"name": "store", "key": "password"}}."""


@dataclass(frozen=True)
class Reference:
    """The runtime that a TrainJob refers to."""

    name: str = "torch-distributed"
    kind: str = "ClusterTrainingRuntime"


@dataclass(frozen=True)
class Pod:
    """Settings of the pods in addition to image, command and resources."""

    service_account: str | None = None
    pull_secrets: Sequence[str] = ()
    volumes: Sequence[Mapping[str, object]] = ()
    mounts: Sequence[Mapping[str, object]] = ()
    """Mount paths of the volumes. A claim must be ReadWriteMany, or pods on other nodes never start."""
    user: int = 10001
    """User and group of the images."""


def train_job(
    *,
    name: str,
    namespace: str,
    image: str,
    command: Sequence[str],
    environment: Mapping[str, Variable],
    resources: Resources,
    workers: int,
    labels: Mapping[str, str],
    runtime: Reference = Reference(),
    pod: Pod = Pod(),
) -> Manifest:
    """Return a TrainJob of `workers` pods that all run `command`, each with `resources`. Raise SpecError.

    Its condition `Complete` or `Failed` is the outcome; the exit code that counts is that of the pod with the
    annotation batch.kubernetes.io/job-completion-index 0, process 0 of the group.
    """
    _check(name, workers, environment)
    return {
        "apiVersion": API,
        "kind": "TrainJob",
        "metadata": {"name": name, "namespace": namespace, "labels": dict(labels)},
        "spec": {
            "runtimeRef": {"apiGroup": API.partition("/")[0], "kind": runtime.kind, "name": runtime.name},
            "trainer": {
                "image": image,
                "command": list(command),
                "env": [_variable(k, v) for k, v in sorted(environment.items())],
                "numNodes": workers,
                "numProcPerNode": 1,  # by default it is the number of GPUs, or of processors
                "resourcesPerNode": requirements(resources),
            },
            "runtimePatches": [_patch(labels, resources, pod)],
        },
    }


def training_runtime(
    name: str,
    namespace: str,
    image: str,
    labels: Mapping[str, str],
    *,
    config_maps: Sequence[str] = (),
    secrets: Sequence[str] = (),
) -> Manifest:
    """Return a TrainingRuntime for slipstream's training steps; install it once, for example with the chart.

    `config_maps` and `secrets` become environment variables, so no TrainJob contains a secret.
    """
    container: Manifest = {
        "name": NODE,
        "image": image,
        "envFrom": [
            *({"configMapRef": {"name": n}} for n in config_maps),
            *({"secretRef": {"name": n}} for n in secrets),
        ],
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }
    job: Manifest = {
        "name": NODE,
        "template": {
            "metadata": {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}},
            "spec": {
                "backoffLimit": 0,
                "template": {"spec": {"restartPolicy": "Never", "containers": [container]}},
            },
        },
    }
    return {
        "apiVersion": API,
        "kind": "TrainingRuntime",
        "metadata": {"name": name, "namespace": namespace, "labels": dict(labels)},
        "spec": {
            "mlPolicy": {"numNodes": 1, "torch": {}},
            "template": {"spec": {"failurePolicy": {"maxRestarts": 0}, "replicatedJobs": [job]}},
        },
    }


def requirements(resources: Resources) -> Manifest:
    """Return requests and limits: memory is both, GPUs are a limit.

    Processors are reserved but not capped, since throttling would distort measurements.
    """
    requests: dict[str, str] = {}
    limits: dict[str, str] = {}
    if resources.cpu is not None:
        requests["cpu"] = f"{round(resources.cpu * 1000)}m"
    if resources.memory is not None:
        requests["memory"] = limits["memory"] = str(in_bytes(resources.memory))
    if resources.gpu:
        limits["nvidia.com/gpu"] = str(resources.gpu)
    return {key: value for key, value in (("requests", requests), ("limits", limits)) if value}


def _check(name: str, workers: int, environment: Mapping[str, Variable]) -> None:
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) or len(name) > LONGEST:
        raise SpecError(
            f"{name!r} is no name for a TrainJob: lower-case letters, digits and hyphens, a letter first, at most "
            f"{LONGEST} of them"
        )
    if workers < 2:
        raise SpecError(f"training.workers is {workers}; a TrainJob is for two or more, one is a pod of its own")
    if reserved := sorted(set(environment) & set(RESERVED)):
        raise SpecError(
            f"environment: Kubeflow Trainer sets {', '.join(reserved)} itself; leave it out of the settings"
        )


def _variable(name: str, value: Variable) -> Manifest:
    return {"name": name, "value": value} if isinstance(value, str) else {"name": name, "valueFrom": dict(value)}


def _patch(labels: Mapping[str, str], resources: Resources, pod: Pod) -> Manifest:
    """Return the runtime's additions to the pods. They meet the restricted pod security standard."""
    spec: Manifest = {
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": pod.user,
            "runAsGroup": pod.user,
            "fsGroup": pod.user,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [
            {
                "name": NODE,
                "volumeMounts": [dict(m) for m in pod.mounts],
                "securityContext": {
                    "allowPrivilegeEscalation": False,
                    "readOnlyRootFilesystem": True,
                    "capabilities": {"drop": ["ALL"]},
                },
            }
        ],
        "volumes": [dict(v) for v in pod.volumes],
    }
    if pod.service_account:
        spec["serviceAccountName"] = pod.service_account
    if pod.pull_secrets:
        spec["imagePullSecrets"] = [{"name": n} for n in pod.pull_secrets]
    if resources.node_selector:
        spec["nodeSelector"] = dict(resources.node_selector)
    if resources.tolerations:
        spec["tolerations"] = [t.model_dump(exclude_none=True) for t in resources.tolerations]
    template = {"metadata": {"labels": dict(labels)}, "spec": spec}
    job = {"name": NODE, "template": {"spec": {"template": template}}}
    return {"manager": MANAGER, "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [job]}}}}
