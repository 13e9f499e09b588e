"""Steps as pods of a cluster, by Airflow's KubernetesPodOperator: durable, so that a task that is tried again after
its worker died finds its pod again; its log is streamed; it is deleted after success and kept for a while after
failure. Documents travel through the store (SLIPSTREAM_RUNS), since a pod shares no folder with Airflow.
"""

import os
from datetime import UTC, datetime, timedelta
from typing import Any

from airflow.providers.cncf.kubernetes.operators.pod import KubernetesPodOperator
from airflow.providers.cncf.kubernetes.utils.pod_manager import PodLaunchFailedException
from airflow.sdk.exceptions import AirflowException, AirflowFailException
from kubernetes.client import ApiException, CoreV1Api
from kubernetes.client import models as k8s

from runtimes.base import Job, raise_for
from slipstream.spec import Resources
from slipstream.spec.fields import in_bytes

HOME, CODE = "/var/lib/slipstream", "/opt/slipstream/code"
"""Where the images keep what they write, and the user's code."""
LABELS = {"app.kubernetes.io/name": "slipstream", "app.kubernetes.io/component": "step"}
RELEASE_STEPS = ("trial", "rollout", "rollback")
"""Steps that move traffic, and so may talk to the cluster."""
ANY_USER = 10001
"""User and group of the images."""


def runtime() -> "Kubernetes":
    """This runtime."""
    return Kubernetes()


class Kubernetes:
    """Implements `Runtime` (base.py)."""

    def __init__(self) -> None:
        self._operator: KubernetesPodOperator | None = None

    def run(self, job: Job, context: Any) -> None:
        """See Runtime."""
        require_store(job)
        operator = self._operator = KubernetesPodOperator(task_id=job.step, **arguments(job))
        try:
            sweep(operator.client, job)
            operator.execute(context)
        except PodLaunchFailedException as error:
            raise AirflowException(f"step {job.step}: its pod did not start: {error}") from error
        except ApiException as error:
            raise AirflowException(f"step {job.step}: Kubernetes: {error.status} {error.reason}") from error
        except AirflowException:
            if operator.remote_pod is not None:
                explain(job, operator.remote_pod)
            raise

    def stop(self) -> None:
        """See Runtime."""
        if self._operator is not None:
            self._operator.on_kill()


def require_store(job: Job) -> None:
    """Raise AirflowFailException unless the run's documents lie where a pod can reach them."""
    if not job.spec_uri.startswith("s3://"):
        raise AirflowFailException(
            f"{job.spec_uri}: a pod cannot read this; set SLIPSTREAM_RUNS to a prefix in the store, such as "
            "s3://bucket/runs, for Airflow"
        )


def arguments(job: Job) -> dict[str, Any]:
    """Arguments of the KubernetesPodOperator for a step."""
    settings, resources = job.settings.kubernetes, job.resources
    volumes, mounts = _volumes(job)
    return {
        "name": f"slipstream-{job.step}",
        "config_file": os.environ.get("KUBECONFIG"),  # without one: the cluster that Airflow itself runs in
        "namespace": settings.namespace,
        "image": job.image,
        "image_pull_policy": settings.pull_policy,
        "image_pull_secrets": [k8s.V1LocalObjectReference(name=n) for n in settings.pull_secrets],
        "arguments": job.arguments,
        "env_vars": environment(job),
        "env_from": sources(job),
        "labels": LABELS | {"slipstream/step": job.step},
        "annotations": {"slipstream/run": job.inputs.run_key, "slipstream/cell": job.name},
        "service_account_name": account(job),
        "automount_service_account_token": job.step in RELEASE_STEPS,
        "container_resources": requirements(resources),
        "node_selector": resources.node_selector or {},
        "tolerations": [k8s.V1Toleration(**t.model_dump()) for t in resources.tolerations or ()],
        "volumes": volumes,
        "volume_mounts": mounts,
        "security_context": k8s.V1PodSecurityContext(
            run_as_non_root=True,
            run_as_user=ANY_USER,
            run_as_group=ANY_USER,
            fs_group=ANY_USER,
            seccomp_profile=k8s.V1SeccompProfile(type="RuntimeDefault"),
        ),
        "container_security_context": k8s.V1SecurityContext(
            allow_privilege_escalation=False,
            read_only_root_filesystem=True,
            capabilities=k8s.V1Capabilities(drop=["ALL"]),
        ),
        "hostnetwork": settings.host_network,
        "get_logs": True,
        "container_name_log_prefix_enabled": False,
        "durable": True,
        "deferrable": False,
        "on_finish_action": "delete_succeeded_pod",
        "startup_timeout_seconds": settings.start_timeout_s,
        "termination_message_policy": "FallbackToLogsOnError",
        "log_pod_spec_on_failure": False,
        "log_events_on_failure": True,
        "do_xcom_push": False,
    }


def account(job: Job) -> str:
    """The step's service account."""
    settings = job.settings.kubernetes
    return settings.release_service_account if job.step in RELEASE_STEPS else settings.service_account


def environment(job: Job) -> dict[str, str]:
    """What is not a secret and not the same for all."""
    return {
        "SLIPSTREAM_HOME": HOME,
        "SLIPSTREAM_CODE": CODE,
        "SLIPSTREAM_TRAFFIC": "kserve",
        "PYTHONUNBUFFERED": "1",
    } | job.settings.environment


def sources(job: Job) -> list[k8s.V1EnvFromSource]:
    """ConfigMaps and Secrets that become environment variables; secrets thus appear in no pod specification."""
    settings = job.settings.kubernetes
    return [
        *(k8s.V1EnvFromSource(config_map_ref=k8s.V1ConfigMapEnvSource(name=n)) for n in settings.env_from_config_maps),
        *(k8s.V1EnvFromSource(secret_ref=k8s.V1SecretEnvSource(name=n)) for n in settings.env_from_secrets),
    ]


def requirements(resources: Resources) -> k8s.V1ResourceRequirements:
    """Processors are reserved and not capped, since throttling would falsify measurements; memory is both."""
    requests: dict[str, str] = {}
    limits: dict[str, str] = {}
    if resources.cpu is not None:
        requests["cpu"] = f"{round(resources.cpu * 1000)}m"
    if resources.memory is not None:
        requests["memory"] = limits["memory"] = str(in_bytes(resources.memory))
    if resources.gpu:
        limits["nvidia.com/gpu"] = str(resources.gpu)
    return k8s.V1ResourceRequirements(requests=requests, limits=limits)


def _volumes(job: Job) -> tuple[list[k8s.V1Volume], list[k8s.V1VolumeMount]]:
    settings = job.settings.kubernetes
    claim = settings.cache_claim and k8s.V1PersistentVolumeClaimVolumeSource(claim_name=settings.cache_claim)
    folder = None if claim else k8s.V1EmptyDirVolumeSource()
    volumes = [
        k8s.V1Volume(name="home", empty_dir=folder, persistent_volume_claim=claim),
        k8s.V1Volume(name="tmp", empty_dir=k8s.V1EmptyDirVolumeSource()),
    ]
    mounts = [k8s.V1VolumeMount(name="home", mount_path=HOME), k8s.V1VolumeMount(name="tmp", mount_path="/tmp")]  # noqa: S108
    if settings.code_config_map:
        source = k8s.V1ConfigMapVolumeSource(name=settings.code_config_map)
        volumes.append(k8s.V1Volume(name="code", config_map=source))
        mounts.append(k8s.V1VolumeMount(name="code", mount_path=CODE, read_only=True))
    return volumes, mounts


def explain(job: Job, pod: k8s.V1Pod) -> None:
    """Raise what the step's container says of its end; nothing when it does not say (evicted, never started)."""
    statuses = pod.status.container_statuses or []
    ended = next((s.state.terminated for s in statuses if s.name == "base" and s.state.terminated), None)
    if ended is not None:
        lines = (ended.message or "").splitlines()
        raise_for(job, ended.exit_code, lines, out_of_memory=ended.reason == "OOMKilled")
    if pod.status.reason == "Evicted":
        raise AirflowException(f"step {job.step}: its pod was evicted: {pod.status.message}")


def sweep(client: CoreV1Api, job: Job) -> None:
    """Delete failed step pods that have been kept long enough: Kubernetes itself keeps bare pods for ever."""
    settings = job.settings.kubernetes
    selector = ",".join(f"{k}={v}" for k, v in LABELS.items())
    oldest = datetime.now(UTC) - timedelta(hours=settings.keep_failed_hours)
    found = client.list_namespaced_pod(
        settings.namespace, label_selector=selector, field_selector="status.phase=Failed"
    ).items
    for pod in found:
        ends = [s.state.terminated.finished_at for s in pod.status.container_statuses or [] if s.state.terminated]
        if max(ends, default=pod.metadata.creation_timestamp) < oldest:
            client.delete_namespaced_pod(pod.metadata.name, settings.namespace)
