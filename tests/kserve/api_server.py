"""A Kubernetes API server in memory: just the endpoints that slipstream and the stand-in for KServe call.

Objects of any resource are kept by path, with `resourceVersion` (409 on a stale one), `generation`, a status
subresource, merge patches, label selectors, watches, and the pod proxy. Who calls is told by the bearer token; each
call is kept as (user, verb, resource), so that a test can compare it with what RBAC grants.
"""

import copy
import itertools
import json
import threading
import urllib.error
import urllib.request
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import kubernetes

Json = dict[str, Any]
VERBS = {"GET": "get", "POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}


class Refused(Exception):
    """Answered with a Status of this code."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status = {"kind": "Status", "code": code, "reason": reason, "message": message, "status": "Failure"}


class ApiServer:
    """Serves on 127.0.0.1 until `close()`."""

    def __init__(self) -> None:
        self.calls: set[tuple[str, str, str]] = set()
        self.forbidden: set[tuple[str, str, str]] = set()
        """Calls that RBAC refuses."""
        self.rivals = 0
        """Number of the next updates that find that another client wrote in between."""
        self._objects: dict[tuple[str, str], dict[str, Json]] = {}
        self._versions = itertools.count(1)
        self._events: list[tuple[tuple[str, str], int, Json]] = []
        self._changed = threading.Condition(threading.RLock())
        self._closed = False
        handler = type("Handler", (_Handler,), {"api": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        """Base URL."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def client(self, user: str) -> kubernetes.client.ApiClient:
        """A client that calls as `user`."""
        configuration = kubernetes.client.Configuration(host=self.url)
        return kubernetes.client.ApiClient(configuration, "Authorization", f"Bearer {user}")

    def close(self) -> None:
        """Stop answering, watches included."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._server.shutdown()
        self._server.server_close()

    # Objects

    def get(self, kind: tuple[str, str], name: str) -> Json:
        with self._changed:
            found = self._objects.get(kind, {}).get(name)
            if found is None:
                raise Refused(404, "NotFound", f'{kind[1]} "{name}" not found')
            return copy.deepcopy(found)

    def select(self, kind: tuple[str, str], selector: str) -> tuple[list[Json], int]:
        wanted = dict(part.split("=", 1) for part in selector.split(",") if part)
        with self._changed:
            found = list(self._objects.get(kind, {}).values())
            return [o for o in found if wanted.items() <= o["metadata"].get("labels", {}).items()], self._version()

    def create(self, kind: tuple[str, str], body: Json) -> Json:
        with self._changed:
            name = body["metadata"]["name"]
            if name in self._objects.setdefault(kind, {}):
                raise Refused(409, "AlreadyExists", f'{kind[1]} "{name}" already exists')
            made = copy.deepcopy(body)
            made.pop("status", None)
            made["metadata"] |= {"namespace": kind[0], "uid": str(uuid.uuid4()), "generation": 1}
            return self._keep(kind, made, "ADDED")

    def update(self, kind: tuple[str, str], name: str, body: Json, part: str) -> Json:
        with self._changed:
            if self.rivals and not part:
                self.rivals -= 1
                self._keep(kind, self.get(kind, name), "MODIFIED")
            known = self.get(kind, name)
            given = body["metadata"].get("resourceVersion")
            if given is not None and given != known["metadata"]["resourceVersion"]:
                raise Refused(409, "Conflict", f'{kind[1]} "{name}": the object has been modified')
            if part == "status":
                changed = {**known, "status": body.get("status", {})}
            else:
                fixed = {k: known["metadata"][k] for k in ("uid", "generation", "namespace")}
                changed = {**body, "metadata": {**body["metadata"], **fixed}}
                changed.pop("status", None)
                changed |= {"status": known["status"]} if "status" in known else {}
                if changed.get("spec") != known.get("spec"):
                    changed["metadata"]["generation"] += 1
            return self._keep(kind, copy.deepcopy(changed), "MODIFIED")

    def delete(self, kind: tuple[str, str], name: str) -> Json:
        with self._changed:
            gone = self.get(kind, name)
            del self._objects[kind][name]
            self._publish(kind, gone, "DELETED")
            return gone

    def events(self, kind: tuple[str, str], since: int, seconds: float) -> list[tuple[int, Json]]:
        """Events after a version; waits for the first, at most so long. Raises EOFError when the server closes."""

        def found() -> list[tuple[int, Json]]:
            return [(version, event) for where, version, event in self._events if where == kind and version > since]

        with self._changed:
            self._changed.wait_for(lambda: self._closed or bool(found()), seconds)
            if self._closed:
                raise EOFError
            return found()

    def _keep(self, kind: tuple[str, str], body: Json, event: str) -> Json:
        body["metadata"]["resourceVersion"] = str(next(self._versions))
        self._objects.setdefault(kind, {})[body["metadata"]["name"]] = body
        self._publish(kind, body, event)
        return copy.deepcopy(body)

    def _publish(self, kind: tuple[str, str], body: Json, event: str) -> None:
        version = next(self._versions)
        self._events.append((kind, version, {"type": event, "object": copy.deepcopy(body)}))
        self._changed.notify_all()

    def _version(self) -> int:
        return self._events[-1][1] if self._events else 0


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    api: ApiServer

    def do_GET(self) -> None:
        self._answer()

    do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

    def _answer(self) -> None:
        length = int(self.headers.get("content-length", 0))
        body = json.loads(self.rfile.read(length)) if length else {}
        url = urlsplit(self.path)
        query = {k: v[0] for k, v in parse_qs(url.query).items()}
        try:
            self._route(unquote(url.path).strip("/").split("/"), query, body)
        except Refused as error:
            self._reply(error.status["code"], error.status)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _route(self, path: list[str], query: dict[str, str], body: Json) -> None:
        """Paths: [apis/GROUP/VERSION | api/v1]/namespaces/NAMESPACE/RESOURCE[/NAME[/SUBRESOURCE[/…]]]."""
        place = path[path.index("namespaces") + 1 :]
        kind, rest = (place[0], place[1]), place[2:]
        verb = VERBS[self.command]
        if verb == "get" and not rest:
            verb = "watch" if query.get("watch") else "list"
        user = self.headers.get("Authorization", "").removeprefix("Bearer ")
        call = (user, verb, "/".join([kind[1], *rest[1:2]]))
        self.api.calls.add(call)
        if call in self.api.forbidden:
            raise Refused(403, "Forbidden", f'User "{user}" cannot {verb} resource "{call[2]}"')
        if verb == "watch":
            self._watch(kind, int(query.get("resourceVersion", 0)))
        elif rest[1:2] == ["proxy"]:
            self._proxy(kind, rest[0], "/".join(rest[2:]))
        else:
            code, answer = self._call(verb, kind, rest, query, body)
            self._reply(code, answer)

    def _call(
        self, verb: str, kind: tuple[str, str], rest: list[str], query: dict[str, str], body: Json
    ) -> tuple[int, Json]:
        part = rest[1] if len(rest) > 1 else ""
        if verb == "list":
            items, version = self.api.select(kind, query.get("labelSelector", ""))
            return 200, {"kind": "List", "metadata": {"resourceVersion": str(version)}, "items": items}
        if verb == "create":
            return 201, self.api.create(kind, body)
        if verb == "get":
            return 200, self.api.get(kind, rest[0])
        if verb == "delete":
            return 200, self.api.delete(kind, rest[0])
        if verb == "patch":
            body = _merged(self.api.get(kind, rest[0]), body)
        return 200, self.api.update(kind, rest[0], body, part)

    def _watch(self, kind: tuple[str, str], since: int) -> None:
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        while True:
            for version, event in self.api.events(kind, since, 1.0):
                line = json.dumps(event).encode() + b"\n"
                self.wfile.write(f"{len(line):x}\r\n".encode() + line + b"\r\n")
                since = version

    def _proxy(self, kind: tuple[str, str], target: str, path: str) -> None:
        """A pod's server. The stand-in's pods all live at 127.0.0.1; an annotation says at which port really."""
        pod = self.api.get(kind, target.partition(":")[0])
        address = f"http://{pod['status']['podIP']}:{pod['metadata']['annotations']['stand-in/port']}/{path}"
        try:
            with urllib.request.urlopen(address, timeout=5) as answer:
                self._send(answer.status, answer.read(), "text/plain")
        except (urllib.error.URLError, OSError) as error:
            raise Refused(503, "ServiceUnavailable", f"error trying to reach service: {error}") from error

    def _reply(self, code: int, body: Json) -> None:
        self._send(code, json.dumps(body).encode(), "application/json")

    def _send(self, code: int, content: bytes, kind: str) -> None:
        self.send_response(code)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Calls are kept in `calls`."""


def _merged(known: Json, patch: Json) -> Json:
    """RFC 7386."""
    found = dict(known)
    for key, value in patch.items():
        if value is None:
            found.pop(key, None)
        else:
            found[key] = _merged(found.get(key, {}), value) if isinstance(value, dict) else value
    return found
