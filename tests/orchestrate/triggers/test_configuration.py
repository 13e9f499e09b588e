"""The receiver is told by its environment, by the embedded platform's files, or by both: the environment wins."""

from pathlib import Path

import pytest

from slipstream.errors import InputError
from slipstream.home import Home
from slipstream.orchestrate.triggers import configuration
from slipstream.orchestrate.triggers.configuration import VARIABLES
from slipstream.platform import addresses
from slipstream.platform.addresses import Addresses

DEPLOYED = {
    "SLIPSTREAM_AIRFLOW_URL": "http://airflow-api-server:8080",
    "SLIPSTREAM_AIRFLOW_USER": "slipstream",
    "SLIPSTREAM_AIRFLOW_PASSWORD": "very secret",
    "MLFLOW_TRACKING_URI": "http://slipstream-mlflow:5000",
    "SLIPSTREAM_WEBHOOK_SECRET": "another secret",
    "SLIPSTREAM_WEBHOOK_URL": "http://slipstream-webhook:8080",
    "SLIPSTREAM_WEBHOOK_LISTEN": "0.0.0.0:8080",
}


@pytest.fixture
def platform(home: Path) -> Home:
    """A home in which `slipstream up` has run."""
    here = Home.from_environment()
    local = "http://127.0.0.1"
    places = Addresses(airflow=f"{local}:1", mlflow=f"{local}:2", envoy=f"{local}:3", triggers=f"{local}:5")
    addresses.save(here, places)
    addresses.ensure_secrets(here)
    return here


def test_a_deployed_receiver_needs_no_platform(home: Path) -> None:
    found = configuration.load(Home.from_environment(), DEPLOYED)
    assert (found.host, found.port) == ("0.0.0.0", 8080)
    assert (found.airflow, found.airflow_user) == ("http://airflow-api-server:8080", "slipstream")
    assert (found.mlflow, found.url) == ("http://slipstream-mlflow:5000", "http://slipstream-webhook:8080")
    assert "secret" not in repr(found).replace("secret=", "")


def test_the_platform_tells_all_of_it(platform: Home) -> None:
    found, secrets = configuration.load(platform, {}), addresses.load_secrets(platform)
    assert (found.host, found.port, found.url) == ("127.0.0.1", 5, "http://127.0.0.1:5")
    assert (found.airflow_password, found.secret) == (secrets.airflow_password, secrets.webhook_secret)


@pytest.mark.parametrize("name", VARIABLES)
def test_each_variable_wins_over_the_platform(platform: Home, name: str) -> None:
    before, after = configuration.load(platform, {}), configuration.load(platform, {name: DEPLOYED[name]})
    differing = [key for key in vars(before) if getattr(before, key) != getattr(after, key)]
    assert [getattr(after, key) for key in differing] == [DEPLOYED[name]]


@pytest.mark.parametrize("name", VARIABLES)
def test_what_is_missing_is_named(home: Path, name: str) -> None:
    with pytest.raises(InputError, match=f"not told {name};"):
        configuration.load(Home.from_environment(), {**DEPLOYED, name: ""})


def test_an_address_that_is_none_is_refused(home: Path) -> None:
    with pytest.raises(InputError, match=r"SLIPSTREAM_WEBHOOK_LISTEN=0\.0\.0\.0:http"):
        configuration.load(Home.from_environment(), {**DEPLOYED, "SLIPSTREAM_WEBHOOK_LISTEN": "0.0.0.0:http"})
