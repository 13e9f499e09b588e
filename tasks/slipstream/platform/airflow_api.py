"""The part of Airflow's REST API that slipstream uses: find a DAG, start a run once, follow it. Imports no Airflow."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import httpx

from slipstream.contract import Json
from slipstream.errors import InputError, Unavailable
from slipstream.home import Home
from slipstream.plan import flow
from slipstream.platform import addresses

FINAL = ("success", "failed")
"""Final states of a run."""


@dataclass(frozen=True)
class TaskInstance:
    """One task of a run."""

    id: str
    """Airflow's id, such as `build.int8.server`."""
    state: str | None
    """Airflow's state; None before it is scheduled."""
    started: str | None
    """ISO 8601."""
    seconds: float | None
    """Duration of the latest try so far."""
    tries: int

    @property
    def step(self) -> str:
        """Its step, or `approval` or `outcome`."""
        return flow.task_of(self.id).step

    @property
    def cell(self) -> str:
        """Its recipe or cell, such as `int8@server`; empty for a task of the whole run."""
        cell = flow.task_of(self.id).cell
        return cell.key if cell else ""


class AirflowApi:
    """A client with one log-in. Every method raises Unavailable if Airflow does not answer."""

    def __init__(self, base_url: str, user: str, password: str) -> None:
        self._client = httpx.Client(base_url=base_url, timeout=20)
        self._login = {"username": user, "password": password}

    @classmethod
    def of(cls, home: Home) -> "AirflowApi":
        """Return a client for the platform that was started for this home."""
        secrets = addresses.load_secrets(home)
        return cls(addresses.load(home).airflow, secrets.airflow_user, secrets.airflow_password)

    def dag(self, dag_id: str) -> Json | None:
        """Return a DAG's details, or None if Airflow does not know it."""
        answer = self._ask("GET", f"/dags/{dag_id}", fine=(404,))
        return None if answer.status_code == httpx.codes.NOT_FOUND else dict(answer.json())

    def wait_for_dag(self, dag_id: str, mark: str, seconds: float = 120) -> None:
        """Return when Airflow has parsed the DAG whose description contains `mark`. Raise Unavailable after that
        time."""
        self._ask_to_parse(dag_id)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            dag = self.dag(dag_id)
            if dag and not dag["is_stale"] and mark in (dag["description"] or ""):
                return
            time.sleep(0.5)
        raise Unavailable(
            f"Airflow has not read DAG {dag_id} ({mark}) within {seconds:.0f} s; "
            "see `slipstream logs airflow-dag-processor`"
        )

    def _ask_to_parse(self, dag_id: str) -> None:
        """Request parsing of the DAG's file now. All DAGs of that kind share it; the first waits for the interval."""
        kind = dag_id.partition("-")[0]
        dags = self._ask("GET", f"/dags?limit=1&dag_id_pattern={kind}-").json()["dags"]
        for dag in dags:
            self._ask("PUT", f"/parseDagFile/{dag['file_token']}", fine=(409,))

    def ensure_pool(self, name: str, slots: int, description: str) -> None:
        """Create a pool, or add missing slots: a task that needs more than exist waits forever."""
        answer = self._ask("GET", f"/pools/{name}", fine=(404,))
        if answer.status_code == httpx.codes.NOT_FOUND:
            pool = {"name": name, "slots": slots, "description": description, "include_deferred": False}
            self._ask("POST", "/pools", pool, fine=(409,))
        elif answer.json()["slots"] < slots:
            # Airflow 3.3 requires the unchanged fields too, under another name than POST does.
            self._ask("PATCH", f"/pools/{name}", {"pool": name, "slots": slots, "include_deferred": False})

    def unpause(self, dag_id: str) -> None:
        """Unpause a DAG, if it is paused."""
        self._ask("PATCH", f"/dags/{dag_id}", {"is_paused": False})

    def trigger(self, dag_id: str, run_id: str, conf: Mapping[str, object]) -> bool:
        """Start a run; return False if a run with this id was started before. Raise InputError for a refused conf."""
        body = {"dag_run_id": run_id, "logical_date": None, "conf": dict(conf)}
        answer = self._ask("POST", f"/dags/{dag_id}/dagRuns", body, fine=(400, 409, 422))
        if answer.status_code == httpx.codes.CONFLICT:
            return False
        if answer.is_error:
            raise InputError(f"Airflow refuses the run {run_id} of {dag_id}: {answer.json().get('detail')}")
        return True

    def run(self, dag_id: str, run_id: str) -> Json | None:
        """Return a run's details, or None if there is no such run."""
        answer = self._ask("GET", f"/dags/{dag_id}/dagRuns/{run_id}", fine=(404,))
        return None if answer.status_code == httpx.codes.NOT_FOUND else dict(answer.json())

    def run_under_way(self, dag_id: str) -> str | None:
        """Return the id of a running run, or None."""
        answer = self._ask("GET", f"/dags/{dag_id}/dagRuns?state=running&limit=1", fine=(404,))
        runs = answer.json().get("dag_runs", []) if answer.is_success else []
        return str(runs[0]["dag_run_id"]) if runs else None

    def tasks(self, dag_id: str, run_id: str) -> list[TaskInstance]:
        """Return all task instances of a run."""
        entries: list[Json] = []
        while True:
            query = f"limit=100&offset={len(entries)}"
            page = self._ask("GET", f"/dags/{dag_id}/dagRuns/{run_id}/taskInstances?{query}").json()
            entries += page["task_instances"]
            if len(entries) >= page["total_entries"] or not page["task_instances"]:
                return [_task(entry) for entry in entries]

    def error(self, dag_id: str, run_id: str, task: TaskInstance) -> str:
        """Return the exception message that ended a task's latest try, from its log; empty if the log has none."""
        where = f"/dags/{dag_id}/dagRuns/{run_id}/taskInstances/{task.id}/logs/{task.tries}"
        answer = self._ask("GET", f"{where}?full_content=true", fine=(404,))
        entries = answer.json().get("content", []) if answer.is_success else []
        raised = [e["error_detail"] for e in entries if isinstance(e, dict) and e.get("error_detail")]
        return str(raised[-1][0]["exc_value"]) if raised else ""

    def _ask(
        self, method: str, path: str, body: Mapping[str, object] | None = None, fine: tuple[int, ...] = ()
    ) -> httpx.Response:
        """Send one request, logged in; repeat it with a new token if the old one has expired."""
        try:
            answer = self._client.request(method, f"/api/v2{path}", json=body)
            if answer.status_code == httpx.codes.UNAUTHORIZED:
                token = self._client.post("/auth/token", json=self._login).raise_for_status().json()["access_token"]
                self._client.headers["Authorization"] = f"Bearer {token}"
                answer = self._client.request(method, f"/api/v2{path}", json=body)
            return answer if answer.status_code in fine else answer.raise_for_status()
        except httpx.HTTPError as error:
            raise Unavailable(f"Airflow at {self._client.base_url} does not answer {method} {path}: {error}") from error


def _task(entry: Json) -> TaskInstance:
    return TaskInstance(
        id=entry["task_id"],
        state=entry["state"],
        started=entry["start_date"],
        seconds=entry["duration"],
        tries=entry["try_number"],
    )
