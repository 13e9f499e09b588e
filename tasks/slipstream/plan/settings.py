"""The installation's settings: where steps run, in which images, with how much of a machine.

One YAML file, `settings.yaml` in SLIPSTREAM_HOME or where SLIPSTREAM_SETTINGS says; without one the defaults hold. A
spec may override the resources of its steps (`resources:`), and nothing else: a spec that runs on a laptop runs on a
cluster unchanged.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, ValidationError

from slipstream.contract import Section
from slipstream.digests import versions
from slipstream.errors import SpecError
from slipstream.home import Home
from slipstream.plugins import SERVE
from slipstream.spec import Resources, Spec


class Docker(Section):
    """Steps as containers of the Docker daemon on this machine. SLIPSTREAM_HOME and the code are mounted."""

    url: str | None = None
    """Daemon; DOCKER_HOST or the usual socket when none is given."""
    network: str = "host"
    """Network of the containers. They must reach MLflow, Envoy and the store."""
    mounts: tuple[str, ...] = ()
    """Further folders, `SOURCE:TARGET[:ro]`, such as data that the spec's functions read."""


class Serving(Section):
    """Engines as InferenceServices of KServe (SLIPSTREAM_TRAFFIC=kserve)."""

    runtime: Literal["slipstream", "stock"] = "slipstream"
    """Who serves an engine: the image of the environment `serve`, or the runtime that KServe has for its format."""
    namespace: str | None = None
    """Namespace of the InferenceServices; that of the step pods when none is given."""
    service_account: str | None = None
    """Service account of the model servers, to which the store's credentials are attached in KServe's way."""
    min_replicas: Annotated[int, Field(ge=1)] = 1
    """Model servers of a release that are always there."""
    max_replicas: Annotated[int, Field(ge=1)] | None = None
    """Model servers of a release at most; unlimited when none is given."""
    ready_timeout_s: Annotated[int, Field(gt=0)] = 600
    """How long a release may take to be scheduled, to fetch its engine and to be ready, in seconds."""


class Kubernetes(Section):
    """Steps as pods."""

    namespace: str = "slipstream"
    """Namespace of the pods."""
    service_account: str = "slipstream-step"
    """Service account of steps that only compute; it has no rights."""
    release_service_account: str = "slipstream-release"
    """Service account of steps that move traffic (trial, rollout, rollback)."""
    pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    """Image pull policy."""
    pull_secrets: tuple[str, ...] = ()
    """Secrets with the registry's credentials."""
    env_from_config_maps: tuple[str, ...] = ()
    """ConfigMaps whose keys become environment variables, such as the addresses of MLflow and the store."""
    env_from_secrets: tuple[str, ...] = ()
    """Secrets whose keys become environment variables, such as the store's credentials."""
    cache_claim: str | None = None
    """PersistentVolumeClaim for cached artefacts and checkpoints; without one they live as long as the pod."""
    code_config_map: str | None = None
    """ConfigMap with the user's Python files, mounted at SLIPSTREAM_CODE; without one the image holds the code."""
    settings_config_map: str | None = None
    """ConfigMap with these settings as `settings.yaml`, for the steps that move traffic; they read how to serve."""
    keep_failed_hours: Annotated[float, Field(ge=0)] = 24.0
    """How long a failed pod is kept for a look at it."""
    start_timeout_s: Annotated[int, Field(gt=0)] = 600
    """How long a pod may take to be scheduled and to pull its image, in seconds."""
    host_network: bool = False
    """Whether pods share the node's network; for test clusters without a network of their own."""
    serving: Serving = Serving()
    """How engines are served; their resources are those of `serving` in `resources`."""


class Settings(Section):
    """What the installation says."""

    runtime: str = "subprocess"
    """Where steps run: `subprocess`, `docker` or `kubernetes`. SLIPSTREAM_RUNTIME overrides it."""
    image: str = "slipstream-{environment}:{version}"
    """Images of the environments; `{environment}` is `torch`, `serve`, …, `{version}` slipstream's own version."""
    environment: dict[str, str] = Field(default={})
    """Environment variables for every step, beside those of the platform."""
    resources: dict[str, Resources] = Field(default={})
    """What a step may use, by the step's name; `default` is for all steps. Specs override it."""
    docker: Docker = Docker()
    """For the runtime `docker`."""
    kubernetes: Kubernetes = Kubernetes()
    """For the runtime `kubernetes`."""

    def resources_of(self, step: str, spec: Spec) -> Resources:
        """Resources of a step, most specific first: spec's step, spec's default, settings' step, settings' default."""
        resources = Resources()
        for table in (self.resources, spec.resources):
            for key in ("default", step):
                if key in table:
                    resources = table[key].on_top_of(resources)
        return resources

    def resources_of_servers(self) -> Resources:
        """Resources of a model server on Kubernetes."""
        return self.resources.get("serving", Resources()).on_top_of(self.resources.get("default", Resources()))

    def image_of_servers(self, environment: str = SERVE) -> str:
        """Image of a model server on Kubernetes; `environment` is that of the engine's servers."""
        default = self.image.format(environment=environment, version=versions("slipstream")["slipstream"])
        return self.resources_of_servers().image or default

    def image_of(self, step: str, spec: Spec, target: str | None = None) -> str:
        """Image of a step: the one that its resources name, or its environment's. `target` is that of its cell."""
        environment = spec.environment_of(step, target)
        default = self.image.format(environment=environment, version=versions("slipstream")["slipstream"])
        return self.resources_of(step, spec).image or default


def path_of(home: Home) -> Path:
    """Where the settings lie."""
    return Path(os.environ.get("SLIPSTREAM_SETTINGS", home.root / "settings.yaml"))


def load(home: Home) -> Settings:
    """Read the settings; defaults when there is no file. Raises SpecError with one line for each mistake."""
    path = path_of(home)
    chosen = os.environ.get("SLIPSTREAM_RUNTIME")
    document: object = {}
    if path.exists():
        try:
            document = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except (OSError, yaml.YAMLError) as error:
            raise SpecError(f"{path}: cannot be read: {error}") from None
    if not isinstance(document, Mapping):
        raise SpecError(f"{path}: settings are a mapping of keys to values, not {type(document).__name__}")
    try:
        return Settings.model_validate({**document, **({"runtime": chosen} if chosen else {})})
    except ValidationError as error:
        lines = [f"{path}: {'.'.join(map(str, e['loc']))}: {e['msg']}, not {e['input']!r}" for e in error.errors()]
        raise SpecError("\n".join(lines)) from None
