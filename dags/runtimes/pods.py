"""The pod of a step: command, resources, writable volumes, and how its end is interpreted."""

import os

from airflow.sdk.exceptions import AirflowException
from kubernetes.client import models as k8s

from runtimes import trainjob
from runtimes.base import Job, raise_for
from slipstream.plugins import STEPS

CONFIGURATION = os.environ.get("KUBECONFIG")
"""Cluster configuration; by default, the cluster that Airflow itself runs in."""
HOME, CODE = "/var/lib/slipstream", "/opt/slipstream/code"
"""Where the images store their data, and the user's code."""
SETTINGS = "/etc/slipstream/settings"
"""Where the settings are mounted."""
LABELS = {"app.kubernetes.io/name": "slipstream", "app.kubernetes.io/component": "step"}
ANY_USER = 10001
"""User and group of the images."""


def arguments(job: Job) -> dict[str, object]:
    """Return the arguments of the KubernetesPodOperator for a step."""
    settings, resources = job.settings.kubernetes, job.resources
    folders, mounts = volumes(job)
    return {
        "name": f"slipstream-{job.step}",
        "config_file": CONFIGURATION,
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
        "automount_service_account_token": STEPS[job.step].moves_traffic,
        "container_resources": k8s.V1ResourceRequirements(**trainjob.requirements(resources)),
        "node_selector": resources.node_selector or {},
        "tolerations": [k8s.V1Toleration(**t.model_dump()) for t in resources.tolerations or ()],
        "volumes": folders,
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
        # Variables for every service of the namespace would be noise, and some look like ours.
        "pod_template_dict": {"spec": {"enableServiceLinks": False, "containers": [{"name": "base"}]}},
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
    """Return the step's service account."""
    settings = job.settings.kubernetes
    return settings.release_service_account if STEPS[job.step].moves_traffic else settings.service_account


def environment(job: Job) -> dict[str, str]:
    """Return the variables that come from neither Secrets nor ConfigMaps."""
    return {
        "SLIPSTREAM_HOME": HOME,
        "SLIPSTREAM_CODE": CODE,
        "SLIPSTREAM_SETTINGS": f"{SETTINGS}/settings.yaml",
        "SLIPSTREAM_TRAFFIC": "kserve",
        "PYTHONUNBUFFERED": "1",
    } | job.settings.environment


def sources(job: Job) -> list[k8s.V1EnvFromSource]:
    """Return the ConfigMaps and Secrets that become environment variables, so no secret appears in a pod
    specification."""
    settings = job.settings.kubernetes
    return [
        *(k8s.V1EnvFromSource(config_map_ref=k8s.V1ConfigMapEnvSource(name=n)) for n in settings.env_from_config_maps),
        *(k8s.V1EnvFromSource(secret_ref=k8s.V1SecretEnvSource(name=n)) for n in settings.env_from_secrets),
    ]


def volumes(job: Job) -> tuple[list[k8s.V1Volume], list[k8s.V1VolumeMount]]:
    """Return the volumes that a step may write to, and the user's code."""
    settings = job.settings.kubernetes
    claim = settings.cache_claim and k8s.V1PersistentVolumeClaimVolumeSource(claim_name=settings.cache_claim)
    folder = None if claim else k8s.V1EmptyDirVolumeSource()
    pod_volumes = [
        k8s.V1Volume(name="home", empty_dir=folder, persistent_volume_claim=claim),
        k8s.V1Volume(name="tmp", empty_dir=k8s.V1EmptyDirVolumeSource()),
    ]
    mounts = [k8s.V1VolumeMount(name="home", mount_path=HOME), k8s.V1VolumeMount(name="tmp", mount_path="/tmp")]  # noqa: S108
    if settings.code_config_map:
        source = k8s.V1ConfigMapVolumeSource(name=settings.code_config_map)
        pod_volumes.append(k8s.V1Volume(name="code", config_map=source))
        mounts.append(k8s.V1VolumeMount(name="code", mount_path=CODE, read_only=True))
    if settings.settings_config_map and STEPS[job.step].moves_traffic:
        source = k8s.V1ConfigMapVolumeSource(name=settings.settings_config_map)
        pod_volumes.append(k8s.V1Volume(name="settings", config_map=source))
        mounts.append(k8s.V1VolumeMount(name="settings", mount_path=SETTINGS, read_only=True))
    return pod_volumes, mounts


def explain(job: Job, pod: k8s.V1Pod, container: str = "base") -> None:
    """Raise the error that the step's container reports; nothing if it reports none (evicted, never started)."""
    statuses = pod.status.container_statuses or []
    ended = next((s.state.terminated for s in statuses if s.name == container and s.state.terminated), None)
    if ended is not None:
        lines = (ended.message or "").splitlines()
        raise_for(job, ended.exit_code, lines, out_of_memory=ended.reason == "OOMKilled")
    if pod.status.reason == "Evicted":
        raise AirflowException(f"step {job.step}: its pod was evicted: {pod.status.message}")
