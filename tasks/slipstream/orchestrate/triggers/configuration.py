"""The receiver's configuration: from the environment if it is deployed separately, else from the embedded platform.

Each variable is independent and overrides the platform's files, so a single one can be tried on one machine too.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from slipstream.errors import InputError
from slipstream.home import Home
from slipstream.platform import addresses

AIRFLOW = "SLIPSTREAM_AIRFLOW_URL"
"""Airflow's API server."""
USER, PASSWORD = "SLIPSTREAM_AIRFLOW_USER", "SLIPSTREAM_AIRFLOW_PASSWORD"
"""The Airflow user that starts runs."""
MLFLOW = "MLFLOW_TRACKING_URI"
SECRET = "SLIPSTREAM_WEBHOOK_SECRET"  # noqa: S105 (the name of a variable)
"""Key with which MLflow signs its deliveries; the receiver passes it to MLflow when it registers the webhook."""
URL = "SLIPSTREAM_WEBHOOK_URL"
"""Base URL by which MLflow reaches the receiver."""
LISTEN = "SLIPSTREAM_WEBHOOK_LISTEN"
"""HOST:PORT to listen on."""
VARIABLES = (AIRFLOW, USER, PASSWORD, MLFLOW, SECRET, URL, LISTEN)


@dataclass(frozen=True)
class Configuration:
    """Addresses and secrets; the secrets stay out of logs and error messages."""

    airflow: str
    airflow_user: str
    airflow_password: str = field(repr=False)
    mlflow: str
    secret: str = field(repr=False)
    url: str
    listen: str

    @property
    def host(self) -> str:
        """Address to listen on."""
        return urlsplit(f"//{self.listen}").hostname or "127.0.0.1"

    @property
    def port(self) -> int:
        """Port to listen on."""
        return urlsplit(f"//{self.listen}").port or 80


def load(home: Home, environment: Mapping[str, str] = os.environ) -> Configuration:
    """Read the configuration. Raise InputError, naming the missing part, or for a LISTEN that is not an address."""
    values = _of_platform(home) | {name: environment[name] for name in VARIABLES if environment.get(name)}
    missing = [name for name in VARIABLES if name not in values]
    if missing:
        raise InputError(
            f"the receiver of webhooks is not told {', '.join(missing)}; set them, or start the embedded platform with "
            "`slipstream up`"
        )
    try:
        urlsplit(f"//{values[LISTEN]}").port  # noqa: B018 (raises for what is no port)
    except ValueError as error:
        raise InputError(f"{LISTEN}={values[LISTEN]}: {error}; give HOST:PORT") from error
    return Configuration(*(values[name] for name in VARIABLES))


def _of_platform(home: Home) -> dict[str, str]:
    """Return what `slipstream up` wrote; empty if it never ran here."""
    if not home.addresses_file().exists():
        return {}
    places, secrets = addresses.load(home), addresses.load_secrets(home)
    values = (
        *(places.airflow, secrets.airflow_user, secrets.airflow_password, places.mlflow, secrets.webhook_secret),
        *(places.triggers, urlsplit(places.triggers).netloc),
    )
    return dict(zip(VARIABLES, values, strict=True))
