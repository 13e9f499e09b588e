"""The installation's settings: where steps run, in which images, with how much of a machine.

One YAML file, `settings.yaml` in SLIPSTREAM_HOME or the file that SLIPSTREAM_SETTINGS names; without one, defaults
apply. A spec may override only the resources of its steps (`resources:`): a spec that runs on a laptop runs on a
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
    """Address of the daemon; by default, DOCKER_HOST or the usual socket."""
    network: str = "host"
    """Network of the containers. They must reach MLflow, Envoy and the store."""
    mounts: tuple[str, ...] = ()
    """Additional folders, `SOURCE:TARGET[:ro]`, such as data that the spec's functions read."""


class Serving(Section):
    """Engines as KServe InferenceServices (SLIPSTREAM_TRAFFIC=kserve)."""

    runtime: Literal["slipstream", "stock"] = "slipstream"
    """Server of an engine: the image of the environment `serve`, or KServe's runtime for its format."""
    namespace: str | None = None
    """Namespace of the InferenceServices; by default, that of the step pods."""
    service_account: str | None = None
    """Service account of the model servers, with the store's credentials attached as KServe expects."""
    min_replicas: Annotated[int, Field(ge=1)] = 1
    """Minimum number of model servers of a release."""
    max_replicas: Annotated[int, Field(ge=1)] | None = None
    """Maximum number of model servers of a release; by default, unlimited."""
    ready_timeout_s: Annotated[int, Field(gt=0)] = 600
    """Time limit for a release to be scheduled, fetch its engine and become ready, in seconds."""


class Kubernetes(Section):
    """Steps as pods."""

    namespace: str = "slipstream"
    """Namespace of the pods."""
    service_account: str = "slipstream-step"
    """Service account of steps that only compute; it has no permissions."""
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
    """PersistentVolumeClaim for cached artifacts and checkpoints; without one, they last as long as the pod."""
    code_config_map: str | None = None
    """ConfigMap with the user's Python files, mounted at SLIPSTREAM_CODE; without one, the image contains the code."""
    settings_config_map: str | None = None
    """ConfigMap with these settings as `settings.yaml`, for the steps that move traffic, which need `serving`."""
    keep_failed_hours: Annotated[float, Field(ge=0)] = 24.0
    """How long a failed pod is kept for inspection."""
    start_timeout_s: Annotated[int, Field(gt=0)] = 600
    """Time limit for a pod to be scheduled and to pull its image, in seconds."""
    host_network: bool = False
    """Whether pods share the node's network; for test clusters without a pod network."""
    serving: Serving = Serving()
    """How engines are served; their resources are those of `serving` in `resources`."""


class Settings(Section):
    """Settings of the installation."""

    runtime: str = "subprocess"
    """Where steps run: `subprocess`, `docker` or `kubernetes`. SLIPSTREAM_RUNTIME overrides it."""
    image: str = "slipstream-{environment}:{version}"
    """Images of the environments; `{environment}` is `torch`, `serve`, …, `{version}` slipstream's own version."""
    environment: dict[str, str] = Field(default={})
    """Environment variables for every step, in addition to those of the platform."""
    resources: dict[str, Resources] = Field(default={})
    """What a step may use, by step name; `default` applies to all steps. Specs override it."""
    docker: Docker = Docker()
    """For the runtime `docker`."""
    kubernetes: Kubernetes = Kubernetes()
    """For the runtime `kubernetes`."""

    def resources_of(self, step: str, spec: Spec) -> Resources:
        """Return a step's resources, most specific first: spec's step, spec's default, settings' step and default."""
        resources = Resources()
        for table in (self.resources, spec.resources):
            for key in ("default", step):
                if key in table:
                    resources = table[key].on_top_of(resources)
        return resources

    def resources_of_servers(self) -> Resources:
        """Return the resources of a model server on Kubernetes."""
        return self.resources.get("serving", Resources()).on_top_of(self.resources.get("default", Resources()))

    def image_of_servers(self, environment: str = SERVE) -> str:
        """Return the image of a model server on Kubernetes; `environment` is that of the engine's servers."""
        default = self.image.format(environment=environment, version=versions("slipstream")["slipstream"])
        return self.resources_of_servers().image or default

    def image_of(self, step: str, spec: Spec, target: str | None = None) -> str:
        """Return a step's image: the one that its resources name, or its environment's. `target` is its cell's."""
        environment = spec.environment_of(step, target)
        default = self.image.format(environment=environment, version=versions("slipstream")["slipstream"])
        return self.resources_of(step, spec).image or default


def path_of(home: Home) -> Path:
    """Return the path of the settings."""
    return Path(os.environ.get("SLIPSTREAM_SETTINGS", home.root / "settings.yaml"))


def load(home: Home) -> Settings:
    """Read the settings, or return defaults if there is no file. Raise SpecError with one line for each mistake."""
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
