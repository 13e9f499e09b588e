"""Where the embedded platform listens. Written by `slipstream up`; ports are looked up once and remembered."""

from slipstream.contract import Document
from slipstream.errors import Unavailable
from slipstream.home import Home, write_atomically


class Addresses(Document):
    """Base URLs, all on 127.0.0.1."""

    airflow: str
    mlflow: str
    envoy: str
    envoy_admin: str
    triggers: str
    """Receiver of MLflow's registry webhooks."""


class Secrets(Document):
    """Made at the first `up`, kept in a file that only its owner can read; never logged."""

    airflow_user: str
    airflow_password: str
    airflow_jwt_secret: str
    airflow_fernet_key: str
    webhook_secret: str
    mlflow_webhook_key: str


def load(home: Home) -> Addresses:
    """Read the addresses. Raises Unavailable when the platform was never started here."""
    try:
        return Addresses.model_validate_json(home.addresses_file().read_text())
    except OSError as error:
        raise Unavailable(f"no platform under {home.root}; start it with `slipstream up`") from error


def save(home: Home, addresses: Addresses) -> None:
    """Write the addresses atomically."""
    write_atomically(home.addresses_file(), addresses.model_dump_json(indent=2))


def load_secrets(home: Home) -> Secrets:
    """Read the secrets. Raises Unavailable when the platform was never started here."""
    try:
        return Secrets.model_validate_json((home.root / "secrets.json").read_text())
    except OSError as error:
        raise Unavailable(f"no platform under {home.root}; start it with `slipstream up`") from error
