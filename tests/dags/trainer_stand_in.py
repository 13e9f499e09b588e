"""Stands for Kubeflow Trainer and JobSet: makes the pods of a TrainJob and says how they ended.

The variables, labels and conditions are those of Trainer's plug-in for PyTorch (pkg/runtime/framework/plugins/torch)
and of JobSet. The pods share the node's network, where a test cluster has no other.
"""

import threading
from datetime import UTC, datetime
from typing import Any

import kubernetes
from kubernetes.client import ApiException
from tests.conftest import free_port

Json = dict[str, Any]
TICK_S = 0.3


class TrainerStandIn:
    """Runs in a thread until `close()`."""

    def __init__(self, client: Any, namespace: str) -> None:
        self._objects = kubernetes.client.CustomObjectsApi(client)
        self._core = kubernetes.client.CoreV1Api(client)
        self._place = ("trainer.kubeflow.org", "v1alpha1", namespace)
        self._namespace = namespace
        self._known: set[str] = set()
        self._stop = threading.Event()
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop. Raises what went wrong here."""
        self._stop.set()
        self._thread.join(20)
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        try:
            while not self._stop.wait(TICK_S):
                jobs = self._objects.list_namespaced_custom_object(*self._place, "trainjobs")["items"]
                for job in jobs:
                    self._reconcile(job)
                for gone in self._known - {j["metadata"]["name"] for j in jobs}:
                    self._core.delete_collection_namespaced_pod(
                        self._namespace, label_selector=f"jobset.sigs.k8s.io/jobset-name={gone}"
                    )
                    self._known.discard(gone)
        except Exception as error:
            self.error = error

    def _reconcile(self, job: Json) -> None:
        name = job["metadata"]["name"]
        if name not in self._known:
            self._known.add(name)
            port = free_port()
            for index in range(job["spec"]["trainer"]["numNodes"]):
                self._core.create_namespaced_pod(self._namespace, self._pod(job, index, port))
        pods = self._core.list_namespaced_pod(
            self._namespace, label_selector=f"jobset.sigs.k8s.io/jobset-name={name}"
        ).items
        phases = {p.status.phase for p in pods}
        ended = "Failed" if "Failed" in phases else "Complete" if phases == {"Succeeded"} else None
        if ended and not job.get("status"):
            now = datetime.now(UTC).isoformat(timespec="seconds")
            condition = {"type": ended, "status": "True", "reason": "JobsEnded", "message": f"pods: {sorted(phases)}"}
            body = {"status": {"conditions": [condition | {"lastTransitionTime": now}]}}
            try:
                self._objects.patch_namespaced_custom_object_status(*self._place, "trainjobs", name, body)
            except ApiException as error:
                if error.status != 404:
                    raise

    def _pod(self, job: Json, index: int, port: int) -> Json:
        trainer, name = job["spec"]["trainer"], job["metadata"]["name"]
        runtime = self._objects.get_namespaced_custom_object(
            *self._place, "trainingruntimes", job["spec"]["runtimeRef"]["name"]
        )
        [base] = _pod_spec(runtime["spec"])["containers"]
        patch = _pod_spec(job["spec"]["runtimePatches"][0]["trainingRuntimeSpec"])
        [patched] = patch["containers"]
        place = {
            "PET_NNODES": str(trainer["numNodes"]),
            "PET_NPROC_PER_NODE": str(trainer["numProcPerNode"]),
            "PET_NODE_RANK": str(index),
            "PET_MASTER_ADDR": "127.0.0.1",
            "PET_MASTER_PORT": str(port),
        }
        container = {
            **base,
            **patched,
            "image": trainer["image"],
            "command": trainer["command"],
            "env": [*trainer["env"], *({"name": k, "value": v} for k, v in place.items())],
            "resources": trainer["resourcesPerNode"],
        }
        labels = {"jobset.sigs.k8s.io/jobset-name": name, "batch.kubernetes.io/job-completion-index": str(index)}
        return {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": f"{name}-node-0-{index}", "labels": labels},
            "spec": {**patch, "containers": [container], "restartPolicy": "Never", "hostNetwork": True},
        }


def _pod_spec(runtime: Json) -> Json:
    [job] = runtime["template"]["spec"]["replicatedJobs"]
    return dict(job["template"]["spec"]["template"]["spec"])
