"""Whether each service runs and answers, for `slipstream status` and `slipstream up`."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

import httpx

from slipstream.contract import Document
from slipstream.errors import Unavailable
from slipstream.home import Home
from slipstream.platform import airflow, object_store, postgresql, processes, supervisor
from slipstream.platform.addresses import Addresses, port_of
from slipstream.platform.supervisor import ABSENT, ProcessState
from slipstream.traffic.envoy_admin import Admin

# Keys of Airflow's health document.
_AIRFLOW_PARTS = {
    airflow.SCHEDULER: "scheduler",
    "airflow-dag-processor": "dag_processor",
    "airflow-triggerer": "triggerer",
}


class ServiceStatus(Document):
    """Current state of a service."""

    name: str
    state: str
    """supervisord's state: `RUNNING`, `STARTING`, `BACKOFF`, `FATAL`, …; `ABSENT`, or `ORPHANED` if supervisord was
    killed and the service was left running."""
    pid: int | None
    address: str | None
    memory_mib: float
    """Of the process and its children; 0 if it does not run."""
    healthy: bool
    """Whether it answers and supervisord would restart it."""
    note: str | None = None
    """Details of a problem, if known."""


def expected(addresses: Addresses) -> dict[str, str | None]:
    """Return the platform's own services and their addresses, in the order in which they are started."""
    stores = {postgresql.NAME: addresses.postgresql, object_store.NAME: addresses.s3}
    return {
        **{name: address for name, address in stores.items() if address is not None},
        "mlflow": addresses.mlflow,
        "envoy": addresses.envoy,
        "triggers": addresses.triggers,
        **{name: addresses.airflow if name == airflow.API_SERVER else None for name in airflow.COMMANDS},
    }


def status(home: Home, addresses: Addresses) -> list[ServiceStatus]:
    """Return every service of the platform, then the model servers."""
    states = supervisor.states(home)
    servers = _model_servers(home)
    # A user's own program is shown too.
    services = expected(addresses) | {name: servers.get(name) for name in sorted((states | servers).keys())}
    services |= expected(addresses)
    with httpx.Client(timeout=5) as client:
        probe = _Probe(home, addresses, client, _airflow_health(addresses), _ejected(home))
        return [_one(name, address, states.get(name, ABSENT), probe) for name, address in services.items()]


@dataclass(frozen=True)
class _Probe:
    """Asks a running service whether it is ready."""

    home: Home
    addresses: Addresses
    client: httpx.Client
    airflow_health: Mapping[str, object]
    ejected: Mapping[str, str]
    """What happens to the requests of each model server's program that Envoy has ejected."""

    def healthy(self, name: str, address: str | None, pid: int) -> bool | None:
        """Return whether the service is ready; None for a program without an address."""
        if name in _AIRFLOW_PARTS:
            return _beats(self.airflow_health.get(_AIRFLOW_PARTS[name]), _AIRFLOW_PARTS[name], pid)
        if name == postgresql.NAME and address:
            return postgresql.healthy(self.home, address)
        if name == "envoy":
            return Admin(self.home.envoy).ready()
        urls = {
            object_store.NAME: f"{address}{object_store.HEALTH}",
            "mlflow": f"{self.addresses.mlflow}/health",
            "triggers": f"{self.addresses.triggers}/health",
            airflow.API_SERVER: f"{self.addresses.airflow}/api/v2/monitor/health",
        }
        url = urls.get(name) or (f"{address}/v2/health/ready" if address else None)
        return _answers(self.client, url) if url else None


def _one(name: str, address: str | None, state: ProcessState, probe: _Probe) -> ServiceStatus:
    # First the port, then the answer: the last answer of a leftover process that ends in between must not count.
    note = _wrong(name, address, state) or probe.ejected.get(name)
    answer = probe.healthy(name, address, state.pid) if state.pid else False
    return ServiceStatus(
        name=name,
        state=state.state,
        pid=state.pid,
        address=address,
        memory_mib=round(processes.memory_mib(state.pid), 1) if state.pid else 0.0,
        healthy=(state.state == "RUNNING" if answer is None else answer) and note is None,
        note=note,
    )


def _wrong(name: str, address: str | None, state: ProcessState) -> str | None:
    """Return problems that an answer does not show: an unsupervised service, or an answer from another process."""
    if state.state == supervisor.ORPHANED:
        return "supervisord was killed: nothing would start it again; `slipstream up` takes it over"
    # PostgreSQL's files may be inaccessible to this user.
    if state.pid is None or address is None or name == postgresql.NAME:
        return None
    port = port_of(address)
    if processes.holds_port(state.pid, port) or (owner := processes.listener(port)) is None:
        return None
    return f"port {port} is held by pid {owner.pid}, which is not of this service: {owner.command[:80]}"


def _ejected(home: Home) -> dict[str, str]:
    try:
        ejected = Admin(home.envoy).ejected()
    except Unavailable:  # as its own line says
        return {}
    return {
        f"server-{key}": f"ejected by Envoy: {fallback} answers its requests" if fallback else "not healthy to Envoy"
        for key, fallback in ejected.items()
    }


def _answers(client: httpx.Client, url: str) -> bool:
    try:
        return client.get(url).status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False


def _airflow_health(addresses: Addresses) -> Mapping[str, object]:
    try:
        answer = httpx.get(f"{addresses.airflow}/api/v2/monitor/health", timeout=10).json()
    except (httpx.HTTPError, ValueError):
        return {}
    return answer if isinstance(answer, Mapping) else {}


def _beats(part: object, name: str, pid: int) -> bool:
    """Return whether this exact process has sent a heartbeat: a killed predecessor stays `healthy` for 30 s."""
    if not isinstance(part, Mapping) or part.get("status") != "healthy":
        return False
    beat = part.get(f"latest_{name}_heartbeat")
    return bool(beat) and datetime.fromisoformat(str(beat)).timestamp() >= processes.started_at(pid)


def _model_servers(home: Home) -> dict[str, str]:
    """Return base URLs of the deployed releases by program name (traffic/envoy.py writes the records)."""
    urls = {}
    for record in home.releases.glob("*/deployment.json"):
        urls[f"server-{record.parent.name}"] = f"http://127.0.0.1:{json.loads(record.read_text())['port']}"
    return urls
