"""A step that trains in several pods: one TrainJob of Kubeflow Trainer, created, followed and cleaned up."""

import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import TypeVar

from airflow.sdk import Context
from airflow.sdk.exceptions import AirflowException
from kubernetes.client import ApiClient, ApiException, CoreV1Api, CustomObjectsApi, V1Pod

from runtimes import pods, trainjob
from runtimes.base import Job

log = logging.getLogger("slipstream.step")

GROUP, VERSION, PLURAL = "trainer.kubeflow.org", "v1alpha1", "trainjobs"
RUNTIME = trainjob.Reference("slipstream-training", "TrainingRuntime")
"""The runtime that the chart installs (trainjob.training_runtime)."""
SET_NAME = "jobset.sigs.k8s.io/jobset-name"
INDEX = "batch.kubernetes.io/job-completion-index"
POLL_S = 2.0

T = TypeVar("T")


class TrainJob:
    """The TrainJob of a step. Its name is the same for every attempt at a task, so that a running one is found
    again."""

    def __init__(self, client: ApiClient, job: Job, context: Context) -> None:
        self.job, self.namespace = job, job.settings.kubernetes.namespace
        self._objects, self._core = CustomObjectsApi(client), CoreV1Api(client)
        task = f"{context['ti'].dag_id} {job.inputs.run_key} {job.name}"
        self.name = f"slipstream-{job.step}-{hashlib.sha256(task.encode()).hexdigest()[:12]}"
        self._logged = 0

    def run(self) -> None:
        """Create or find the job, and follow it to its end. Raise as `Runtime.run` does."""
        self._sweep()
        self._create()
        ended = self._await_end()
        self._follow_log()
        if ended == "Complete":
            self.delete()
            return
        leader = self._leader()
        if leader is not None:
            pods.explain(self.job, leader, container=trainjob.NODE)
        raise AirflowException(f"step {self.job.step}: TrainJob {self.name} failed: {self._reason()}")

    def _await_end(self) -> str:
        """Return `Complete` or `Failed`. Raise AirflowException if the job is deleted, or does not start in time."""
        began, patience = time.monotonic(), self.job.settings.kubernetes.start_timeout_s
        while (ended := self._ended()) is None:
            if self._read() is None:
                raise AirflowException(f"step {self.job.step}: TrainJob {self.name} was deleted by somebody")
            leader = self._leader()
            waits = leader is None or leader.status.phase == "Pending"
            if waits and time.monotonic() - began > patience:
                self.delete()
                why = "; ".join(_reasons(leader)) or "the cluster does not say why"
                raise AirflowException(
                    f"step {self.job.step}: TrainJob {self.name} did not start within {patience} s: {why}"
                )
            self._follow_log()
            time.sleep(POLL_S)
        return ended

    def delete(self) -> None:
        """Remove the job with its pods, if it still exists."""
        self._delete(self.name)

    def _delete(self, name: str) -> None:
        _unless_gone(
            lambda: self._objects.delete_namespaced_custom_object(GROUP, VERSION, self.namespace, PLURAL, name)
        )

    @property
    def _address(self) -> tuple[str, str, str, str, str]:
        return (GROUP, VERSION, self.namespace, PLURAL, self.name)

    def _create(self) -> None:
        """Create the job. A running one continues; a failed one of an earlier attempt is replaced."""
        if self._ended() == "Failed":
            self.delete()
            while self._read() is not None:
                time.sleep(POLL_S)
        try:
            self._objects.create_namespaced_custom_object(GROUP, VERSION, self.namespace, PLURAL, self._manifest())
            log.info("created TrainJob %s with %d pods", self.name, self.job.spec.training.workers)
        except ApiException as error:
            if error.status != 409:
                raise
            log.info("found TrainJob %s of an earlier attempt", self.name)

    def _manifest(self) -> trainjob.Manifest:
        job, settings = self.job, self.job.settings.kubernetes
        volumes, mounts = pods.volumes(job)
        plain = ApiClient().sanitize_for_serialization
        return trainjob.train_job(
            name=self.name,
            namespace=self.namespace,
            image=job.image,
            command=["slipstream", *job.arguments],
            environment=pods.environment(job) | {"TORCH_CPP_LOG_LEVEL": "ERROR"},
            resources=job.resources,
            workers=job.spec.training.workers,
            labels=pods.LABELS | {"slipstream/step": job.step},
            runtime=RUNTIME,
            pod=trainjob.Pod(
                service_account=pods.account(job),
                pull_secrets=settings.pull_secrets,
                volumes=plain(volumes),
                mounts=plain(mounts),
            ),
        )

    def _read(self) -> trainjob.Manifest | None:
        resource = _unless_gone(lambda: self._objects.get_namespaced_custom_object(*self._address))
        return None if resource is None else dict(resource)

    def _conditions(self) -> dict[str, trainjob.Manifest]:
        entries = (self._read() or {}).get("status", {}).get("conditions", [])
        return {c["type"]: c for c in entries if c["status"] == "True"}

    def _ended(self) -> str | None:
        """Return `Complete`, `Failed`, or None if the job is running or missing."""
        return next((kind for kind in ("Complete", "Failed") if kind in self._conditions()), None)

    def _reason(self) -> str:
        failed = self._conditions().get("Failed", {})
        return f"{failed.get('reason')}: {failed.get('message')}"

    def _leader(self) -> V1Pod | None:
        """Return the pod of process 0, or None if there is none."""
        selector = f"{SET_NAME}={self.name},{INDEX}=0"
        leaders = self._core.list_namespaced_pod(self.namespace, label_selector=selector).items
        return leaders[0] if leaders else None

    def _follow_log(self) -> None:
        """Show new log lines of process 0. This polls, since a stream would end with the connection."""
        leader = self._leader()
        if leader is None or leader.status.phase == "Pending":
            return
        text = _unless_gone(lambda: self._core.read_namespaced_pod_log(leader.metadata.name, self.namespace)) or ""
        lines = text.splitlines()
        for line in lines[self._logged :]:
            log.info("%s", line)
        self._logged = len(lines)

    def _sweep(self) -> None:
        """Delete failed jobs after their retention time."""
        oldest = datetime.now(UTC) - timedelta(hours=self.job.settings.kubernetes.keep_failed_hours)
        for name in self._failed_before(oldest):
            self._delete(name)

    def _failed_before(self, oldest: datetime) -> Iterator[str]:
        selector = ",".join(f"{k}={v}" for k, v in pods.LABELS.items())
        listing = self._objects.list_namespaced_custom_object(
            GROUP, VERSION, self.namespace, PLURAL, label_selector=selector
        )
        for item in listing["items"]:
            for condition in item.get("status", {}).get("conditions", []):
                failed = condition["type"] == "Failed" and condition["status"] == "True"
                if failed and datetime.fromisoformat(condition["lastTransitionTime"]) < oldest:
                    yield item["metadata"]["name"]


def _reasons(pod: V1Pod | None) -> Iterator[str]:
    """Yield why a pod waits, as reported by the scheduler and the node."""
    if pod is None:
        yield "no pod was made for it; is Kubeflow Trainer running?"
        return
    for condition in pod.status.conditions or ():
        if condition.status == "False" and condition.message:
            yield f"{condition.reason}: {condition.message}"
    for container in pod.status.container_statuses or ():
        if container.state.waiting is not None:
            yield f"{container.state.waiting.reason}: {container.state.waiting.message}"


def _unless_gone(call: Callable[[], T]) -> T | None:
    """Return the result of a call, or None if its object does not exist."""
    try:
        return call()
    except ApiException as error:
        if error.status == 404:
            return None
        raise
