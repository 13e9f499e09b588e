"""The real Envoy: the contract, and what only it can show."""

import json
import os
import signal
import socket
import time
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from tests.conftest import free_port
from tests.traffic.conftest import TOY_SERVER, await_envoy, clear
from tests.traffic.contract import A, B, TrafficContract, engine, load, shares

from slipstream.errors import Unavailable
from slipstream.home import Home
from slipstream.platform import supervisor
from slipstream.traffic import envoy
from slipstream.traffic.base import Routes, TrafficController
from slipstream.traffic.envoy import EnvoyController


class TestEnvoy(TrafficContract):
    @pytest.fixture
    def control(self, toy_envoy: EnvoyController) -> TrafficController:
        return toy_envoy


def test_a_dead_server_shows_as_errors_of_its_release(
    toy_envoy: EnvoyController, envoy_home: tuple[Home, str], tmp_path: Path
) -> None:
    for release in (A, B):
        toy_envoy.deploy(release, engine(tmp_path / release.name / "engine"))
    toy_envoy.set_routes("net", Routes(weights={"v1": 50, "v2": 50}))
    before = toy_envoy.observe(B)
    # Stopped under the controller's feet: Envoy still sends half of the traffic there.
    supervisor.stop(envoy_home[0], "server-net--v2")
    sent = load(toy_envoy, 60)
    failed = [r for r in sent.records if r.failed]
    after = toy_envoy.observe(B)
    assert 10 < len(failed) < 50
    assert {(r.status, r.release) for r in failed} == {(503, "v2")}
    assert after.errors - before.errors == len(failed)
    assert after.requests - before.requests == len(failed)
    assert after.memory_mib == 0
    assert toy_envoy.deployed("net") == {"v1"}


def test_an_engine_is_served_from_the_environment_of_its_servers(envoy_home: tuple[Home, str], tmp_path: Path) -> None:
    """`tensorrt` here is `serve` under another name, to be seen in the server's command line."""
    home, address = envoy_home
    environments = tmp_path / "envs"
    environments.mkdir()
    for name in ("serve", "tensorrt"):
        (environments / name).symlink_to(home.envs / "serve")
    control = EnvoyController(replace(home, envs=environments), address, server=TOY_SERVER)
    folder = engine(tmp_path / "a" / "engine")
    manifest = {
        "engine": "tensorrt",
        "target": {"engine": "tensorrt", "device": "GPU"},
        "fingerprint": {},
        "candidate_sha256": "0" * 64,
        "input_shape": [1],
        "input_dtype": "float32",
        "output_shape": [1],
        "files": {},
    }
    (folder / "engine.json").write_text(json.dumps(manifest))
    control.deploy(A, folder)
    try:
        pid = supervisor.state(home, "server-net--v1").pid
        command = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        assert command[0] == str(environments / "tensorrt" / "bin" / "python")
    finally:
        clear(home, control)


def test_errors_of_the_mirror_are_counted(toy_envoy: EnvoyController, tmp_path: Path) -> None:
    toy_envoy.deploy(A, engine(tmp_path / "a" / "engine"))
    toy_envoy.deploy(B, engine(tmp_path / "b" / "engine", error_rate=1.0))
    toy_envoy.set_routes("net", Routes(weights={"v1": 100}, mirror="v2"))
    assert not any(r.failed for r in load(toy_envoy, 30).records)
    deadline = time.monotonic() + 5
    while toy_envoy.observe(B).errors < 30 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (toy_envoy.observe(B).requests, toy_envoy.observe(B).errors) == (30, 30)


def test_an_engine_that_cannot_be_loaded_is_not_deployed(
    toy_envoy: EnvoyController, envoy_home: tuple[Home, str], tmp_path: Path
) -> None:
    toy_envoy.deploy(A, engine(tmp_path / "a" / "engine"))
    with pytest.raises(Unavailable, match="this engine cannot be loaded"):
        toy_envoy.deploy(B, engine(tmp_path / "b" / "engine", broken=True))
    assert supervisor.state(envoy_home[0], "server-net--v2").state == "ABSENT"
    assert toy_envoy.deployed("net") == {"v1"}


def test_another_installations_server_at_the_port_is_not_taken_for_ours(
    toy_envoy: EnvoyController, envoy_home: tuple[Home, str], tmp_path: Path
) -> None:
    toy_envoy.deploy(A, engine(tmp_path / "a" / "engine"))
    record = envoy_home[0].releases / A.key / "deployment.json"
    stranger = engine(tmp_path / "b" / "engine")
    toy_envoy.deploy(B, stranger)
    port = json.loads((envoy_home[0].releases / B.key / "deployment.json").read_text())["port"]
    record.write_text(json.dumps(json.loads(record.read_text()) | {"port": port}))
    assert toy_envoy.deployed("net") == {"v2"}


def test_a_killed_server_comes_back_at_its_port(
    toy_envoy: EnvoyController, envoy_home: tuple[Home, str], tmp_path: Path
) -> None:
    toy_envoy.deploy(A, engine(tmp_path / "a" / "engine"))
    toy_envoy.set_routes("net", Routes(weights={"v1": 100}))
    pid = supervisor.state(envoy_home[0], "server-net--v1").pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while toy_envoy.deployed("net") != {"v1"} and time.monotonic() < deadline:
        time.sleep(0.05)
    assert supervisor.state(envoy_home[0], "server-net--v1").pid != pid
    assert shares(load(toy_envoy, 10)) == {"v1": 100}


def test_releases_that_do_not_answer_are_brought_back_or_named(
    toy_envoy: EnvoyController, envoy_home: tuple[Home, str], tmp_path: Path
) -> None:
    home = envoy_home[0]
    for release in (A, B):
        toy_envoy.deploy(release, engine(tmp_path / release.name / "engine"))
    toy_envoy.set_routes("net", Routes(weights={"v1": 100}))
    assert toy_envoy.bring_back() == {}
    for release in (A, B):
        supervisor.stop(home, f"server-{release.key}")
    (home.releases / B.key / "engine" / "behaviour.json").write_text('{"broken": true}')
    port = json.loads((home.releases / A.key / "deployment.json").read_text())["port"]
    with socket.socket() as stranger:  # took the port meanwhile
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        stranger.bind(("127.0.0.1", port))
        stranger.listen()
        lost = toy_envoy.bring_back()
        assert shares(load(toy_envoy, 10)) == {"v1": 100}
    assert list(lost) == [B.key]
    assert toy_envoy.deployed("net") == {"v1"}
    assert toy_envoy.releases("net") == {"v1", "v2"}


def test_request_ids_of_clients_are_kept_and_missing_ones_made(toy_envoy: EnvoyController, tmp_path: Path) -> None:
    toy_envoy.deploy(A, engine(tmp_path / "a" / "engine"))
    toy_envoy.set_routes("net", Routes(weights={"v1": 100}))
    url = f"{toy_envoy.endpoint('net').url}/v2/models/net/infer"
    body = {"inputs": [{"name": "input", "shape": [1, 10], "datatype": "FP32", "data": [0.0] * 10}]}
    given = "f81d4fae-7dec-11d0-a765-00a0c91e6bf6"  # a UUID, which Envoy would mark for tracing by default
    assert httpx.post(url, json=body, headers={"x-request-id": given}).headers["x-request-id"] == given
    assert len(httpx.post(url, json=body).headers["x-request-id"]) > 10
    logged = [json.loads(line)["id"] for line in toy_envoy.answers(A).read_text().splitlines()]
    assert logged[0] == given
    assert len(set(logged)) == 2


def test_routes_and_servers_survive_a_restart_of_everything(tmp_path: Path, home: Path) -> None:
    made, port = Home.from_environment(), free_port()
    control = EnvoyController(made, f"http://127.0.0.1:{port}", server=TOY_SERVER)
    try:
        envoy.bootstrap(made, port)
        supervisor.start(made, envoy.program(made))
        await_envoy(made)
        for release in (A, B):
            control.deploy(release, engine(tmp_path / release.name / "engine"))
        routes = Routes(weights={"v1": 50, "v2": 50}, mirror="v2")
        control.set_routes("net", routes)
        supervisor.shutdown(made)
        with pytest.raises(Unavailable, match="admin interface"):
            control.routes("net")
        envoy.bootstrap(made, port)  # a second `up` must not empty the routes
        supervisor.ensure_running(made)
        await_envoy(made)
        assert control.routes("net") == routes
        deadline = time.monotonic() + 10
        while control.deployed("net") != {"v1", "v2"} and time.monotonic() < deadline:
            time.sleep(0.05)
        assert set(shares(load(control, 40))) == {"v1", "v2"}
    finally:
        supervisor.shutdown(made)


def test_a_serve_environment_without_envoy_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="no Envoy in this environment"):
        envoy.program(Home(tmp_path, tmp_path / "envs", tmp_path))
