"""The traffic seam: deployment of releases and the traffic split between them.

Envoy on one machine, KServe on Kubernetes, a fake for tests; all pass the same contract tests
(tests/traffic/contract.py). Stages 2 and 3 use only this protocol.
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
    """Share in percent by release name; the shares sum to 100, or there are none before the first deployment."""
    mirror: str | None = None
    """Release that gets a copy of every request; its answers are discarded."""


@dataclass(frozen=True)
class Observation:
    """The splitter's own counts for a release since it started counting."""

    requests: int
    errors: int
    """Responses with status 5xx, and requests that got no response."""
    memory_mib: float
    """Resident memory of the release's server."""
    unavailable: int = 0
    """Those of the errors with status 503 or 504, which an overloaded machine can cause as well as the release."""


@dataclass(frozen=True)
class Endpoint:
    """Address of a model."""

    url: str
    """Base URL, such as http://127.0.0.1:8080."""
    host: str | None = None
    """Host header, if the URL is that of an ingress and only the header identifies the model."""

    @property
    def headers(self) -> dict[str, str]:
        """Headers that every request needs."""
        return {} if self.host is None else {"host": self.host}


def require_judged(release: Release, engine: Path, sha256: str | None) -> str:
    """Return the digest of an engine folder. Raise ModelError if it differs from a given `sha256`."""
    engine_sha256 = digests.folder(engine)
    if sha256 is not None and engine_sha256 != sha256:
        raise ModelError(
            f"{release.key}: the engine in {engine} has sha256 {engine_sha256[:12]}…, but {sha256[:12]}… was judged; "
            "it is not deployed"
        )
    return engine_sha256


class TrafficController(Protocol):
    """Deploys and splits. A repetition of any method with the same arguments changes nothing."""

    def deploy(self, release: Release, engine: Path, sha256: str | None = None) -> None:
        """Serve an engine folder as `release` and return when it is ready.

        `sha256` is the folder's digest as the gates judged it; None accepts any content. The server receives it too,
        and loads nothing else. Raise ModelError for other bytes, Unavailable, or RegistryError if the name belongs to
        another engine.
        """
        ...

    def retire(self, release: Release) -> None:
        """Stop a release's server. Raise RegistryError while it has traffic."""
        ...

    def deployed(self, model: str) -> set[str]:
        """Return names of the model's deployed releases that answer as ready."""
        ...

    def releases(self, model: str) -> set[str]:
        """Return names of all the model's deployed and not retired releases, whether they answer or not."""
        ...

    def routes(self, model: str) -> Routes:
        """Return the current traffic: what the splitter has really loaded, not what was last requested."""
        ...

    def set_routes(self, model: str, routes: Routes) -> None:
        """Change the traffic and return when the splitter has loaded it, without losing a request. Raise
        Unavailable."""
        ...

    def observe(self, release: Release) -> Observation:
        """Return the counters of a release."""
        ...

    def endpoint(self, model: str) -> Endpoint:
        """Return the model's address. Raise RegistryError if it is unknown before the first deployment."""
        ...

    def mirror(self, model: str) -> Endpoint | None:
        """Return where the sender itself must send the copies for `Routes.mirror`, with the same request id.

        Return None if nothing is mirrored, or if the splitter does it.
        """
        ...

    def answers(self, release: Release) -> Path | None:
        """Return the JSON-lines log of the release's answers, as serving/server.py writes it.

        Return None if it cannot be accessed; such a controller lets the sender mirror, which then has both answers.
        """
        ...
