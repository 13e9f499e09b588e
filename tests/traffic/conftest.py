"""A real Envoy under a real supervisord, with toy servers behind it."""

import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tests.conftest import ROOT, free_port

from slipstream.home import Home
from slipstream.platform import supervisor
from slipstream.traffic import envoy
from slipstream.traffic.base import Routes
from slipstream.traffic.envoy import Deployment, EnvoyController

TOY_SERVER = (str(Path(__file__).with_name("toy_server.py")),)


@pytest.fixture(scope="session")
def envoy_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Home, str, str]]:
    """A home with a running Envoy, its address and its admin interface's; stopped after the session."""
    home = Home(tmp_path_factory.mktemp("envoy-home"), ROOT / ".envs", ROOT)
    port, admin = free_port(), free_port()
    envoy.bootstrap(home, port, admin)
    supervisor.start(home, envoy.program(home))
    try:
        await_ready(f"http://127.0.0.1:{admin}/ready")
        yield home, f"http://127.0.0.1:{port}", f"http://127.0.0.1:{admin}"
    finally:
        supervisor.shutdown(home)


@pytest.fixture
def toy_envoy(envoy_home: tuple[Home, str, str]) -> Iterator[EnvoyController]:
    """A controller with toy servers; afterwards nothing is routed or deployed."""
    control = EnvoyController(*envoy_home, server=TOY_SERVER)
    yield control
    clear(envoy_home[0], control)


def clear(home: Home, control: EnvoyController) -> None:
    for record in sorted(home.releases.glob("*/deployment.json")):
        release = Deployment.model_validate_json(record.read_text()).release
        control.set_routes(release.model, Routes(weights={}))
        control.retire(release)


def await_ready(url: str, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if httpx.get(url, timeout=1).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.05)
    raise AssertionError(f"{url} is not ready within {seconds} s")
