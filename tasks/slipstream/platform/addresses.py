"""Addresses of the embedded platform. Written by `slipstream up`; ports are chosen once and stored."""

import base64
import hashlib
import json
import secrets
import socket
from collections.abc import MutableMapping
from typing import Literal
from urllib.parse import urlsplit

from pydantic import model_validator

from slipstream.contract import Document
from slipstream.errors import Unavailable
from slipstream.home import Home, write_atomically

PORTS = range(18_000, 21_000)
"""Below Linux's ephemeral ports (32768 and up), so that no outgoing connection takes a stored port, and below those of
the model servers (traffic/envoy.py)."""


Profile = Literal["local", "server"]
"""`local` keeps metadata in SQLite and artifacts in files; `server` in PostgreSQL and behind an S3 endpoint."""
PROFILES: dict[Profile, frozenset[str]] = {"local": frozenset(), "server": frozenset({"postgresql", "s3"})}
"""Additional services of each profile."""


MLFLOW = "MLFLOW_TRACKING_URI"
MLFLOW_USER, MLFLOW_PASSWORD = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"
"""Variables that MLflow's client reads."""


class Addresses(Document):
    """Base URLs, all on 127.0.0.1."""

    airflow: str
    mlflow: str
    envoy: str
    triggers: str
    """Receiver of MLflow's registry webhooks."""
    profile: Profile = "local"
    postgresql: str | None = None
    """Of profile `server`: PostgreSQL, with neither user nor database."""
    s3: str | None = None
    """Of profile `server`: the object store."""

    @model_validator(mode="before")
    @classmethod
    def _moved(cls, document: object) -> object:
        """Accept a home that was created when Envoy's admin interface had a port."""
        return {k: v for k, v in document.items() if k != "envoy_admin"} if isinstance(document, dict) else document

    def urls(self) -> dict[str, str]:
        """Return every address by its name."""
        return {k: v for k, v in self.model_dump(exclude={"profile"}).items() if v is not None}


class Secrets(Document):
    """Created at the first `up`, in a file that only its owner can read; never logged."""

    airflow_user: str
    airflow_password: str
    airflow_jwt_secret: str
    airflow_fernet_key: str
    webhook_secret: str
    mlflow_webhook_key: str
    mlflow_user: str = ""
    """Empty in a home of an earlier version, whose MLflow has no log-in yet."""
    mlflow_password: str = ""
    mlflow_session_key: str = ""
    postgresql_password: str
    s3_access_key: str
    s3_secret_key: str


def load(home: Home) -> Addresses:
    """Read the addresses. Raise Unavailable if the platform was never started here."""
    try:
        return Addresses.model_validate_json(home.addresses_file().read_text())
    except OSError as error:
        raise Unavailable(f"no platform under {home.root}; start it with `slipstream up`") from error


def save(home: Home, addresses: Addresses) -> None:
    """Write the addresses atomically."""
    write_atomically(home.addresses_file(), addresses.model_dump_json(indent=2))


def load_secrets(home: Home) -> Secrets:
    """Read the secrets. Raise Unavailable if the platform was never started here."""
    try:
        return Secrets.model_validate_json((home.root / "secrets.json").read_text())
    except OSError as error:
        raise Unavailable(f"no platform under {home.root}; start it with `slipstream up`") from error


def mlflow_variables(addresses: Addresses, login: Secrets) -> dict[str, str]:
    """Return the variables that MLflow's client needs to reach the embedded server."""
    variables = {MLFLOW: addresses.mlflow, MLFLOW_USER: login.mlflow_user, MLFLOW_PASSWORD: login.mlflow_password}
    return {name: value for name, value in variables.items() if value}


def reach_mlflow(home: Home, variables: MutableMapping[str, str]) -> None:
    """Add the variables that MLflow's client needs for the embedded server, unless they name another server.

    Raise Unavailable if they name none and none was started here.
    """
    server = variables.get(MLFLOW)
    if server and not home.addresses_file().exists():
        return
    addresses = load(home)
    if server in (None, "", addresses.mlflow):
        own = {k: v for k, v in variables.items() if v and k in (MLFLOW_USER, MLFLOW_PASSWORD)}
        variables.update(mlflow_variables(addresses, load_secrets(home)) | own)


def choose(home: Home, occupied: set[int], profile: Profile = "local") -> Addresses:
    """Return the stored addresses, chosen and saved at the first call; ports in `occupied` are replaced by free
    ones."""
    remembered = load(home) if home.addresses_file().exists() else None
    required = {n for n, f in Addresses.model_fields.items() if f.is_required()} | PROFILES[profile]
    urls = {name: url for name, url in remembered.urls().items() if name in required} if remembered else {}
    avoid = occupied | {port_of(url) for url in urls.values()}
    # Each home starts at another port, so that a stopped platform does not find another one on its ports.
    start = int.from_bytes(hashlib.sha256(str(home.root).encode()).digest()[:4]) % len(PORTS)
    candidates = (p for p in (*PORTS[start:], *PORTS[:start]) if p not in avoid and is_free(p))
    for name in sorted(required):
        if name not in urls or port_of(urls[name]) in occupied:
            scheme = "postgresql" if name == "postgresql" else "http"
            urls[name] = f"{scheme}://127.0.0.1:{next(candidates)}"
    chosen = Addresses.model_validate({**urls, "profile": profile})
    if chosen != remembered:
        save(home, chosen)
    return chosen


def port_of(url: str) -> int:
    """Return the port of a base URL."""
    port = urlsplit(url).port
    assert port is not None, url
    return port


def is_free(port: int) -> bool:
    """Return whether a server can listen on 127.0.0.1 at this port now."""
    with socket.socket() as probe:
        # Like servers: waiting connections of an ended server do not block the port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def ensure_secrets(home: Home) -> Secrets:
    """Return the secrets, created at the first call in a file that only its owner can read.

    Missing ones are added to a home of an earlier version.
    """
    path = home.root / "secrets.json"
    stored = json.loads(path.read_text()) if path.exists() else {}
    generated = {
        "airflow_user": "admin",
        "airflow_password": secrets.token_urlsafe(12),
        "airflow_jwt_secret": secrets.token_urlsafe(48),
        "airflow_fernet_key": _fernet_key(),
        "webhook_secret": secrets.token_urlsafe(32),
        "mlflow_webhook_key": _fernet_key(),
        "mlflow_user": "admin",
        "mlflow_password": secrets.token_urlsafe(18),
        "mlflow_session_key": secrets.token_urlsafe(32),
        "postgresql_password": secrets.token_urlsafe(24),
        "s3_access_key": "slipstream",
        "s3_secret_key": secrets.token_urlsafe(24),
    }
    if generated.keys() - stored.keys():
        write_atomically(path, Secrets(**(generated | stored)).model_dump_json(indent=2), mode=0o600)
    return load_secrets(home)


def _fernet_key() -> str:
    """Return 32 random bytes in URL-safe base64, the form of a Fernet key in the `cryptography` package."""
    return base64.urlsafe_b64encode(secrets.token_bytes(32)).decode()
