"""The few Kubernetes API calls that moving traffic needs, with their failures as slipstream's errors."""

import copy
import json
import logging
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import kubernetes
import urllib3
from kubernetes.client.exceptions import ApiException

from slipstream.contract import Json
from slipstream.errors import InputError, Unavailable

log = logging.getLogger(__name__)

GROUP, VERSION, PLURAL = "serving.kserve.io", "v1beta1", "inferenceservices"
ACCESS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (GROUP, PLURAL, ("get", "create", "update", "delete")),
    ("", "pods", ("list",)),
    ("", "pods/proxy", ("get",)),
)
"""(API group, resource, verbs): all calls of this module, in the one namespace of the InferenceServices. The chart's
role for releases grants exactly this."""

TIMEOUT_S = 10
ATTEMPTS = 30
"""Number of write conflicts before giving up. KServe itself writes often while a revision starts."""


class Conflict(Unavailable):
    """Another client wrote the object meanwhile."""


class Api:
    """InferenceServices and pods of one namespace."""

    def __init__(self, namespace: str, client: kubernetes.client.ApiClient) -> None:
        self.namespace = namespace
        self._objects = kubernetes.client.CustomObjectsApi(client)
        self._core = kubernetes.client.CoreV1Api(client)
        self._place: Json = {"group": GROUP, "version": VERSION, "namespace": namespace, "plural": PLURAL}

    @classmethod
    def connect(cls, namespace: str) -> "Api":
        """Connect to the cluster that KUBECONFIG names, or the one that this process runs in. Raise InputError."""
        try:
            kubernetes.config.load_config()
        except (kubernetes.config.ConfigException, FileNotFoundError) as error:
            raise InputError(
                f"SLIPSTREAM_TRAFFIC=kserve: no cluster ({error}); set KUBECONFIG, or run in a pod"
            ) from error
        return cls(namespace, kubernetes.client.ApiClient())

    def get(self, name: str) -> Json | None:
        """Return an InferenceService, or None if there is none."""
        try:
            with self._calling(f"reading {name}"):
                service: Json = self._objects.get_namespaced_custom_object(
                    **self._place, name=name, _request_timeout=TIMEOUT_S
                )
                return service
        except _Absent:
            return None

    def create(self, body: Json) -> Json:
        """Create an InferenceService. Raise Conflict if there is one already."""
        with self._calling(f"creating {body['metadata']['name']}"):
            service: Json = self._objects.create_namespaced_custom_object(
                **self._place, body=body, _request_timeout=TIMEOUT_S
            )
            return service

    def change(self, name: str, mutate: Callable[[Json], Json]) -> Json:
        """Read, change and write, until no other client wrote in between; nothing is written if nothing changes.

        `mutate` gets a copy, and is called again for each attempt. Raise Unavailable if the object is gone.
        """
        for _ in range(ATTEMPTS):
            current = self.get(name)
            if current is None:
                raise Unavailable(f"InferenceService {self.namespace}/{name} was deleted meanwhile")
            desired = mutate(copy.deepcopy(current))
            if desired == current:
                return current
            try:
                with self._calling(f"writing {name}"):
                    written: Json = self._objects.replace_namespaced_custom_object(
                        **self._place, name=name, body=desired, _request_timeout=TIMEOUT_S
                    )
                    return written
            except Conflict:
                time.sleep(random.uniform(0.02, 0.1))  # noqa: S311 (spreads writers, keeps no secret)
        raise Unavailable(f"InferenceService {self.namespace}/{name}: others wrote it {ATTEMPTS} times in a row")

    def delete(self, name: str) -> None:
        """Delete an InferenceService, if it exists."""
        try:
            with self._calling(f"deleting {name}"):
                self._objects.delete_namespaced_custom_object(**self._place, name=name, _request_timeout=TIMEOUT_S)
        except _Absent:
            log.debug("InferenceService %s/%s was gone already", self.namespace, name)

    def pods(self, selector: str) -> list[Json]:
        """Return pods by their labels."""
        with self._calling(f"listing the pods of {selector}"):
            answer = self._core.list_namespaced_pod(
                self.namespace, label_selector=selector, _preload_content=False, _request_timeout=TIMEOUT_S
            )
            items: list[Json] = json.loads(answer.data)["items"]
            return items

    def metrics(self, pod: str, port: int) -> str | None:
        """Return a pod's /metrics, through the API server; None if the pod does not answer."""
        try:
            with self._calling(f"reading the metrics of pod {pod}"):
                answer = self._core.connect_get_namespaced_pod_proxy_with_path(
                    f"{pod}:{port}", self.namespace, "metrics", _preload_content=False, _request_timeout=TIMEOUT_S
                )
                return str(answer.data.decode())
        except (_Absent, Unavailable) as error:
            log.debug("pod %s has no metrics: %s", pod, error)
            return None

    @contextmanager
    def _calling(self, what: str) -> Iterator[None]:
        """Translate the client's errors."""
        where = f"Kubernetes API, namespace {self.namespace}: {what}"
        try:
            yield
        except ApiException as error:
            message = _message(error)
            if error.status == 404:
                raise _Absent(f"{where}: {message}") from error
            if error.status == 409:
                raise Conflict(f"{where}: {message}") from error
            if error.status in (401, 403):
                raise InputError(f"{where}: not allowed: {message}; see ACCESS in traffic/kserve_api.py") from error
            if error.status in (400, 422):
                raise InputError(f"{where}: refused: {message}") from error
            raise Unavailable(f"{where}: {error.status} {message}") from error
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise Unavailable(f"{where}: no answer: {error}") from error


class _Absent(InputError):
    """There is no such object."""


def _message(error: ApiException) -> str:
    """Return the API server's own message."""
    try:
        return str(json.loads(error.body)["message"])
    except (TypeError, ValueError, KeyError):
        return str(error.reason or error.body)
