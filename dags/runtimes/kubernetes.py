"""Steps as pods of a cluster, through Airflow's durable KubernetesPodOperator: a task that is retried after its worker
died finds its pod again; its log is streamed; the pod is deleted after success and kept for a while after failure.
Documents are exchanged through the store (SLIPSTREAM_RUNS), since a pod shares no folder with Airflow."""

from datetime import UTC, datetime, timedelta

from airflow.providers.cncf.kubernetes.hooks.kubernetes import KubernetesHook
from airflow.providers.cncf.kubernetes.operators.pod import KubernetesPodOperator
from airflow.providers.cncf.kubernetes.utils.pod_manager import PodLaunchFailedException
from airflow.sdk import Context
from airflow.sdk.exceptions import AirflowException, AirflowFailException
from kubernetes.client import ApiException, CoreV1Api

from runtimes import pods
from runtimes.base import Job
from runtimes.training import TrainJob
from slipstream.plugins import RETRAIN, STEPS


def runtime() -> "Kubernetes":
    """Return this runtime."""
    return Kubernetes()


class Kubernetes:
    """Implements `Runtime` (base.py)."""

    def __init__(self) -> None:
        self._operator: KubernetesPodOperator | None = None
        self._train_job: TrainJob | None = None

    def run(self, job: Job, context: Context) -> None:
        """See Runtime."""
        require_store(job)
        if trains_together(job):
            self._train(job, context)
            return
        operator = self._operator = KubernetesPodOperator(task_id=job.step, **pods.arguments(job))
        try:
            sweep(operator.client, job)
            operator.execute(context)
        except PodLaunchFailedException as error:
            raise AirflowException(f"step {job.step}: its pod did not start: {error}") from error
        except ApiException as error:
            raise AirflowException(f"step {job.step}: Kubernetes: {error.status} {error.reason}") from error
        except AirflowException:
            if operator.remote_pod is not None:
                pods.explain(job, operator.remote_pod)
            raise

    def _train(self, job: Job, context: Context) -> None:
        hook = KubernetesHook(conn_id=None, config_file=pods.CONFIGURATION)
        self._train_job = TrainJob(hook.api_client, job, context)
        try:
            self._train_job.run()
        except ApiException as error:
            raise AirflowException(f"step {job.step}: Kubernetes: {error.status} {error.reason}") from error

    def stop(self) -> None:
        """See Runtime."""
        if self._train_job is not None:
            self._train_job.delete()
        if self._operator is not None:
            self._operator.on_kill()


def trains_together(job: Job) -> bool:
    """Return whether the step trains and the spec wants more than one process for that."""
    if job.spec.training.workers == 1 or not STEPS[job.step].trains:
        return False
    return job.step != RETRAIN or (job.spec.model.train is not None and not job.inputs.params.get("source_version"))


def require_store(job: Job) -> None:
    """Raise AirflowFailException unless the run's documents are where a pod can reach them."""
    if not job.spec_uri.startswith("s3://"):
        raise AirflowFailException(
            f"{job.spec_uri}: a pod cannot read this; set SLIPSTREAM_RUNS to a prefix in the store, such as "
            "s3://bucket/runs, for Airflow"
        )


def sweep(client: CoreV1Api, job: Job) -> None:
    """Delete failed step pods after their retention time; Kubernetes itself keeps bare pods forever."""
    settings = job.settings.kubernetes
    selector = ",".join(f"{k}={v}" for k, v in pods.LABELS.items())
    oldest = datetime.now(UTC) - timedelta(hours=settings.keep_failed_hours)
    failed_pods = client.list_namespaced_pod(
        settings.namespace, label_selector=selector, field_selector="status.phase=Failed"
    ).items
    for pod in failed_pods:
        ends = [s.state.terminated.finished_at for s in pod.status.container_statuses or [] if s.state.terminated]
        if max(ends, default=pod.metadata.creation_timestamp) < oldest:
            client.delete_namespaced_pod(pod.metadata.name, settings.namespace)
