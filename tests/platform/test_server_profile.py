"""`slipstream up --profile server`: the platform on PostgreSQL and S3 comes up, survives and goes. In this order."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from tests.conftest import ROOT
from tests.platform.running import Platform, silent

from slipstream import storage
from slipstream.errors import InputError, Unavailable
from slipstream.home import Home
from slipstream.platform import addresses, health, lifecycle, object_store, postgresql, processes, programs, supervisor
from slipstream.platform.addresses import port_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not dict(postgresql._installed()), reason="PostgreSQL is not installed (apt-get install postgresql)"
    ),
]


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    home = Home(tmp_path_factory.mktemp("server") / "home", ROOT / ".envs", ROOT)
    try:
        yield Platform(home, lifecycle.up(home, silent, profile="server"))
    finally:
        lifecycle.down(home)


@pytest.fixture
def step_environment(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step sees."""
    secrets = addresses.load_secrets(platform.home)
    for name, value in lifecycle._environment(platform.home, platform.addresses, secrets).items():
        monkeypatch.setenv(name, value)


def healthy_again(platform: Platform, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while unhealthy := [s.name for s in platform.status().values() if not s.healthy]:
        assert time.monotonic() < deadline, unhealthy
        time.sleep(0.5)


def test_a_program_that_is_not_installed_is_named(tmp_path: Path) -> None:
    home = Home(tmp_path / "home", tmp_path / "no-envs", ROOT)
    with pytest.raises(Unavailable, match=r"juicefs: the S3 gateway is not installed"):
        lifecycle.up(home, silent, profile="server")
    (home.root / "postgresql").mkdir(parents=True)
    (home.root / "postgresql/version").write_text("99")
    with pytest.raises(Unavailable, match=r"PostgreSQL 99, which made the data .* `apt-get install postgresql-99`"):
        lifecycle.up(home, silent, profile="server")
    assert not home.addresses_file().exists()


def test_everything_answers(platform: Platform) -> None:
    assert {name: s.healthy for name, s in platform.status().items()} == dict.fromkeys(platform.status(), True)
    assert {postgresql.NAME, object_store.NAME} < platform.status().keys()
    assert [p.name for p in platform.home.root.rglob("*.db")] == ["metadata.db"]  # the gateway's own


def test_metadata_are_in_postgresql(platform: Platform) -> None:
    url = platform.addresses.postgresql
    assert url is not None
    tables = "SELECT count(*) FROM information_schema.tables WHERE table_name = '{}'"
    for database, table in ((postgresql.AIRFLOW, "dag_run"), (postgresql.MLFLOW, "registered_models")):
        found = postgresql._client(platform.home, url, "psql", "-d", database, "-tAc", tables.format(table))
        assert found.strip() == "1"


@pytest.mark.usefixtures("step_environment")
def test_artefacts_are_in_s3(platform: Platform) -> None:
    client = MlflowClient(platform.addresses.mlflow)
    run = client.create_run(client.create_experiment("stored")).info
    client.log_text(run.run_id, "evidence", "report.txt")
    [found] = storage.list_uris(f"s3://{object_store.BUCKET}/mlflow/{run.experiment_id}")
    assert found.endswith("/report.txt")
    assert storage.read_text(found) == "evidence"


def test_a_database_is_dumped_and_restored_while_all_runs(platform: Platform, tmp_path: Path) -> None:
    url, programs = platform.addresses.postgresql, postgresql.programs_folder(platform.home)
    assert url is not None
    passfile = platform.home.root / "postgresql/password"
    where = f"host=127.0.0.1 port={port_of(url)} user=slipstream passfile={passfile} dbname="
    dump = str(tmp_path / "mlflow.dump")
    subprocess.run([str(programs / "pg_dump"), "-Fc", "-f", dump, f"{where}mlflow"], check=True)
    postgresql._client(platform.home, url, "createdb", "restored")
    subprocess.run([str(programs / "pg_restore"), "-d", f"{where}restored", dump], check=True)
    count = "SELECT count(*) FROM runs"
    assert postgresql._client(platform.home, url, "psql", "-d", "restored", "-tAc", count) == "1\n"


def test_a_wrong_password_is_refused(platform: Platform) -> None:
    url = platform.addresses.postgresql
    assert url is not None
    psql = str(postgresql.programs_folder(platform.home) / "psql")
    where = ["-h", "127.0.0.1", "-p", str(port_of(url)), "-U", postgresql.ROLE, "-d", postgresql.MLFLOW]
    guess = os.environ | {"PGPASSWORD": "slipstream"}
    done = subprocess.run([psql, *where, "-c", "SELECT 1"], env=guess, capture_output=True, text=True, check=False)
    assert "password authentication failed" in done.stderr


def test_no_secret_is_shown(platform: Platform) -> None:
    secrets = addresses.load_secrets(platform.home)
    logs = "".join(p.read_text(errors="replace") for p in platform.home.root.rglob("*.log"))
    arguments = "\n".join(p.command for p in processes._all())
    for secret in (secrets.postgresql_password, secrets.s3_secret_key):
        assert secret not in logs
        assert secret not in arguments
    private = [p for p in platform.home.root.rglob("password") if p.is_file()]
    assert [p.stat().st_mode & 0o077 for p in private] == [0]


def test_only_this_machine_is_listened_to(platform: Platform) -> None:
    rows = [line.split() for table in ("tcp", "tcp6") for line in Path(f"/proc/net/{table}").read_text().splitlines()]
    listening = {tuple(row[1].split(":")) for row in rows if row[3] == "0A"}
    for url in platform.addresses.urls().values():
        assert {a for a, port in listening if int(port, 16) == port_of(url)} == {"0100007F"}, url


@pytest.mark.usefixtures("step_environment")
@pytest.mark.parametrize("name", [postgresql.NAME, object_store.NAME])
def test_a_store_killed_under_a_step_loses_nothing(platform: Platform, name: str) -> None:
    client = MlflowClient(platform.addresses.mlflow)
    run = client.create_run(client.create_experiment(f"killed-{name}")).info.run_id
    for step in range(20):
        if step == 5:
            before = platform.pids()[name]
            assert before is not None
            os.kill(before, signal.SIGKILL)
        client.log_metric(run, "loss", 1 / (step + 1), step=step)
    client.log_text(run, "evidence", "report.txt")
    assert [m.step for m in client.get_metric_history(run, "loss")] == list(range(20))
    healthy_again(platform)
    assert platform.pids()[name] != before


def test_a_second_up_keeps_the_profile_and_changes_nothing(platform: Platform) -> None:
    before = platform.pids()
    assert lifecycle.up(platform.home, silent) == platform.addresses
    assert platform.pids() == before
    refused = platform.command("up", "--profile", "local")
    assert refused.returncode == InputError.exit_code
    assert "holds data of profile server" in re.sub(r"\s+", " ", refused.stderr)


def test_status_and_logs_know_the_stores(platform: Platform) -> None:
    assert "object-store" in platform.command("status").stdout
    assert "database system is ready" in platform.command("logs", postgresql.NAME, "-n", "1000").stdout


def test_a_shell_gets_what_it_needs(platform: Platform) -> None:
    lines = platform.command("env").stdout.splitlines()
    given = dict(line.removeprefix("export ").split("=", 1) for line in lines)
    secrets = addresses.load_secrets(platform.home)
    assert given["MLFLOW_TRACKING_URI"] == platform.addresses.mlflow
    assert given["AWS_SECRET_ACCESS_KEY"] == secrets.s3_secret_key


def test_down_stops_cleanly_and_leaves_nothing(platform: Platform) -> None:
    assert lifecycle.down(platform.home) == []
    log = programs.log_file(platform.home, postgresql.NAME).read_text()
    assert log.rstrip().endswith("database system is shut down")
    assert processes.supervised(platform.home) == []
    assert platform.mentioned() == []
    assert all(addresses.is_free(port_of(url)) for url in platform.addresses.urls().values())


def test_down_finds_a_database_that_nobody_supervises(platform: Platform) -> None:
    url = platform.addresses.postgresql
    assert url is not None
    for program in (platform.home.root / "supervisor/programs").glob("*"):
        program.unlink()
    supervisor.start(platform.home, postgresql.program(platform.home, url))
    postgresql.await_ready(platform.home, url)
    daemon = supervisor.running_pid(platform.home)
    assert daemon is not None
    os.kill(daemon, signal.SIGKILL)
    while supervisor.running_pid(platform.home) is not None:
        time.sleep(0.05)
    assert postgresql.healthy(platform.home, url)
    lifecycle.down(platform.home)
    assert not postgresql.healthy(platform.home, url)
    control = [str(postgresql.programs_folder(platform.home) / "pg_controldata"), str(postgresql._data(platform.home))]
    state = subprocess.run(control, capture_output=True, text=True, check=True).stdout
    assert re.search(r"cluster state: +shut down$", state, re.MULTILINE), state


def test_expected_services_follow_the_profile(platform: Platform) -> None:
    with_stores = platform.addresses
    without = with_stores.model_copy(update={"postgresql": None, "s3": None})
    assert health.expected(with_stores).keys() - health.expected(without).keys() == {
        postgresql.NAME,
        object_store.NAME,
    }
