"""The real platform: Airflow, MLflow, Envoy and the trigger receiver come up, survive and go. In this order."""

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from mlflow import MlflowClient
from tests.conftest import ROOT
from tests.platform.running import Platform, silent

from slipstream.errors import Unavailable
from slipstream.home import Home
from slipstream.platform import addresses, airflow, health, launch, lifecycle, processes, supervisor
from slipstream.platform.addresses import port_of
from slipstream.platform.airflow_api import AirflowApi

METRICS = 40


def eventually(condition: Callable[[], object], seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not become true"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    home = Home(tmp_path_factory.mktemp("platform") / "home", ROOT / ".envs", ROOT)
    try:
        yield Platform(home, lifecycle.up(home, silent))
    finally:
        lifecycle.down(home)


def test_a_taken_port_is_named_with_its_owner(tmp_path_factory: pytest.TempPathFactory) -> None:
    home = Home(tmp_path_factory.mktemp("taken"), ROOT / ".envs", ROOT)
    port = port_of(addresses.choose(home, set()).mlflow)
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", port))
        stranger.listen()
        with pytest.raises(Unavailable, match=rf"port {port}, where mlflow .* pid {os.getpid()} .*\n.*--new-ports"):
            lifecycle.up(home, silent)
        assert port_of(lifecycle._addresses(home, new_ports=True, profile="local").mlflow) != port
    assert supervisor.running_pid(home) is None


def test_everything_answers(platform: Platform) -> None:
    assert {name: s.healthy for name, s in platform.status().items()} == dict.fromkeys(platform.status(), True)
    assert httpx.get(platform.addresses.mlflow).status_code == 401
    login = addresses.load_secrets(platform.home)
    page = httpx.get(platform.addresses.mlflow, auth=(login.mlflow_user, login.mlflow_password), timeout=30)
    assert "<title>MLflow" in page.text


def test_pools_get_the_slots_that_they_lack(platform: Platform) -> None:
    api = AirflowApi.of(platform.home)
    assert {n: api._ask("GET", f"/pools/{n}").json()["slots"] for n in airflow.POOLS} == {
        name: slots for name, (slots, _) in airflow.POOLS.items()
    }
    api.ensure_pool("release", 3, "more")
    api.ensure_pool("release", 1, "fewer is left alone: somebody may have raised it")
    assert api._ask("GET", "/pools/release").json()["slots"] == 3


def test_a_wrong_password_is_refused(platform: Platform) -> None:
    guess = {"username": "admin", "password": "admin"}
    assert httpx.post(f"{platform.addresses.airflow}/auth/token", json=guess).status_code == 401


def test_only_this_machine_is_listened_to(platform: Platform) -> None:
    rows = [line.split() for table in ("tcp", "tcp6") for line in Path(f"/proc/net/{table}").read_text().splitlines()]
    listening = {tuple(row[1].split(":")) for row in rows if row[3] == "0A"}
    for url in platform.addresses.urls().values():
        at = {address for address, port in listening if int(port, 16) == port_of(url)}
        assert at == {"0100007F"}, url  # 127.0.0.1, the lowest byte first


def test_a_second_up_changes_nothing(platform: Platform) -> None:
    before = platform.pids()
    assert lifecycle.up(platform.home, silent) == platform.addresses
    assert platform.pids() == before


def test_status_and_logs_on_the_command_line(platform: Platform) -> None:
    shown = platform.command("status", "--json")
    assert shown.returncode == 0, shown.stderr
    assert {s["name"] for s in json.loads(shown.stdout)["services"]} >= {"mlflow", "envoy", "airflow-scheduler"}
    assert "spawned: 'mlflow'" in platform.command("logs", "supervisord", "-n", "1000").stdout
    unknown = platform.command("logs", "no-such")
    assert unknown.returncode == 2
    assert "known: airflow-api-server" in unknown.stderr


@pytest.fixture
def mlflow_login(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment that steps get, with MLflow's address and log-in."""
    for name, value in lifecycle._environment(
        platform.home, platform.addresses, addresses.load_secrets(platform.home)
    ).items():
        monkeypatch.setenv(name, value)


def test_mlflow_killed_under_a_step_loses_nothing(platform: Platform, mlflow_login: None) -> None:
    client = MlflowClient(platform.addresses.mlflow)
    run = client.create_run(client.create_experiment("killed"), run_name="step").info.run_id
    for step in range(METRICS):
        if step == METRICS // 4:
            server = platform.pids()["mlflow"]
            assert server is not None
            os.killpg(server, signal.SIGKILL)
        client.log_metric(run, "loss", 1 / (step + 1), step=step)
    assert [m.step for m in client.get_metric_history(run, "loss")] == list(range(METRICS))


def test_the_worker_of_a_killed_mlflow_does_not_keep_its_port(platform: Platform) -> None:
    port = port_of(platform.addresses.mlflow)
    before, server, size = processes.listener(port), platform.pids()["mlflow"], len(of_mlflow(platform))
    assert before is not None and server is not None and before.pid != server
    os.kill(server, signal.SIGKILL)  # the parent alone
    eventually(lambda: platform.status()["mlflow"].healthy, 120)
    assert launch.identity(before.pid) is None
    after = platform.pids()["mlflow"]
    assert after is not None and after != server
    assert of_mlflow(platform) == {after, *processes._descendants(after)}
    assert len(of_mlflow(platform)) == size
    assert len(processes._listening_inodes(port)) == 1


def of_mlflow(platform: Platform) -> set[int]:
    return launch.of_program(str(platform.home.root), "mlflow")


def test_status_tells_that_another_process_answers_in_a_services_place(platform: Platform) -> None:
    """As when MLflow's worker outlived its parent: what answers is not what is supervised."""
    changed = platform.addresses.model_copy(update={"triggers": platform.addresses.mlflow})
    status = {s.name: s for s in health.status(platform.home, changed)}
    assert not status["triggers"].healthy
    assert f"port {port_of(platform.addresses.mlflow)} is held by pid" in (status["triggers"].note or "")


def test_a_killed_supervisord_is_started_again_and_takes_over_what_runs(platform: Platform) -> None:
    daemon, before = supervisor.running_pid(platform.home), platform.pids()
    assert daemon is not None
    os.kill(daemon, signal.SIGKILL)
    eventually(lambda: supervisor.running_pid(platform.home) not in (None, daemon), 60)
    eventually(lambda: all(s.healthy for s in platform.status().values()), 60)
    assert platform.pids() == before


def test_up_takes_over_what_a_killed_supervisord_left_running(platform: Platform) -> None:
    daemon, before = supervisor.running_pid(platform.home), platform.pids()
    triggers = before["triggers"]
    assert daemon is not None and triggers is not None
    os.kill(triggers, signal.SIGSTOP)  # or it would be faster
    try:
        os.kill(daemon, signal.SIGKILL)
        eventually(lambda: supervisor.running_pid(platform.home) is None)
        shown = platform.command("status")
        assert shown.returncode == 1
        assert "envoy" in shown.stdout and "supervisord was killed" in shown.stdout
        assert {s.state for s in platform.status().values()} == {supervisor.ORPHANED}
    finally:
        os.kill(triggers, signal.SIGCONT)
    assert lifecycle.up(platform.home, silent) == platform.addresses
    assert platform.pids() == before


def test_a_power_cut_loses_nothing(platform: Platform, mlflow_login: None) -> None:
    for process in processes.supervised(platform.home):
        os.kill(process.pid, signal.SIGKILL)
    while processes.supervised(platform.home):
        time.sleep(0.05)
    assert platform.command("status").returncode == 1
    assert lifecycle.up(platform.home, silent) == platform.addresses
    client = MlflowClient(platform.addresses.mlflow)
    experiment = client.get_experiment_by_name("killed")
    assert experiment is not None
    [run] = client.search_runs([experiment.experiment_id])
    assert len(client.get_metric_history(run.info.run_id, "loss")) == METRICS


def test_down_leaves_nothing_running(platform: Platform) -> None:
    lifecycle.down(platform.home)
    assert processes.supervised(platform.home) == []
    assert platform.mentioned() == []
    assert all(addresses.is_free(port_of(url)) for url in platform.addresses.urls().values())
    assert lifecycle.down(platform.home) == []
