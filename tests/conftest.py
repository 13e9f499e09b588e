"""Fixtures shared by all tests. Every server binds to 127.0.0.1 on a free port and stops with the test run."""

import base64
import os
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

if TYPE_CHECKING:
    from tests.s3_gateway import Gateway

ROOT = Path(__file__).parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs an NVIDIA GPU where there is none."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    from slipstream.errors import EngineError
    from slipstream.measure import gpu

    try:
        gpu.find(0)
    except EngineError as error:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=str(error)))


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(url: str, process: subprocess.Popen[bytes], seconds: float = 240) -> None:
    """Return when `url` answers 200; fail when the process ends or the time is up."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, f"server ended with {process.returncode}"
        try:
            if httpx.get(url, timeout=1).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise AssertionError(f"{url} did not answer within {seconds} s")


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real MLflow server on SQLite and local files; yields its URL, also set as MLFLOW_TRACKING_URI."""
    folder = tmp_path_factory.mktemp("mlflow")
    port = free_port()
    environment = os.environ | {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http,https",  # webhooks of the trigger tests stay on this machine
        "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
        "MLFLOW_WEBHOOK_CACHE_TTL": "0",  # else a new webhook counts after a minute
        "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY": base64.urlsafe_b64encode(os.urandom(32)).decode(),
    }
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [
                str(ROOT / ".envs/airflow/bin/mlflow"),
                "server",
                "--host=127.0.0.1",
                f"--port={port}",
                "--workers=1",
                f"--backend-store-uri=sqlite:///{folder}/mlflow.db",
                f"--artifacts-destination={folder}/artifacts",
            ],
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    before = os.environ.get("MLFLOW_TRACKING_URI")
    try:
        wait_for(f"{url}/health", process)
        os.environ["MLFLOW_TRACKING_URI"] = url
        yield url
    finally:
        if before is None:
            os.environ.pop("MLFLOW_TRACKING_URI", None)
        else:
            os.environ["MLFLOW_TRACKING_URI"] = before
        os.killpg(process.pid, 15)
        process.wait(timeout=20)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh SLIPSTREAM_HOME."""
    path = tmp_path / "home"
    path.mkdir()
    monkeypatch.setenv("SLIPSTREAM_HOME", str(path))
    monkeypatch.setenv("SLIPSTREAM_ENVS", str(ROOT / ".envs"))
    monkeypatch.setenv("SLIPSTREAM_CODE", str(ROOT))
    for elsewhere in ("SLIPSTREAM_SPECS", "SLIPSTREAM_RUNS"):
        monkeypatch.delenv(elsewhere, raising=False)
    return path


@pytest.fixture(scope="session")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Gateway]":
    """An S3 endpoint that checks credentials; tests that stop it start it again."""
    from tests.s3_gateway import Gateway

    found = Gateway(tmp_path_factory.mktemp("gateway"))
    found.start()
    try:
        yield found
    finally:
        found.stop()


@pytest.fixture
def bucket(gateway: "Gateway", home: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh bucket at `gateway`, which the environment names; yields its s3:// URI."""
    for name, value in gateway.environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://{gateway.make_bucket(f'test-{uuid.uuid4().hex[:12]}')}"
