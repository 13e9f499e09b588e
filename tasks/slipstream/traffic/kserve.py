"""Traffic on Kubernetes: an InferenceService of KServe for each model, and a revision of its predictor for a release.

All state is in the InferenceService, so that any process can be killed at any time and the next one continues. Each
change is one write that fails if another client wrote in between (`resourceVersion`), and is then recomputed from the
new state. The order of writes of a release:

    1. engine uploaded under a name with its digest             nothing refers to it yet
    2. predictor replaced, `canaryTrafficPercent` 0             a new revision starts, and gets no traffic
    3. `canaryTrafficPercent` 5, 25, 50                         KServe splits; a smaller share takes effect at once
    4. `canaryTrafficPercent` 100                               KServe promotes; 0 still returns to the previous release

KServe's limitations: it splits between at most two releases; it does not mirror (the sender does, to the address that
KServe's tag routing gives the latest revision); it does not keep a release without traffic warm (a rollback deploys
`previous` again, while the current release serves). Deployment modes without Knative have no canary and are refused.

Environment: SLIPSTREAM_RELEASES, where engines are uploaded to (s3://bucket/prefix); SLIPSTREAM_INGRESS, an address
such as http://host:port for clusters whose names cannot be resolved here: requests then carry the Host header;
KUBECONFIG. kserve_api.ACCESS lists the API calls.
"""

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from slipstream import storage
from slipstream.contract import Json, Release
from slipstream.engines.base import read_manifest, server_environment
from slipstream.errors import InputError, RegistryError, SlipstreamError, Unavailable
from slipstream.home import Home
from slipstream.plan import settings
from slipstream.plan.settings import Settings
from slipstream.traffic import kserve_objects as objects
from slipstream.traffic.base import Endpoint, Observation, Routes, require_judged
from slipstream.traffic.kserve_api import GROUP, Api, Conflict
from slipstream.traffic.kserve_objects import Service

log = logging.getLogger(__name__)

CREATED_WITHIN_S = 30
"""KServe creates a revision of a new predictor within seconds, or refuses it."""
ROUTED_WITHIN_S = 60
FAILED_FOR_S = 5.0
"""Conditions go through `False` during a start; one that stays so this long is a failure."""
POLL_S = 0.1
COUNTED = "slipstream_requests_total"
"""Counter of serving/server.py."""
TRITON_FAILED = "nv_inference_request_failure"
"""Requests that Triton refused or failed; it counts the others separately."""


def controller(home: Home) -> "KServeController":
    """Return the controller of the cluster that the environment names. Raise InputError, SpecError."""
    releases = os.environ.get("SLIPSTREAM_RELEASES", "")
    if not releases:
        raise InputError("SLIPSTREAM_TRAFFIC=kserve needs SLIPSTREAM_RELEASES=s3://BUCKET/PREFIX for the engines")
    installation = settings.load(home)
    namespace = installation.kubernetes.serving.namespace or installation.kubernetes.namespace
    return KServeController(
        Api.connect(namespace), installation, releases, os.environ.get("SLIPSTREAM_INGRESS") or None
    )


class KServeController:
    """Implements `TrafficController` (traffic/base.py)."""

    def __init__(
        self, api: Api, settings: Settings, releases: str, ingress: str | None, failed_for_s: float = FAILED_FOR_S
    ) -> None:
        self._api = api
        self._settings = settings
        self._releases = releases
        self._ingress = ingress
        self._failed_for_s = failed_for_s
        self._mirrors: dict[str, str] = {}
        """Release by model. The sender mirrors, and a mirror ends with its process; so it is stored only here."""

    def deploy(self, release: Release, engine: Path, sha256: str | None = None) -> None:
        """See the protocol."""
        sha256 = require_judged(release, engine, sha256)
        service = self._find(release.model)
        serving = service.serving if service is not None else None
        if service is None or release.name not in {service.release, *service.weights}:
            predictor = self._predictor(release, engine, sha256)
            self._create(release, predictor) if service is None else self._replace(release, predictor)
        elif service.engines.get(release.name) != sha256:
            raise RegistryError(
                f"{release.key} is deployed with engine {service.engines.get(release.name, '')[:12]}…, not "
                f"{sha256[:12]}…; deploy the other engine under a name of its own"
            )
        self._await_ready(release, serving)

    def retire(self, release: Release) -> None:
        """See the protocol. The predictor of the serving release is restored, as a new revision."""
        service = self._find(release.model)
        if service is None:
            return
        if release.name in service.weights or self._mirrors.get(release.model) == release.name:
            raise RegistryError(f"{release.key} has traffic ({service.weights}); move it first")
        if service.release == release.name:
            self._put_back(service, service.serving)

    def deployed(self, model: str) -> set[str]:
        """See the protocol."""
        service = self._find(model)
        if service is None:
            return set()
        names = {*service.weights, *([service.release] if service.release and service.ready else [])}
        return {name for name in names if any(_is_ready(pod) for pod in self._pods(service, name))}

    def releases(self, model: str) -> set[str]:
        """See the protocol."""
        service = self._find(model)
        return set() if service is None else {*service.weights, *([service.release] if service.release else [])}

    def routes(self, model: str) -> Routes:
        """See the protocol. The mirror is that of this process."""
        service = self._find(model)
        return Routes(weights=service.weights if service else {}, mirror=self._mirrors.get(model))

    def set_routes(self, model: str, routes: Routes) -> None:
        """See the protocol."""
        weights = {name: share for name, share in routes.weights.items() if share}
        if not weights:
            raise RegistryError(f"{model}: KServe always routes to a release; delete the InferenceService to stop it")
        self._require(model, routes)
        self._share(model, weights)
        if routes.mirror is None:
            self._mirrors.pop(model, None)
        else:
            self._mirrors[model] = routes.mirror

    def observe(self, release: Release) -> Observation:
        """See the protocol: the model servers' own counts. Raise Unavailable.

        A server that is gone takes its counts with it, and requests that reached no server are not counted here; the
        sender sees those fail. Memory is that of the largest server; stock runtimes do not report it (0), and only the
        container's limit applies.
        """
        service = self._find(release.model)
        pods = self._pods(service, release.name) if service is not None else []
        texts = [self._api.metrics(pod["metadata"]["name"], _metrics_port(pod)) for pod in pods]
        observations = [counters(text) for text in texts if text is not None]
        return Observation(
            requests=sum(o.requests for o in observations),
            errors=sum(o.errors for o in observations),
            memory_mib=max((o.memory_mib for o in observations), default=0.0),
        )

    def endpoint(self, model: str) -> Endpoint:
        """See the protocol."""
        service = self._find(model)
        if service is None or service.url is None:
            raise RegistryError(f"{model}: KServe has not said yet where it is reached; deploy a release first")
        return self._reached(service.url)

    def mirror(self, model: str) -> Endpoint | None:
        """See the protocol. Raise Unavailable if KServe gave the release no separate address."""
        name = self._mirrors.get(model)
        if name is None:
            return None
        service = self._find(model)
        url = service.tag_url(name) if service else None
        if url is None:
            raise Unavailable(f"{model}: {name} has no address of its own; KServe's tag routing did not make one")
        return self._reached(url)

    def answers(self, release: Release) -> Path | None:
        """See the protocol: the logs stay in the pods."""
        return None

    # Reading

    def _name(self, model: str) -> str:
        return objects.object_name(model)

    def _find(self, model: str) -> Service | None:
        """Return the model's InferenceService. Raise InputError if it has no canary."""
        body = self._api.get(self._name(model))
        if body is None:
            return None
        service = Service(body)
        if service.mode is not None and service.mode not in objects.KNATIVE:
            raise InputError(
                f"InferenceService {self._api.namespace}/{service.name}: deployment mode {service.mode} has no canary; "
                f"only Knative has (annotation {objects.MODE}: {objects.KNATIVE[0]}, and Knative Serving installed)"
            )
        if service.release is None:
            raise InputError(
                f"InferenceService {self._api.namespace}/{service.name} is not slipstream's (no label "
                f"{objects.RELEASE} on its predictor); rename the registered model, or delete the InferenceService"
            )
        return service

    def _pods(self, service: Service, release: str) -> list[Json]:
        return self._api.pods(f"{GROUP}/inferenceservice={service.name},{objects.RELEASE}={release}")

    def _reached(self, url: str) -> Endpoint:
        return Endpoint(url) if self._ingress is None else Endpoint(self._ingress, objects.host(url))

    def _require(self, model: str, routes: Routes) -> Service:
        """Return the model's InferenceService, if it can route so. Raise RegistryError."""
        service = self._find(model)
        latest = service.release if service is not None and service.ready else None
        reachable = {latest, service.base, *service.weights} if service is not None else set()
        names = {*(n for n, share in routes.weights.items() if share), *([routes.mirror] if routes.mirror else [])}
        if service is None or not names <= reachable:
            unknown = ", ".join(sorted(names - reachable))
            raise RegistryError(f"{model}: {unknown} is not deployed; do that first")
        return service

    def _wait(self, model: str, satisfied: Callable[[Service], bool], seconds: float, what: str) -> Service:
        """Return the model's InferenceService, as soon as it is `satisfied`.

        Raise Unavailable, with the conditions, if it never is.
        """
        deadline = time.monotonic() + seconds
        while True:
            service = self._find(model)
            if service is not None and satisfied(service):
                return service
            if time.monotonic() > deadline:
                conditions = service.conditions() if service is not None else "it is gone"
                raise Unavailable(f"InferenceService {self._api.namespace}/{self._name(model)}: {what}: {conditions}")
            time.sleep(POLL_S)

    # Writing

    def _predictor(self, release: Release, engine: Path, sha256: str) -> Json:
        """Upload the engine, and return how it is served."""
        uri = storage.join(self._releases, self._name(release.model), f"{release.name}-{sha256[:16]}")
        if self._settings.kubernetes.serving.runtime == "slipstream":
            storage.upload(engine, uri)
            return objects.predictor(release, uri, sha256, self._settings, server_environment(engine))
        manifest = read_manifest(engine)
        with tempfile.TemporaryDirectory() as folder:
            for file, path in objects.stock_layout(release.model, manifest).items():
                Path(folder, path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(engine / file, Path(folder, path))
            storage.upload(Path(folder), uri)
        return objects.stock_predictor(release, uri, sha256, manifest.engine, self._settings)

    def _create(self, release: Release, predictor: Json) -> None:
        body = objects.new(self._name(release.model), self._api.namespace, release.model, predictor)
        try:
            self._api.create(body)
        except Conflict as error:
            raise Unavailable(f"{release.key}: another process deploys this model's first release now") from error
        log.info("traffic: InferenceService %s is created with %s", body["metadata"]["name"], release.key)

    def _replace(self, release: Release, predictor: Json) -> None:
        """Replace the predictor, once the current one has a revision: otherwise the two would be confused."""
        try:
            self._wait(release.model, lambda s: s.created or bool(s.failure()), CREATED_WITHIN_S, "no revision yet")
        except Unavailable as error:
            log.warning("traffic: %s: the predictor before never got a revision: %s", release.key, error)

        def mutate(body: Json) -> Json:
            service = Service(body)
            if service.release == release.name:
                return body
            if service.weights and service.serving is None:
                raise RegistryError(
                    f"{release.key}: KServe splits between two releases only, and {service.weights} share the traffic; "
                    "give one of them all of it first"
                )
            return objects.replaced(body, predictor)

        self._api.change(self._name(release.model), mutate)
        log.info("traffic: the predictor of %s is now %s", release.model, release.name)

    def _await_ready(self, release: Release, serving: str | None) -> None:
        """Wait until a release answers. One that does not is removed. Raise Unavailable, InputError.

        `serving` must keep its traffic meanwhile: if Knative moves the route before it has created the revision, KServe
        mistakes that for a rollback, and returns to the release that served before (kserve#1968, #2130).
        """
        patience = self._settings.kubernetes.serving.ready_timeout_s
        failing: float | None = None

        def is_serving(service: Service) -> bool:
            nonlocal failing
            if serving is not None and serving not in service.weights:
                raise Unavailable(f"{release.key}: KServe moved the traffic from {serving} to {service.weights}")
            if release.name in service.weights or (service.release == release.name and service.ready):
                return True
            if service.release != release.name:
                raise Unavailable(f"{release.key}: another process deployed {service.release} meanwhile")
            failing = (failing or time.monotonic()) if service.failure() else None
            if failing is not None and time.monotonic() - failing > self._failed_for_s:
                raise Unavailable(f"{release.key} is not ready: {service.failure()}")
            return False

        try:
            self._wait(release.model, is_serving, patience, f"{release.name} is not ready within {patience} s")
        except SlipstreamError:
            self._give_up(release, serving)
            raise

    def _give_up(self, release: Release, serving: str | None) -> None:
        """Remove a release that was never ready; `serving` served before."""
        body = self._api.get(self._name(release.model))
        if body is not None and Service(body).release == release.name and release.name not in Service(body).weights:
            try:
                self._put_back(Service(body), serving)
            except SlipstreamError as error:
                log.warning("traffic: %s is left as it is, without traffic: %s", release.key, error)

    def _put_back(self, service: Service, serving: str | None) -> None:
        """Replace the predictor by that of `serving`, which gets all traffic; without one, delete the InferenceService.

        The share of the latest revision stays 0 until it is ready, so no waiting client is sent there.
        """
        if not service.weights:
            self._api.delete(service.name)
            return
        former, model = service.history.former, service.body["metadata"]["annotations"][objects.MODEL]
        if former is None or objects.release_of(former) != serving:
            raise RegistryError(f"{model}: the predictor of {serving} is not remembered; deploy it again")
        self._api.change(
            service.name,
            lambda body: objects.replaced(body, former) if Service(body).release == service.release else body,
        )
        self._wait(model, lambda s: s.ready, self._settings.kubernetes.serving.ready_timeout_s, "not ready again")
        self._share(model, {str(serving): 100})

    def _share(self, model: str, weights: dict[str, int]) -> None:
        """Set the share of the latest revision, and wait until it is in force."""
        self._api.change(self._name(model), lambda body: objects.shared(body, _percent(Service(body), weights)))
        self._wait(
            model,
            lambda service: service.weights == weights and service.routed,
            ROUTED_WITHIN_S,
            f"the traffic {weights} is not in force",
        )


def _percent(service: Service, weights: dict[str, int]) -> int:
    """Return `canaryTrafficPercent` for the given shares. Raise RegistryError if two revisions cannot serve them.

    While the latest revision is not ready, its share would go to the previous one, whatever that is.
    """
    if weights == {service.release: 100} and service.ready:
        return 100
    if weights == {service.base: 100}:
        return 0
    if service.ready and sum(weights.values()) == 100 and set(weights) == {service.release, service.base}:
        return weights[str(service.release)]
    raise RegistryError(
        f"KServe cannot route {weights}: its latest revision is {service.release}, the one before {service.base}; "
        "deploy what should serve first"
    )


def _is_ready(pod: Json) -> bool:
    conditions = pod.get("status", {}).get("conditions", [])
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


def _metrics_port(pod: Json) -> int:
    """Return Triton's own port for metrics if KServe names one; else that of the server."""
    return int(pod["metadata"].get("annotations", {}).get("prometheus.kserve.io/port", objects.PORT))


def counters(text: str) -> Observation:
    """Return counters from Prometheus's text format: slipstream's server, or Triton's names."""
    from prometheus_client.parser import text_string_to_metric_families  # not needed where only the traffic is compared

    requests, errors, memory = 0.0, 0.0, 0.0
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name in (COUNTED, "nv_inference_request_success", TRITON_FAILED):
                requests += sample.value
            if sample.name == TRITON_FAILED or (sample.name == COUNTED and sample.labels["status"] == "5xx"):
                errors += sample.value
            if sample.name == "process_resident_memory_bytes":
                memory = sample.value / 2**20
    return Observation(int(requests), int(errors), memory)
