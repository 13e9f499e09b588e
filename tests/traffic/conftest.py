"""A real Envoy under a real supervisord, with toy servers behind it."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.conftest import ROOT, free_port

from slipstream.home import Home
from slipstream.platform import supervisor
from slipstream.traffic import envoy
from slipstream.traffic.base import Routes
from slipstream.traffic.envoy import Deployment, EnvoyController
from slipstream.traffic.envoy_admin import Admin

TOY_SERVER = (str(Path(__file__).with_name("toy_server.py")),)


@pytest.fixture(scope="session")
def envoy_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Home, str]]:
    """A home with a running Envoy, and its address; stopped after the session."""
    home = Home(tmp_path_factory.mktemp("envoy-home"), ROOT / ".envs", ROOT)
    port = free_port()
    envoy.bootstrap(home, port)
    supervisor.start(home, envoy.program(home))
    try:
        await_envoy(home)
        yield home, f"http://127.0.0.1:{port}"
    finally:
        supervisor.shutdown(home)


@pytest.fixture
def toy_envoy(envoy_home: tuple[Home, str]) -> Iterator[EnvoyController]:
    """A controller with toy servers; afterwards nothing is routed or deployed."""
    control = EnvoyController(*envoy_home, server=TOY_SERVER)
    yield control
    clear(envoy_home[0], control)


def clear(home: Home, control: EnvoyController) -> None:
    for record in sorted(home.releases.glob("*/deployment.json")):
        release = Deployment.model_validate_json(record.read_text()).release
        control.set_routes(release.model, Routes(weights={}))
        control.retire(release)


def await_envoy(home: Home, seconds: float = 20) -> None:
    admin, deadline = Admin(home.envoy), time.monotonic() + seconds
    while not admin.ready():
        assert time.monotonic() < deadline, f"Envoy in {home.envoy} is not ready within {seconds} s"
        time.sleep(0.05)
