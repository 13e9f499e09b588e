"""The traffic seam: who deploys releases and splits the traffic between them.

Envoy on one machine, KServe on Kubernetes, a fake for tests; all pass the same contract tests
(tests/traffic/contract.py). Stages 2 and 3 know only this protocol.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from slipstream import digests
from slipstream.contract import Document, Release
from slipstream.errors import ModelError


class Routes(Document):
    """The traffic of one model."""

    weights: dict[str, int]
    """Release name → share in percent; the shares sum to 100, or there are none before the first deployment."""
    mirror: str | None = None
    """Release that gets a copy of every request; its answers are not sent to anyone."""


@dataclass(frozen=True)
class Observation:
    """What the splitter itself counted for a release since it started counting."""

    requests: int
    errors: int
    """Responses with status 5xx, and requests that got no response."""
    memory_mib: float
    """Resident memory of the release's server."""
    unavailable: int = 0
    """Those of the errors with status 503 or 504, which an overloaded machine can cause as well as the release."""


@dataclass(frozen=True)
class Endpoint:
    """Where a model is reached."""

    url: str
    """Base URL, such as http://127.0.0.1:8080."""
    host: str | None = None
    """Host header, where the URL is that of an ingress and only the header says which model is meant."""

    @property
    def headers(self) -> dict[str, str]:
        """Headers that every request needs."""
        return {} if self.host is None else {"host": self.host}


def require_judged(release: Release, engine: Path, sha256: str | None) -> str:
    """Digest of an engine folder. Raises ModelError when it is not `sha256`, where that is given."""
    engine_sha256 = digests.folder(engine)
    if sha256 is not None and engine_sha256 != sha256:
        raise ModelError(
            f"{release.key}: the engine in {engine} has sha256 {engine_sha256[:12]}…, but {sha256[:12]}… was judged; "
            "it is not deployed"
        )
    return engine_sha256


class TrafficController(Protocol):
    """Deploys and splits. Every method can be repeated with the same arguments and then changes nothing."""

    def deploy(self, release: Release, engine: Path, sha256: str | None = None) -> None:
        """Serve an engine folder as `release` and return when it is ready.

        `sha256` is the folder's digest as the gates judged it; None takes the folder as it is. The server is told it
        too, and loads nothing else. Raises ModelError for other bytes, Unavailable, or RegistryError when the name
        stands for another engine.
        """
        ...

    def retire(self, release: Release) -> None:
        """Stop a release's server. Refused (RegistryError) while it has traffic."""
        ...

    def deployed(self, model: str) -> set[str]:
        """Names of the model's deployed releases that answer as ready."""
        ...

    def releases(self, model: str) -> set[str]:
        """Names of all the model's releases that were deployed and not retired, whether they answer or not."""
        ...

    def routes(self, model: str) -> Routes:
        """The traffic as it is now: what the splitter has really loaded, not what was last asked for."""
        ...

    def set_routes(self, model: str, routes: Routes) -> None:
        """Change the traffic and return when the splitter has loaded it. Drops no request. Raises Unavailable."""
        ...

    def observe(self, release: Release) -> Observation:
        """Counters of a release."""
        ...

    def endpoint(self, model: str) -> Endpoint:
        """Where clients reach the model. Raises RegistryError where that is unknown before the first deployment."""
        ...

    def mirror(self, model: str) -> Endpoint | None:
        """Where the sender itself must send the copies that `Routes.mirror` asks for, under the same request id.

        None when nothing is mirrored, or when the splitter does it.
        """
        ...

    def answers(self, release: Release) -> Path | None:
        """JSON-lines log of the release's answers, as serving/server.py writes it.

        None where it is out of reach; such a controller lets the sender mirror, who then has both answers.
        """
        ...
