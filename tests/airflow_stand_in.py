"""The part of Airflow's REST API that slipstream uses, over real HTTP, for tests in which Airflow itself is too slow.

It answers as Airflow 3.3 does: 401 without a token, 404 for what it does not know, 409 for a run that is there.
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class AirflowStandIn(ThreadingHTTPServer):
    """Listens on a free port; `dags` and `runs` are what it knows."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.dags: dict[str, dict[str, Any]] = {}
        self.runs: dict[tuple[str, str], dict[str, Any]] = {}
        self.tasks: list[dict[str, Any]] = []
        self.down = False
        self.token = "first"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def answer(self, method: str, parts: list[str], body: Any) -> tuple[int, Any]:
        """Status and document for a path below /api/v2/dags."""
        dag_id = parts[0]
        if dag_id not in self.dags:
            return 404, {"detail": "no such DAG"}
        if method == "PATCH":
            self.dags[dag_id] |= body
        if len(parts) == 1:
            return 200, self.dags[dag_id]
        if method == "POST":
            key = (dag_id, body["dag_run_id"])
            if key in self.runs:
                return 409, {"detail": "there already"}
            self.runs[key] = body | {"state": "queued"}
            return 200, self.runs[key]
        if len(parts) == 2:
            running = [run for (dag, _), run in self.runs.items() if dag == dag_id and run["state"] == "running"]
            return 200, {"dag_runs": running}
        if len(parts) == 4:
            return 200, {"task_instances": self.tasks, "total_entries": len(self.tasks)}
        found = self.runs.get((dag_id, parts[2]))
        return (200, found) if found else (404, {"detail": "no such run"})


class _Handler(BaseHTTPRequestHandler):
    server: AirflowStandIn

    def do_GET(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        path = self.path.partition("?")[0]
        if self.server.down:
            status, document = 503, {"detail": "down"}
        elif path == "/auth/token":
            status, document = 201, {"access_token": self.server.token}
        elif self.headers.get("Authorization") != f"Bearer {self.server.token}":
            status, document = 401, {"detail": "who are you?"}
        else:
            status, document = self.server.answer(self.command, path.split("/")[4:], body)
        text = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_POST = do_PATCH = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass
