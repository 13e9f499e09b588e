"""`slipstream up` and `down`: the embedded platform as a whole."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from slipstream.errors import InputError, Unavailable
from slipstream.home import Home, file_lock
from slipstream.platform import (
    addresses,
    airflow,
    health,
    mlflow_server,
    object_store,
    postgresql,
    processes,
    programs,
    supervisor,
)
from slipstream.platform.addresses import Addresses, Profile, Secrets, port_of
from slipstream.platform.health import ServiceStatus
from slipstream.platform.processes import Process
from slipstream.platform.programs import Program
from slipstream.traffic import envoy

log = logging.getLogger(__name__)

SILENT_FOR_S = 300
"""How long services may neither change nor log before `up` gives up. Airflow takes 15 to 60 s on two cores, 150 s under
a load of 12, and more than 5 min under one of 20, but it logs meanwhile."""
STARTS = 10
"""Maximum starts of a service while `up` waits: one that ends this often will not start."""

DATA = ("airflow/airflow.db", "mlflow/mlflow.db", "postgresql/version", "object-store/formatted")
"""Files that show that a home contains data, and must keep its profile."""

Listener = Callable[[list[ServiceStatus]], None]


def up(home: Home, watch: Listener, *, new_ports: bool = False, profile: Profile | None = None) -> Addresses:
    """Start everything that is not running, and return when everything answers; `watch` receives the progress.

    Profile, ports and secrets are chosen at the first call and stored. Raise Unavailable if a port is taken
    (`new_ports` chooses others instead), a program is not installed, or a service or a release does not start;
    InputError if the home contains the data of another profile.
    """
    with _locked(home):
        chosen = _profile(home, profile)
        if supervisor.running_pid(home) is None:
            _sort_out_orphans(home)
        endpoints = _addresses(home, new_ports, chosen)
        secrets = addresses.ensure_secrets(home)
        environment = _environment(home, endpoints, secrets)
        with_airflow = environment | airflow.settings(home, endpoints, secrets) | _database_access(home, endpoints)
        envoy.bootstrap(home, port_of(endpoints.envoy))
        _start_stores(home, endpoints, secrets)
        # MLflow and Envoy start while Airflow's database is created.
        supervisor.start(home, mlflow_server.program(home, endpoints, secrets, environment))
        supervisor.start(home, envoy.program(home))
        airflow.prepare(home, with_airflow, secrets)
        for program in (*airflow.programs(home, with_airflow), _triggers(home, environment)):
            supervisor.start(home, program)
        _await_healthy(home, endpoints, watch)
        airflow.ensure_pools(home)
        lost = envoy.controller(home).bring_back()
        if lost:
            raise Unavailable("the platform is up, but not every release:\n" + "\n".join(lost.values()))
        return endpoints


def _sort_out_orphans(home: Home) -> None:
    """After the death of supervisord, stop what its successor cannot take over. The programs themselves continue.

    supervisor.start starts the successor, under which each program is taken over from its record (launch.py).
    """
    orphaned = supervisor.states(home)
    if postgresql.NAME not in orphaned:
        postgresql.stop_left_over(home)
    stopped = processes.stop_orphans(home, keep=programs.names(home))
    if stopped:
        log.info("stopped %d processes that a killed platform had left running", len(stopped))
    if orphaned:
        log.info("taking over what a killed supervisord left running: %s", ", ".join(orphaned))


def revive(home: Home) -> bool:
    """Restart supervisord if it was killed; its running programs are taken over. Return whether it was necessary.

    Raise Unavailable, also while `up` or `down` is running, which do it themselves.
    """
    if supervisor.running_pid(home) is not None:
        return False
    with file_lock(home.root / "platform.lock", f"{home.root} is being started or stopped", wait=False):
        if supervisor.running_pid(home) is not None:
            return False
        supervisor.ensure_running(home)
        return True


def down(home: Home) -> list[Process]:
    """Stop everything of this home; data, ports and deployed releases are kept. Return additionally stopped programs.

    The scheduler goes first, while the API server still accepts the last messages of its tasks; the stores go last.
    """
    if not home.root.exists():
        return []
    with _locked(home):
        supervisor.shutdown(home, first=(airflow.SCHEDULER,), last=(postgresql.NAME, object_store.NAME))
        postgresql.stop_left_over(home)
        return processes.stop_orphans(home)


def _profile(home: Home, requested: Profile | None) -> Profile:
    """Return the profile of this home: the requested or the existing one. Raise InputError, Unavailable."""
    current = addresses.load(home).profile if home.addresses_file().exists() else None
    chosen = requested or current or "local"
    if current not in (None, chosen) and any((home.root / path).exists() for path in DATA):
        raise InputError(
            f"{home.root} holds data of profile {current}, which profile {chosen} cannot read; choose another "
            f"SLIPSTREAM_HOME for it, or start this one with `slipstream up --profile {current}`"
        )
    if chosen == "server":  # missing programs are reported before anything is created
        postgresql.programs_folder(home)
        object_store.binary(home)
    return chosen


def _addresses(home: Home, new_ports: bool, profile: Profile) -> Addresses:
    """Return the addresses, with no foreign process on any of their ports. Raise Unavailable."""
    endpoints = addresses.choose(home, set(), profile)
    ours = {p.pid for p in processes.supervised(home)}
    running = {name for name, state in supervisor.states(home).items() if state.state == "RUNNING"}
    conflicts: dict[int, str] = {}
    for name, url in endpoints.urls().items():
        port = port_of(url)
        # PostgreSQL's process may belong to another user, whose ports cannot be looked up.
        if addresses.is_free(port) or name in running & {postgresql.NAME}:
            continue
        owner = processes.listener(port)
        if owner is None or owner.pid not in ours:
            who = f"pid {owner.pid} ({owner.command[:100]})" if owner else "another user's process"
            conflicts[port] = f"port {port}, where {name} listens, is taken by {who}"
    if not conflicts:
        return endpoints
    if not new_ports:
        raise Unavailable(
            "\n".join(conflicts.values())
            + "\nstop that process, or choose other ports with `slipstream up --new-ports`"
        )
    return addresses.choose(home, set(conflicts), profile)


def _start_stores(home: Home, endpoints: Addresses, secrets: Secrets) -> None:
    """Start the stores of profile `server`, PostgreSQL and the object store, before the services that use them."""
    if endpoints.postgresql is not None:
        postgresql.prepare(home, secrets)
        supervisor.start(home, postgresql.program(home, endpoints.postgresql))
    if endpoints.s3 is not None:
        object_store.prepare(home)
        supervisor.start(home, object_store.program(home, endpoints.s3, secrets))
        object_store.await_ready(home, endpoints.s3)
        object_store.ensure_bucket(endpoints.s3, secrets)
    if endpoints.postgresql is not None:
        postgresql.await_ready(home, endpoints.postgresql)
        postgresql.ensure_databases(
            home, endpoints.postgresql, (postgresql.AIRFLOW, postgresql.MLFLOW, mlflow_server.USERS)
        )


def _database_access(home: Home, endpoints: Addresses) -> dict[str, str]:
    """Return the variables that Airflow and MLflow need for their databases; steps do not need them."""
    return {} if endpoints.postgresql is None else postgresql.environment(home)


def _environment(home: Home, endpoints: Addresses, secrets: Secrets) -> dict[str, str]:
    """Return the variables for every program and every step that it starts."""
    return (object_store.environment(endpoints.s3, secrets) if endpoints.s3 else {}) | {
        "SLIPSTREAM_HOME": str(home.root),
        "SLIPSTREAM_ENVS": str(home.envs),
        "SLIPSTREAM_CODE": str(home.code),
        "SLIPSTREAM_SPECS": home.specs,
        "SLIPSTREAM_RUNS": home.runs,
        **addresses.mlflow_variables(endpoints, secrets),
        # Retries after 0, 2, 4, … s: a server that is unavailable for a minute only delays a step.
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "8",
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        # MLflow looks for git to record the source version; a missing git is not an error.
        "GIT_PYTHON_REFRESH": "quiet",
        "PYTHONUNBUFFERED": "1",
    }


def _triggers(home: Home, environment: dict[str, str]) -> Program:
    command = (str(home.python("airflow")), "-m", "slipstream.orchestrate.triggers.server")
    return Program("triggers", command, environment)


def _await_healthy(home: Home, endpoints: Addresses, watch: Listener) -> None:
    """Wait as long as there is progress, which on a busy machine may take many minutes. Raise Unavailable."""
    required = health.expected(endpoints)
    patience = _Patience(home)
    while True:
        now = [s for s in health.status(home, endpoints) if s.name in required]
        watch(now)
        missing = [s for s in now if not s.healthy]
        if not missing:
            return
        if broken := [s for s in missing if s.state == "FATAL"] or patience.exhausted(missing, time.monotonic()):
            raise Unavailable("\n".join(_why(home, s) for s in broken))
        time.sleep(1)


class _Patience:
    """Decides when to stop waiting for services: none progressed for long, or one is restarted again and again."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._seen: dict[str, tuple[str, int | None, int]] = {}
        self._processes: dict[str, set[int]] = {}
        self._moved_s = -float("inf")

    def exhausted(self, missing: list[ServiceStatus], now_s: float) -> list[ServiceStatus]:
        """Return the services to give up; empty while progress is possible: a service's state or log changes."""
        snapshot = {s.name: (s.state, s.pid, self._log_bytes(s.name)) for s in missing}
        if snapshot != self._seen:
            self._seen, self._moved_s = snapshot, now_s
        for s in missing:
            self._processes.setdefault(s.name, set()).update({s.pid} if s.pid else ())
        if now_s - self._moved_s > SILENT_FOR_S:
            return missing
        return [s for s in missing if len(self._processes[s.name]) > STARTS]

    def _log_bytes(self, name: str) -> int:
        log = programs.log_file(self._home, name)
        return log.stat().st_size if log.exists() else 0


def _why(home: Home, service: ServiceStatus) -> str:
    log = programs.log_file(home, service.name)
    tail = log.read_text(errors="replace")[-1500:] if log.exists() else "(no log)"
    return f"{service.name} is not healthy ({service.state}); its log {log} ends with:\n{tail}"


@contextmanager
def _locked(home: Home) -> Iterator[None]:
    """Hold the lock for one `up` or `down` at a time; a second one waits."""
    home.prepare()
    with file_lock(home.root / "platform.lock"):
        yield
