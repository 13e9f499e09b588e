"""Stands for KServe, Knative, the kubelet and the ingress.

It watches InferenceServices through the Kubernetes API, runs each revision as a real process behind a real Envoy, and
writes the status as KServe does.

The rules of revisions, traffic and promotion are those of KServe's source (knative/ksvc_reconciler.go,
v1beta1/inference_service_status.go) and of Knative Serving: a changed template is a new revision; the latest *ready*
one gets `canaryTrafficPercent`; one without a route is stopped.

`python -m tests.kserve.kserve_stand_in NAMESPACE` runs it against the cluster that KUBECONFIG names, for clusters
without KServe; inferenceservices.crd.yaml must be applied before.
"""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import kubernetes
import urllib3
from kubernetes.client.exceptions import ApiException
from tests.conftest import free_port
from tests.kserve.ingress import Ingress, end
from tests.kserve.pod_address import PodAddress

from slipstream import storage
from slipstream.traffic.kserve_api import GROUP, PLURAL, VERSION

Json = dict[str, Any]
DOMAIN = "example.test"
IDLE_S = 1.0
"""How long a revision without a route goes on, so that what is under way is answered; Knative takes a minute."""
TICK_S = 0.03


@dataclass
class Revision:
    """A revision, and its pod."""

    name: str
    template: Json
    port: int = 0
    address: PodAddress | None = None
    process: subprocess.Popen[bytes] | None = None
    ready: bool = False
    failure: str | None = None
    idle_since: float | None = None


@dataclass
class Service:
    """What Knative and KServe know of an InferenceService."""

    namespace: str
    name: str
    revisions: dict[str, Revision] = field(default_factory=dict)
    template: Json | None = None
    created: str | None = None
    ready: str | None = None
    rolled: str | None = None
    previous: str | None = None
    traffic: list[Json] = field(default_factory=list)

    @property
    def host(self) -> str:
        return f"{self.name}.{self.namespace}.{DOMAIN}"


class KServeStandIn:
    """Runs in threads until `close()`. `server` is what Python runs for a predictor's container."""

    def __init__(
        self,
        client: kubernetes.client.ApiClient,
        namespace: str,
        folder: Path,
        server: tuple[str, ...] = ("-m", "slipstream.serving.server"),
        *,
        mode: str = "Serverless",
        late_revisions: bool = False,
        own_addresses: bool = False,
    ) -> None:
        self.services: dict[str, Service] = {}
        self.error: Exception | None = None
        """What ended it before its time."""
        self._mode = mode
        self._late_revisions = late_revisions
        """Whether Knative's route is quicker than its configuration: a race that KServe mistakes for a rollback."""
        self._own_addresses = own_addresses
        """Whether each pod has an address that a real API server proxies to."""
        self._client, self._namespace, self._folder, self._server = client, namespace, folder, server
        self._objects = kubernetes.client.CustomObjectsApi(client)
        self._core = kubernetes.client.CoreV1Api(client)
        self._place: Json = {"group": GROUP, "version": VERSION, "namespace": namespace, "plural": PLURAL}
        self._seen: dict[str, Json] = {}
        self._gone: set[str] = set()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._ingress = Ingress(folder)
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._watch, self._reconcile_all)]
        for thread in self._threads:
            thread.start()

    @property
    def ingress(self) -> str:
        """Address at which every model is reached, by its host."""
        return self._ingress.url

    def close(self) -> None:
        """Stop everything. Raises what went wrong here."""
        self._stop.set()
        self._threads[1].join(20)
        for service in self.services.values():
            for revision in service.revisions.values():
                end(revision.process)
                if revision.address is not None:
                    revision.address.close()
        self._ingress.close()
        if self.error is not None:
            raise self.error

    # Kubernetes

    def _watch(self) -> None:
        while not self._stop.is_set():
            try:
                listed = self._objects.list_namespaced_custom_object(**self._place)
                with self._lock:
                    self._seen = {o["metadata"]["name"]: o for o in listed["items"]}
                    self._gone |= self.services.keys() - self._seen.keys()
                version = listed["metadata"]["resourceVersion"]
                stream = kubernetes.watch.Watch().stream(
                    self._objects.list_namespaced_custom_object, **self._place, resource_version=version
                )
                for event in stream:
                    self._take(event)
            except (ApiException, urllib3.exceptions.HTTPError, ConnectionError):
                self._stop.wait(0.2)

    def _take(self, event: Json) -> None:
        name = event["object"]["metadata"]["name"]
        with self._lock:
            if event["type"] == "DELETED":
                self._seen.pop(name, None)
                self._gone.add(name)
            else:
                self._seen[name] = event["object"]

    def _reconcile_all(self) -> None:
        try:
            self._keep_reconciling()
        except Exception as error:
            self.error = error
            raise

    def _keep_reconciling(self) -> None:
        while not self._stop.wait(TICK_S):
            with self._lock:
                seen, gone, self._gone = dict(self._seen), self._gone, set()
            for name in gone:
                self._remove(name)
            for name, body in seen.items():
                service = self.services.setdefault(name, Service(self._namespace, name))
                try:
                    self._reconcile(service, body)
                except (ApiException, urllib3.exceptions.HTTPError) as error:
                    if not self._stop.is_set():
                        sys.stderr.write(f"stand-in: {name}: {error}\n")

    def _remove(self, name: str) -> None:
        service = self.services.pop(name, None)
        if service is not None:
            self._ingress.route(list(self.services.values()))
            for revision in service.revisions.values():
                self._scale_down(revision)

    # KServe: one pass, with what the status said before it

    def _reconcile(self, service: Service, body: Json) -> None:
        if self._mode != "Serverless":
            self._write_status(body, {"deploymentMode": self._mode, "conditions": []})
            return
        late = self._late_revisions and service.template is not None and self._template(body) != service.template
        if not late:
            self._configure(service, body)
        self._check(service)
        self._route(service, body["spec"]["predictor"].get("canaryTrafficPercent"))
        self._propagate(service)
        if late:
            self._configure(service, body)
        self._write_status(body, self._status(service))
        self._scale(service)

    def _template(self, body: Json) -> Json:
        """What KServe puts into the revision's template: the predictor, and the object's annotations and labels."""
        predictor = {k: v for k, v in body["spec"]["predictor"].items() if k != "canaryTrafficPercent"}
        metadata = body["metadata"]
        return {"predictor": predictor, "annotations": metadata.get("annotations"), "labels": metadata.get("labels")}

    def _configure(self, service: Service, body: Json) -> None:
        """Knative's Configuration: a changed template is a new revision."""
        template = self._template(body)
        if template != service.template:
            service.template = template
            service.created = f"{service.name}-predictor-{len(service.revisions) + 1:05d}"
            revision = Revision(service.created, template)
            service.revisions[revision.name] = revision
            self._start(service, revision)

    def _check(self, service: Service) -> None:
        """Readiness, as the kubelet probes it. The latest ready revision never goes back to an older one."""
        for revision in service.revisions.values():
            if revision.process is None:
                continue
            code = revision.process.poll()
            if code is not None and not revision.ready:
                revision.failure = f"container exited with {code}: {self._log(revision).read_text()[-300:]}"
            alive = code is None and _answers(revision.port)
            if alive != revision.ready:
                revision.ready = alive
                self._write_pod(service, revision)
            if revision.ready and (service.ready is None or revision.name > service.ready):
                service.ready = revision.name

    def _route(self, service: Service, percent: int | None) -> None:
        """createKnativeService's targets, as Knative resolves them: `latest` is the latest ready revision."""
        if service.ready is None:
            return
        latest = 100 if percent is None or service.rolled is None else percent
        targets = [self._target(service, service.ready, latest, "latest", latest_revision=True)]
        if latest < 100:
            targets.append(self._target(service, str(service.rolled), 100 - latest, "prev", latest_revision=False))
        if targets != service.traffic:
            for target in targets:
                self._wake(service, service.revisions[target["revisionName"]])
            service.traffic = targets
            self._ingress.route(list(self.services.values()))

    def _target(self, service: Service, revision: str, percent: int, tag: str, *, latest_revision: bool) -> Json:
        return {
            "revisionName": revision,
            "percent": percent,
            "latestRevision": latest_revision,
            "tag": tag,
            "url": f"http://{tag}-{service.name}-predictor.{service.namespace}.{DOMAIN}",
        }

    def _propagate(self, service: Service) -> None:
        """PropagateStatus: promotion at 100 %, and the way back when a promoted revision gets less."""
        if not service.traffic:
            return
        latest = service.traffic[0]
        if service.rolled != service.ready:
            if latest["percent"] == 100:
                service.previous, service.rolled = service.rolled, service.ready
        elif service.ready == service.created and latest["percent"] < 100 and service.previous is not None:
            total = sum(t["percent"] for t in service.traffic if t["revisionName"] == service.ready)
            if total == 100:
                service.rolled = service.previous

    def _status(self, service: Service) -> Json:
        created = service.revisions[str(service.created)]
        failed = created.failure is not None and service.ready != service.created
        state = "True" if service.ready == service.created else "False" if failed else "Unknown"
        reason = {"reason": "RevisionFailed", "message": created.failure} if failed else {}
        predictor: Json = {
            "latestCreatedRevision": service.created,
            "latestReadyRevision": service.ready,
            "latestRolledoutRevision": service.rolled,
            "previousRolledoutRevision": service.previous,
            "traffic": service.traffic,
            "url": f"http://{service.name}-predictor.{service.namespace}.{DOMAIN}",
        }
        routed = "True" if service.traffic else "Unknown"
        status: Json = {
            "components": {"predictor": {k: v for k, v in predictor.items() if v is not None}},
            "conditions": [
                {"type": "PredictorConfigurationReady", "status": state, **reason},
                {"type": "PredictorReady", "status": state, **reason},
                {"type": "PredictorRouteReady", "status": routed},
                {"type": "Ready", "status": state, **reason},
            ],
            "deploymentMode": self._mode,
        }
        return status | ({"url": f"http://{service.host}"} if service.traffic else {})

    def _write_status(self, body: Json, status: Json) -> None:
        name = body["metadata"]["name"]
        with self._lock:
            known = self._seen.get(name, {}).get("status")
        if known == status:
            return
        try:
            fresh = self._objects.get_namespaced_custom_object(**self._place, name=name)
            written = self._objects.replace_namespaced_custom_object_status(
                **self._place, name=name, body={**fresh, "status": status}
            )
            with self._lock:
                self._seen[name] = {**self._seen.get(name, written), "status": written["status"]}
        except ApiException as error:
            if error.status not in (404, 409):  # gone, or written meanwhile: the next pass sees it
                raise

    # Pods

    def _scale(self, service: Service) -> None:
        """Knative's autoscaler: what has no route is stopped after a while."""
        routed = {t["revisionName"] for t in service.traffic} | {service.created}
        for revision in service.revisions.values():
            if revision.name in routed or revision.process is None:
                revision.idle_since = None
            elif revision.idle_since is None:
                revision.idle_since = time.monotonic()
            elif time.monotonic() - revision.idle_since > IDLE_S:
                self._scale_down(revision)

    def _wake(self, service: Service, revision: Revision) -> None:
        """Knative's activator holds requests back until a stopped revision is there again; not for one that died."""
        if revision.process is not None:
            return
        self._start(service, revision)
        deadline = time.monotonic() + 30
        while not revision.ready and time.monotonic() < deadline:
            self._check(service)
            time.sleep(0.02)

    def _start(self, service: Service, revision: Revision) -> None:
        if "containers" not in revision.template["predictor"]:
            revision.failure = "the stand-in has no serving runtimes"
            return
        [container] = revision.template["predictor"]["containers"]
        uri = next(e["value"] for e in container["env"] if e["name"] == "STORAGE_URI")
        engine = str(storage.fetch_folder(uri))  # KServe's storage initializer
        revision.port, revision.ready, revision.failure = free_port(), False, None
        real = {"/mnt/models": engine, "8080": str(revision.port), "0.0.0.0": "127.0.0.1"}
        command = [sys.executable, *self._server, *(real.get(a, a) for a in container["args"])]
        with self._log(revision).open("wb") as log:
            revision.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        if self._own_addresses:
            revision.address = PodAddress(revision.port)
        body = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": f"{revision.name}-pod",
                "labels": {
                    **revision.template["predictor"].get("labels", {}),
                    f"{GROUP}/inferenceservice": service.name,
                    "serving.knative.dev/revision": revision.name,
                },
                "annotations": {"stand-in/port": str(revision.port)},
            },
            "spec": {
                "containers": [{"name": container["name"], "image": container["image"]}],
                "schedulerName": "stand-in",  # a real cluster must not start it: the process above is the pod
            },
        }
        self._core.create_namespaced_pod(self._namespace, body)
        self._write_pod(service, revision)

    def _write_pod(self, service: Service, revision: Revision) -> None:
        ready = [{"type": "Ready", "status": str(revision.ready)}]
        address = revision.address.address if revision.address else "127.0.0.1"
        status = {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}], "conditions": ready}
        self._core.patch_namespaced_pod_status(f"{revision.name}-pod", self._namespace, {"status": status})

    def _scale_down(self, revision: Revision) -> None:
        if revision.process is not None:
            end(revision.process)
            if revision.address is not None:
                revision.address.close()
            revision.process, revision.address, revision.ready = None, None, False
            self._core.delete_namespaced_pod(f"{revision.name}-pod", self._namespace)

    def _log(self, revision: Revision) -> Path:
        return self._folder / f"{revision.name}.log"


def _answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/v2/health/ready", timeout=2).status_code == 200
    except httpx.TransportError:
        return False


def main() -> None:
    """Run until stopped; prints the ingress's address."""
    kubernetes.config.load_config()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    with tempfile.TemporaryDirectory() as folder:
        server = tuple(os.environ.get("STAND_IN_SERVER", "-m slipstream.serving.server").split())
        stand_in = KServeStandIn(
            kubernetes.client.ApiClient(), sys.argv[1], Path(folder) / "stand-in", server, own_addresses=True
        )
        print(stand_in.ingress, flush=True)
        try:
            threading.Event().wait()
        finally:
            stand_in.close()


if __name__ == "__main__":
    main()
