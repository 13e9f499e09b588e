"""MLflow behind its log-in: who is let in, who may change something, and how slipstream's own commands get in."""

import os
import shlex
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.conftest import ROOT, wait_for

from slipstream.errors import Unavailable
from slipstream.home import Home
from slipstream.platform import addresses, console, mlflow_server, programs
from slipstream.platform.addresses import MLFLOW, MLFLOW_PASSWORD, MLFLOW_USER, Addresses, Secrets
from slipstream.reports.find import connect

EXPERIMENT = "/api/2.0/mlflow/experiments/get?experiment_id=0"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Home, Addresses, Secrets]]:
    """The server as the platform starts it, with the files that `slipstream up` writes for it."""
    home = Home(tmp_path_factory.mktemp("login") / "home", ROOT / ".envs", ROOT)
    home.root.mkdir()
    found, secrets = addresses.choose(home, set()), addresses.ensure_secrets(home)
    program = mlflow_server.program(home, found, secrets, {})
    environment = programs.base_environment(home) | program.environment
    with (home.root / "server.log").open("wb") as log:
        process = subprocess.Popen(program.command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(f"{found.mlflow}/health", process)
        yield home, found, secrets
    finally:
        os.killpg(process.pid, 15)
        process.wait(timeout=30)


@pytest.fixture(autouse=True)
def nothing_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (MLFLOW, MLFLOW_USER, MLFLOW_PASSWORD):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def ask(found: Addresses, path: str, login: tuple[str, str] | None = None, **body: Any) -> int:
    with httpx.Client(base_url=found.mlflow, auth=login, timeout=60) as client:
        answer = client.post(path, json=body) if body else client.get(path)
        return answer.status_code


def test_nobody_reads_or_writes_without_the_password(served: tuple[Home, Addresses, Secrets]) -> None:
    _, found, secrets = served
    assert ask(found, "/health") == 200
    own = (secrets.mlflow_user, secrets.mlflow_password)
    assert ask(found, EXPERIMENT, own) == 200
    guesses = [None, (secrets.mlflow_user, "password1234"), (secrets.mlflow_user, ""), ("", secrets.mlflow_password)]
    for guess in guesses:
        assert ask(found, EXPERIMENT, guess) == 401, guess
    for path in (
        "/",
        "/api/2.0/mlflow-artifacts/artifacts?path=",
        "/ajax-api/2.0/mlflow/experiments/search",
        "/graphql",
    ):
        assert ask(found, path) == 401, path
    assert ask(found, "/api/2.0/mlflow/runs/create", None, experiment_id="0") == 401


def test_people_with_an_account_read_and_change_nothing(served: tuple[Home, Addresses, Secrets]) -> None:
    _, found, secrets = served
    own, reader = (secrets.mlflow_user, secrets.mlflow_password), ("reader", "a-long-password-1")
    made = ask(found, "/api/2.0/mlflow/users/create", own, username=reader[0], password=reader[1])
    assert made == 200
    assert ask(found, "/api/2.0/mlflow/users/create", reader, username="x", password="a-long-password-2") == 403
    assert ask(found, EXPERIMENT, reader) == 200
    assert ask(found, "/api/2.0/mlflow/runs/create", reader, experiment_id="0") == 403
    assert ask(found, "/api/2.0/mlflow/registered-models/create", own, name="net") == 200
    tag = {"name": "net", "key": "k", "value": "v"}
    assert ask(found, "/api/2.0/mlflow/registered-models/set-tag", reader, **tag) == 403


def test_commands_find_the_way_in(
    served: tuple[Home, Addresses, Secrets], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    home, found, secrets = served
    console.environment(home)
    exported = dict(shlex.split(line)[1].split("=", 1) for line in capsys.readouterr().out.splitlines())
    assert exported == addresses.mlflow_variables(found, secrets)
    for before in ({}, {MLFLOW: found.mlflow}):  # a shell that was told of the address alone
        for name in (MLFLOW, MLFLOW_USER, MLFLOW_PASSWORD):
            monkeypatch.delenv(name, raising=False)
        for name, value in before.items():
            monkeypatch.setenv(name, value)
        assert connect(home).get_experiment("0").name == "Default"


def test_another_server_is_not_told_the_password(served: tuple[Home, Addresses, Secrets], tmp_path: Path) -> None:
    home, _, _ = served
    theirs = {MLFLOW: "https://mlflow.example"}
    addresses.reach_mlflow(home, theirs)
    assert theirs == {MLFLOW: "https://mlflow.example"}
    nowhere = Home(tmp_path, ROOT / ".envs", ROOT)
    addresses.reach_mlflow(nowhere, theirs)
    with pytest.raises(Unavailable, match="slipstream up"):
        addresses.reach_mlflow(nowhere, {})


def test_passwords_are_in_no_argument_and_no_readable_file(served: tuple[Home, Addresses, Secrets]) -> None:
    home, found, secrets = served
    program = mlflow_server.program(home, found, secrets, {})
    for secret in (secrets.mlflow_password, secrets.mlflow_session_key):
        assert all(secret not in word for word in program.command)
        for path in home.root.rglob("*"):
            if path.is_file() and secret.encode() in path.read_bytes():
                assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert stat.S_IMODE((home.root / "mlflow" / "login.ini").stat().st_mode) == 0o600
