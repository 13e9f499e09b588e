"""InferenceServices as plain values: what slipstream writes, and KServe's status of releases.

KServe (by its source of 2025 and 2026: knative/ksvc_reconciler.go, inference_service_status.go) splits between two
revisions of a predictor only: the latest, which gets `canaryTrafficPercent`, and the one that last had 100 %, which
gets the rest. A revision that reaches 100 % is promoted to `latestRolledoutRevision`; less than that after a promotion
makes KServe return to `previousRolledoutRevision`.

The InferenceService itself records which revision is which release. KServe copies annotations and labels into the
revision's template, so a change of any creates a new revision: they change only together with the engine.
"""

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from urllib.parse import urlsplit

from pydantic import Field

from slipstream.contract import Document, Json, Release
from slipstream.engines.base import EngineManifest
from slipstream.errors import InputError
from slipstream.plan.settings import Settings
from slipstream.plugins import SERVE
from slipstream.spec import Resources
from slipstream.traffic.kserve_api import GROUP, VERSION

RELEASE = "slipstream/release"
"""Label of the predictor and thus of its pods: the release's name."""
ENGINE = "slipstream/engine-sha256"
"""Annotation of the predictor: digest of the engine folder."""
MODEL = "slipstream/model"
"""Annotation: the registered model's name, of which the object's name is a DNS-safe form."""
HISTORY = "slipstream/history"
"""Annotation: a `History`."""
KEPT = 8
"""Number of revisions that are recorded; Knative itself discards older ones."""

MODE = f"{GROUP}/deploymentMode"
KNATIVE = ("Serverless", "Knative")
"""Deployment modes with a canary; `Knative` is the newer name, and KServe treats the older one as equal."""
NAME_LIMIT = 36
"""`latest-NAME-predictor-00001` must be a DNS label, with room for the namespace in the default domain template."""
CONTAINER = "kserve-container"
PORT = 8080
PYTHON = "/opt/slipstream/venv/bin/python"
MOUNT = "/mnt/models"
"""Where KServe's storage initializer puts the content of STORAGE_URI or `storageUri`."""


class History(Document):
    """State that the status lacks; written in the same write that replaces the predictor."""

    revisions: dict[str, str] = Field(default={})
    """Release by revision, of earlier predictors."""
    after: str | None = None
    """The latest revision before the current predictor: newer ones belong to this one."""
    former: Json | None = None
    """The predictor that served when this one was written, for a return to it."""


@dataclass(frozen=True)
class Service:
    """An InferenceService in its current state."""

    body: Json

    @property
    def name(self) -> str:
        """Name of the object."""
        return str(self.body["metadata"]["name"])

    @property
    def predictor(self) -> Json:
        """The predictor as written, without its share of the traffic."""
        written: Json = self.body["spec"]["predictor"]
        return {k: v for k, v in written.items() if k != "canaryTrafficPercent"}

    @property
    def percent(self) -> int:
        """Share requested for the latest revision."""
        return int(self.body["spec"]["predictor"].get("canaryTrafficPercent", 100))

    @cached_property
    def history(self) -> History:
        """slipstream's record."""
        text = self.body["metadata"].get("annotations", {}).get(HISTORY)
        return History.model_validate_json(text) if text else History()

    @property
    def release(self) -> str | None:
        """Release of the predictor; None if it is not slipstream's."""
        return release_of(self.predictor)

    @property
    def status(self) -> Json:
        """KServe's status of the predictor."""
        component: Json = self.body.get("status", {}).get("components", {}).get("predictor", {})
        return component

    @property
    def created(self) -> bool:
        """Whether KServe has created a revision of the current predictor."""
        return self._is_newer(self.status.get("latestCreatedRevision"))

    @property
    def ready(self) -> bool:
        """Whether the latest revision belongs to the current predictor, and is ready."""
        latest = self.status.get("latestReadyRevision")
        return self._is_newer(latest) and latest == self.status.get("latestCreatedRevision")

    @property
    def revisions(self) -> dict[str, int]:
        """Effective share by revision."""
        shares: dict[str, int] = {}
        for target in self.status.get("traffic", []):
            shares[target["revisionName"]] = shares.get(target["revisionName"], 0) + int(target.get("percent") or 0)
        return {revision: share for revision, share in shares.items() if share}

    @property
    def weights(self) -> dict[str, int]:
        """Effective share by release. A release may have two revisions, after it was restored."""
        shares: dict[str, int] = {}
        for revision, share in self.revisions.items():
            name = self.release_at(revision)
            shares[name] = shares.get(name, 0) + share
        return shares

    @property
    def serving(self) -> str | None:
        """The release that has all traffic; None if none has, or several share it."""
        return next((name for name, share in self.weights.items() if share == 100), None)

    @property
    def base(self) -> str | None:
        """The release that gets the rest if the latest revision gets less than 100 %."""
        status = self.status
        rolled = status.get("latestRolledoutRevision")
        if rolled is not None and rolled == status.get("latestReadyRevision") == status.get("latestCreatedRevision"):
            rolled = status.get("previousRolledoutRevision")
        return self.release_at(rolled) if rolled else None

    @property
    def engines(self) -> dict[str, str]:
        """Digest of the engine by release, of the current predictor and the former one."""
        predictors = [p for p in (self.history.former, self.predictor) if p]
        return {str(release_of(p)): p.get("annotations", {}).get(ENGINE, "") for p in predictors}

    @property
    def url(self) -> str | None:
        """The clients' address of the model, once KServe has reported it."""
        address: str | None = self.body.get("status", {}).get("url")
        return address

    def tag_url(self, release: str) -> str | None:
        """Return the address of a single release, by its tag; None if it has none."""
        targets = self.status.get("traffic", [])
        return next((t["url"] for t in targets if "url" in t and self.release_at(t["revisionName"]) == release), None)

    @property
    def routed(self) -> bool:
        """Whether the splitter has loaded the traffic shown in the status."""
        return self._condition("PredictorRouteReady").get("status") == "True"

    @property
    def mode(self) -> str | None:
        """KServe's deployment mode, as far as it is known."""
        annotated = self.body["metadata"].get("annotations", {}).get(MODE)
        deployment_mode: str | None = self.body.get("status", {}).get("deploymentMode") or annotated
        return deployment_mode

    def failure(self) -> str | None:
        """Return why the latest revision is not ready, if KServe reports a failure."""
        model = self.body.get("status", {}).get("modelStatus", {})
        info = model.get("lastFailureInfo", {})
        if model.get("transitionStatus") in ("InvalidSpec", "BlockedByFailedLoad"):
            return f"{info.get('reason', model['transitionStatus'])}: {info.get('message', 'no message')}"
        for kind in ("PredictorConfigurationReady", "PredictorReady"):
            condition = self._condition(kind)
            if self.created and condition.get("status") == "False":
                return f"{kind}: {condition.get('reason', '')}: {condition.get('message', '')}"
        return None

    def conditions(self) -> str:
        """Return all conditions in a line."""
        entries = self.body.get("status", {}).get("conditions", [])
        texts = (f"{c['type']}={c['status']} {c.get('reason', '')} {c.get('message', '')}".strip() for c in entries)
        return "; ".join(texts) or "no conditions: is KServe's controller running?"

    def release_at(self, revision: str) -> str:
        """Return the release of a revision; other revisions than slipstream's are named after themselves."""
        if revision in self.history.revisions:
            return self.history.revisions[revision]
        return (self.release if self._is_newer(revision) else None) or f"revision:{revision}"

    def _is_newer(self, revision: str | None) -> bool:
        return revision is not None and _number(revision) > _number(self.history.after)

    def _condition(self, kind: str) -> Json:
        entries = self.body.get("status", {}).get("conditions", [])
        return next((c for c in entries if c["type"] == kind), {})


def object_name(model: str) -> str:
    """Return a DNS-safe name for a registered model: its own if it is one, else with a digest that keeps it unique."""
    safe = re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-")
    if safe == model and len(safe) <= NAME_LIMIT and not safe[0].isdigit():
        return safe
    digest = hashlib.sha256(model.encode()).hexdigest()[:8]
    return f"m-{safe[: NAME_LIMIT - 11]}".rstrip("-") + f"-{digest}"


def new(name: str, namespace: str, model: str, predictor: Json) -> Json:
    """Return an InferenceService with its first release, which KServe gives all traffic as soon as it is ready."""
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "InferenceService",
        "metadata": {
            "name": name,
            "namespace": namespace,
            # Tags give each of the two revisions a separate address, which the shadow needs.
            "annotations": {MODEL: model, MODE: KNATIVE[0], f"{GROUP}/enable-tag-routing": "true"},
        },
        "spec": {"predictor": {**predictor, "canaryTrafficPercent": 100}},
    }


def replaced(body: Json, predictor: Json) -> Json:
    """Return the service with another predictor that gets no traffic yet; the current one continues to serve."""
    service = Service(body)
    revisions = dict(service.history.revisions)
    for revision in (service.status.get("latestReadyRevision"), service.status.get("latestCreatedRevision")):
        if revision is not None:
            revisions.setdefault(revision, service.release_at(revision))
    newest = sorted(revisions.items(), key=lambda item: _number(item[0]))[-KEPT:] if revisions else []
    serving = service.serving
    former = service.predictor if serving == service.release else service.history.former
    history = History(
        revisions=dict(newest),
        after=service.status.get("latestCreatedRevision") or service.history.after,
        former=former if serving is not None and former is not None and release_of(former) == serving else None,
    )
    annotations = {**body["metadata"].get("annotations", {}), HISTORY: history.model_dump_json()}
    return {
        **body,
        "metadata": {**body["metadata"], "annotations": annotations},
        "spec": {**body["spec"], "predictor": {**predictor, "canaryTrafficPercent": 0 if serving else 100}},
    }


def shared(body: Json, percent: int) -> Json:
    """Return the service with another share for the latest revision."""
    predictor = {**body["spec"]["predictor"], "canaryTrafficPercent": percent}
    return {**body, "spec": {**body["spec"], "predictor": predictor}}


def release_of(predictor: Json) -> str | None:
    """Return the release of a predictor; None if it is not slipstream's."""
    label = predictor.get("labels", {}).get(RELEASE)
    return None if label is None else str(label)


def predictor(release: Release, uri: str, sha256: str, settings: Settings, environment: str = SERVE) -> Json:
    """Return a predictor that serves the engine folder at `uri` with slipstream's own server, in an environment's
    image."""
    command = ["-m", "slipstream.serving.server"]
    options = {"model": release.model, "release": release.name, "engine": MOUNT, "sha256": sha256, "port": PORT}
    options |= {"host": "0.0.0.0"}  # noqa: S104 (the pod's own address)
    container: Json = {
        "name": CONTAINER,
        "image": settings.image_of_servers(environment),
        "imagePullPolicy": settings.kubernetes.pull_policy,
        "command": [PYTHON, *command],
        "args": [part for key, value in options.items() for part in (f"--{key}", str(value))],
        "env": [{"name": "STORAGE_URI", "value": uri}],
        "ports": [{"containerPort": PORT, "protocol": "TCP"}],
        "readinessProbe": {"httpGet": {"path": "/v2/health/ready", "port": PORT}, "timeoutSeconds": 2},
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],  # noqa: S108 (a volume of the pod's own)
        "resources": _requirements(settings.resources_of_servers()),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "runAsNonRoot": True,
            "capabilities": {"drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }
    volumes = [{"name": "tmp", "emptyDir": {}}]
    return {**_common(release, sha256, settings), "containers": [container], "volumes": volumes}


@dataclass(frozen=True)
class Format:
    """The form in which a stock runtime of KServe needs an engine."""

    name: str
    """`modelFormat`, by which KServe chooses the runtime."""
    files: dict[str, str]
    """Path below the model's folder, by file of the engine folder."""
    by_model: bool
    """Whether the model's folder has the model's name (Triton's model repository); else it is the root."""


FORMATS = {
    "onnxruntime": Format("onnx", {"model.onnx": "1/model.onnx"}, by_model=True),
    "openvino": Format("openvino", {"model.xml": "1/model.xml", "model.bin": "1/model.bin"}, by_model=False),
    "tensorrt": Format("tensorrt", {"model.plan": "1/model.plan"}, by_model=True),
}
"""Format by engine: Triton serves onnx and tensorrt, OpenVINO Model Server openvino."""


def stock_layout(model: str, manifest: EngineManifest) -> dict[str, str]:
    """Return paths in the uploaded folder by file of the engine folder. Raise InputError if no stock runtime fits."""
    layout = FORMATS.get(manifest.engine)
    if layout is None or not set(layout.files) <= set(manifest.files):
        raise InputError(
            f"kubernetes.serving.runtime: stock: no runtime of KServe serves an engine of {manifest.engine} with the "
            f"files {', '.join(manifest.files)}; set `slipstream`"
        )
    if not layout.by_model and object_name(model) != model:
        raise InputError(
            f"kubernetes.serving.runtime: stock: OpenVINO Model Server calls a model like its InferenceService, and "
            f"{model!r} is no name for one; rename the registered model, or set `slipstream`"
        )
    return {file: f"{model}/{path}" if layout.by_model else path for file, path in layout.files.items()}


def stock_predictor(release: Release, uri: str, sha256: str, engine: str, settings: Settings) -> Json:
    """Return a predictor that serves a folder laid out by `stock_layout` with the runtime that KServe chooses."""
    model: Json = {
        "modelFormat": {"name": FORMATS[engine].name},
        "protocolVersion": "v2",
        "storageUri": uri,
        "resources": _requirements(settings.resources_of_servers()),
    }
    return {**_common(release, sha256, settings), "model": model}


def host(url: str) -> str:
    """Return the host, with its port, of a URL."""
    return urlsplit(url).netloc


def _common(release: Release, sha256: str, settings: Settings) -> Json:
    """Return the common parts of both kinds of predictors."""
    kubernetes, resources = settings.kubernetes, settings.resources_of_servers()
    optional: Json = {
        "maxReplicas": kubernetes.serving.max_replicas,
        "serviceAccountName": kubernetes.serving.service_account,
        "imagePullSecrets": [{"name": name} for name in kubernetes.pull_secrets] or None,
        "nodeSelector": resources.node_selector,
        "tolerations": [t.model_dump(exclude_none=True) for t in resources.tolerations or ()] or None,
    }
    return {
        "labels": {RELEASE: release.name},
        "annotations": {ENGINE: sha256},
        "minReplicas": kubernetes.serving.min_replicas,
        **{key: value for key, value in optional.items() if value},
    }


def _requirements(resources: Resources) -> Json:
    requests: dict[str, object] = {"cpu": resources.cpu and f"{resources.cpu:g}", "memory": resources.memory}
    limits: dict[str, object] = {"memory": resources.memory, "nvidia.com/gpu": resources.gpu and str(resources.gpu)}
    by_kind = {"requests": requests, "limits": limits}
    return {kind: {k: v for k, v in values.items() if v} for kind, values in by_kind.items() if any(values.values())}


def _number(revision: str | None) -> int:
    """Return a revision's number, which Knative appends to its name: `net-predictor-00003`."""
    tail = (revision or "").rpartition("-")[2]
    return int(tail) if tail.isdigit() else 0
