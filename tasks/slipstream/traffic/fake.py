"""An in-memory controller, for tests and for trying stages 2 and 3 without Envoy: one HTTP server plays all releases.

Requests are really sent, split and mirrored; only processes, files and Envoy are left out. A release's behavior is a
`Behaviour`, so a bad challenger is one line.
"""

import json
import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np

from slipstream.contract import Release
from slipstream.contract.arrays import Array
from slipstream.errors import RegistryError, Unavailable
from slipstream.frameworks.base import OUTPUT
from slipstream.serving import client
from slipstream.serving.answers import LIMIT_BYTES, AnswerLog
from slipstream.traffic.base import Endpoint, Observation, Routes, require_judged

Answer = Callable[[Array], Array]


def first_values(batch: Array) -> Array:
    """Return (N, 10) logits for (N, …): the first ten values of each sample."""
    return np.asarray(batch, dtype=np.float32).reshape(len(batch), -1)[:, :10]


@dataclass
class Behaviour:
    """How a release answers."""

    answer: Answer = first_values
    error_rate: float = 0.0
    """Share of requests answered with 500."""
    hang_rate: float = 0.0
    """Share of requests whose connection is closed without an answer, and which no counter shows."""
    refuse_rate: float = 0.0
    """Share of requests refused as an overloaded server does: with 429 and its header."""
    latency_s: float = 0.001
    memory_mib: float = 100.0


@dataclass
class _Deployed:
    engine: Path
    behaviour: Behaviour
    requests: int = 0
    errors: int = 0


@dataclass
class FakeController:
    """Implements `TrafficController` (traffic/base.py). `close()` stops its HTTP server."""

    folder: Path
    """Where the answer logs go."""
    behaviours: dict[str, Behaviour] = field(default_factory=dict)
    """Behavior by release name; a release that is not named answers correctly."""
    seed: int = 0
    log_bytes: int = LIMIT_BYTES
    """Size at which an answer log is rotated."""
    hosts: set[str] = field(default_factory=set)
    """Host headers of received requests."""

    def __post_init__(self) -> None:
        self._deployed: dict[str, dict[str, _Deployed]] = {}
        self._routes: dict[str, Routes] = {}
        self._random = random.Random(self.seed)  # noqa: S311 (splits traffic, keeps no secret)
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"fake": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()

    def misbehave(self, release: Release, behaviour: Behaviour) -> None:
        """Change how a release answers, even if it is already deployed."""
        self.behaviours[release.name] = behaviour
        if release.name in self._deployed.get(release.model, {}):
            self._deployed[release.model][release.name].behaviour = behaviour

    def deploy(self, release: Release, engine: Path, sha256: str | None = None) -> None:
        """See the protocol."""
        require_judged(release, engine, sha256)
        releases = self._deployed.setdefault(release.model, {})
        if release.name in releases and releases[release.name].engine != engine:
            raise RegistryError(f"{release.key} is deployed with another engine; deploy this one under its own name")
        behaviour = self.behaviours.get(release.name, Behaviour())
        releases.setdefault(release.name, _Deployed(engine, behaviour))

    def retire(self, release: Release) -> None:
        """See the protocol."""
        routes = self.routes(release.model)
        if routes.weights.get(release.name) or routes.mirror == release.name:
            raise RegistryError(f"{release.key} has traffic ({routes.weights}); move it first")
        self._deployed.get(release.model, {}).pop(release.name, None)

    def deployed(self, model: str) -> set[str]:
        """See the protocol."""
        return set(self._deployed.get(model, {}))

    def releases(self, model: str) -> set[str]:
        """See the protocol."""
        return self.deployed(model)

    def routes(self, model: str) -> Routes:
        """See the protocol."""
        return self._routes.get(model, Routes(weights={}))

    def set_routes(self, model: str, routes: Routes) -> None:
        """See the protocol."""
        unknown = {*routes.weights, *([routes.mirror] if routes.mirror else [])} - self.deployed(model)
        if unknown:
            raise RegistryError(f"{model}: {', '.join(sorted(unknown))} is not deployed; do that first")
        self._routes[model] = Routes(weights={n: w for n, w in routes.weights.items() if w}, mirror=routes.mirror)

    def observe(self, release: Release) -> Observation:
        """See the protocol."""
        deployed = self._deployed.get(release.model, {}).get(release.name)
        if deployed is None:
            return Observation(0, 0, 0.0)
        return Observation(deployed.requests, deployed.errors, deployed.behaviour.memory_mib)

    def endpoint(self, model: str) -> Endpoint:
        """See the protocol."""
        return Endpoint(f"http://127.0.0.1:{self._server.server_address[1]}")

    def mirror(self, model: str) -> Endpoint | None:
        """See the protocol. The fake mirrors."""
        return None

    def answers(self, release: Release) -> Path:
        """See the protocol."""
        return self.folder / f"{release.key}.jsonl"

    def handle(self, model: str, request_id: str, content: bytes) -> tuple[int, str, bytes]:
        """Answer one request: status, release, body. The mirrored copy is answered too and discarded."""
        routes = self.routes(model)
        if not routes.weights:
            return 404, "", b"{}"
        if routes.mirror is not None:
            copy = (Release(model=model, name=routes.mirror), request_id, content)
            threading.Thread(target=self._copy, args=copy, daemon=True).start()
        with self._lock:
            [name] = self._random.choices(list(routes.weights), list(routes.weights.values()))
        status, body = self._answer(Release(model=model, name=name), request_id, content)
        return status, name, body

    def _copy(self, release: Release, request_id: str, content: bytes) -> None:
        with suppress(_Hangs):
            self._answer(release, request_id, content)

    def _answer(self, release: Release, request_id: str, content: bytes) -> tuple[int, bytes]:
        target = self._deployed[release.model][release.name]
        with self._lock:
            behaviour, draw = target.behaviour, self._random.random()
            if draw < behaviour.hang_rate:
                raise _Hangs
            target.requests += 1
            refused = draw < behaviour.hang_rate + behaviour.refuse_rate
            failed = not refused and draw < behaviour.hang_rate + behaviour.refuse_rate + behaviour.error_rate
            target.errors += failed
        if failed or refused:
            return HTTPStatus.TOO_MANY_REQUESTS if refused else HTTPStatus.INTERNAL_SERVER_ERROR, b"{}"
        begun = time.perf_counter()
        time.sleep(target.behaviour.latency_s)
        output = np.asarray(target.behaviour.answer(_decode(content)), dtype=np.float32)
        self._log(release, request_id, output, 1000 * (time.perf_counter() - begun))
        tensor = {"name": OUTPUT, "shape": list(output.shape), "datatype": "FP32", "data": output.ravel().tolist()}
        return 200, json.dumps({"model_name": release.model, "outputs": [tensor]}).encode()

    def _log(self, release: Release, request_id: str, output: Array, latency_ms: float) -> None:
        with self._lock:
            log = AnswerLog(self.answers(release), release.key, self.log_bytes)
            log.write(request_id, latency_ms, output)
            log.close()


def _decode(content: bytes) -> Array:
    tensor = json.loads(content)["inputs"][0]
    return np.asarray(tensor["data"]).reshape(tensor["shape"])


class _Hangs(Exception):
    """This request is never answered."""


class _Server(ThreadingHTTPServer):
    request_queue_size = 128
    """As many as a load may open at once; with the usual 5, a stall of the machine makes the rest fail."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    fake: FakeController

    def do_POST(self) -> None:
        length = int(self.headers.get("content-length", 0))
        content = self.rfile.read(length)
        if len(content) < length:  # the client disconnected, as an aborted load does
            self.close_connection = True
            return
        self.fake.hosts.add(self.headers["host"])
        model = self.path.split("/")[3]
        try:
            status, release, body = self.fake.handle(model, self.headers.get(client.REQUEST_ID, ""), content)
        except _Hangs:
            self.close_connection = True
            return
        except (Unavailable, KeyError) as error:
            status, release, body = 503, "", str(error).encode()
        self.send_response(status)
        self.send_header(client.RELEASE, release)
        if status == HTTPStatus.TOO_MANY_REQUESTS:
            self.send_header(client.REFUSED, "overload")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Log no requests."""
