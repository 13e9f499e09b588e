"""Ports are chosen once and remembered; secrets are made once and private."""

import json
import socket
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from tests.conftest import ROOT

from slipstream.errors import Unavailable
from slipstream.home import Home
from slipstream.platform import addresses
from slipstream.platform.addresses import port_of


@pytest.fixture
def fresh(tmp_path: Path) -> Home:
    return Home(tmp_path / "home", ROOT / ".envs", ROOT)


def test_ports_are_remembered(fresh: Home) -> None:
    first = addresses.choose(fresh, set())
    assert len({port_of(url) for url in first.urls().values()}) == len(first.urls())
    assert addresses.choose(fresh, set()) == first == addresses.load(fresh)


def test_a_profile_adds_its_services(fresh: Home) -> None:
    local = addresses.choose(fresh, set())
    server = addresses.choose(fresh, set(), "server")
    assert server.urls().keys() - local.urls().keys() == {"postgresql", "s3"}
    assert server.urls().items() >= local.urls().items()
    assert addresses.choose(fresh, set(), "local") == local


def test_only_a_taken_port_is_replaced(fresh: Home) -> None:
    first = addresses.choose(fresh, set())
    second = addresses.choose(fresh, {port_of(first.mlflow)})
    assert second == first.model_copy(update={"mlflow": second.mlflow})
    assert second.mlflow != first.mlflow


def test_a_port_in_use_is_not_chosen(fresh: Home, tmp_path: Path) -> None:
    elsewhere = replace(fresh, root=tmp_path / "elsewhere")
    wanted = port_of(addresses.choose(fresh, set()).airflow)
    fresh.addresses_file().unlink()
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", wanted))
        stranger.listen()
        assert port_of(addresses.choose(fresh, set()).airflow) != wanted
    assert port_of(addresses.choose(elsewhere, set()).airflow) != wanted


def test_secrets_are_made_once_and_private(fresh: Home) -> None:
    made = addresses.ensure_secrets(fresh)
    assert addresses.ensure_secrets(fresh) == made
    assert stat.S_IMODE((fresh.root / "secrets.json").stat().st_mode) == 0o600
    secret = [value for name, value in made.model_dump().items() if not name.endswith("_user")]
    assert len(set(secret)) == len(secret)


def test_a_home_of_an_earlier_version_gets_the_secrets_that_it_lacks(fresh: Home) -> None:
    made = addresses.ensure_secrets(fresh)
    older = made.model_dump(exclude={"postgresql_password", "s3_secret_key"})
    (fresh.root / "secrets.json").write_text(json.dumps(older))
    assert addresses.ensure_secrets(fresh).model_dump().items() > older.items()
    assert stat.S_IMODE((fresh.root / "secrets.json").stat().st_mode) == 0o600


def test_before_the_first_up_there_is_a_hint(fresh: Home) -> None:
    with pytest.raises(Unavailable, match="slipstream up"):
        addresses.load(fresh)
    with pytest.raises(Unavailable, match="slipstream up"):
        addresses.load_secrets(fresh)


def test_a_home_that_knows_a_port_of_envoys_admin_interface_is_still_read(fresh: Home) -> None:
    first = addresses.choose(fresh, set())
    older = json.loads(fresh.addresses_file().read_text()) | {"envoy_admin": "http://127.0.0.1:1"}
    fresh.addresses_file().write_text(json.dumps(older))
    assert addresses.choose(fresh, set()) == first
