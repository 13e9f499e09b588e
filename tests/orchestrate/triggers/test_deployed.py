"""The receiver as a cluster runs it: a process that only its environment tells what to do, with specs in a mounted
ConfigMap. It keeps nothing of its own, so that a restart loses nothing."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import httpx
import pytest
from airflow_stand_in import AirflowStandIn
from mlflow import MlflowClient

from slipstream.orchestrate.triggers.server import PATH

from .conftest import SECRET, SPEC, until, version

PROGRAM = [sys.executable, "-m", "slipstream.orchestrate.triggers.server"]
Deployed = Callable[[], AbstractContextManager[str]]


def mount(folder: Path, files: dict[str, str]) -> Path:
    """A folder as the kubelet mounts a ConfigMap: links to a folder that is swapped as a whole."""
    real = folder / "..2026_11_24_16_00_00.1"
    real.mkdir(parents=True)
    (folder / "..data").symlink_to(real.name)
    for name, text in files.items():
        (real / name).write_text(text)
        (folder / name).symlink_to(f"..data/{name}")
    return folder


@pytest.fixture
def deployed(tmp_path: Path, model: str, airflow: AirflowStandIn, mlflow_server: str, unused_port: int) -> Deployed:
    """Starts the receiver; its address while it runs."""
    airflow.dags["optimize-tiny"] = {"is_paused": False}
    specs = mount(tmp_path / "specs", {"tiny.yaml": SPEC.format(name="tiny", model=model)})
    address = f"127.0.0.1:{unused_port}"
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("SLIPSTREAM_")},
        "SLIPSTREAM_HOME": str(tmp_path / "empty"),
        "SLIPSTREAM_SPECS": str(specs),
        "SLIPSTREAM_AIRFLOW_URL": airflow.url,
        "SLIPSTREAM_AIRFLOW_USER": "user",
        "SLIPSTREAM_AIRFLOW_PASSWORD": "password",
        "MLFLOW_TRACKING_URI": mlflow_server,
        "SLIPSTREAM_WEBHOOK_SECRET": SECRET,
        "SLIPSTREAM_WEBHOOK_URL": f"http://{address}",
        "SLIPSTREAM_WEBHOOK_LISTEN": address,
    }

    @contextmanager
    def run() -> Iterator[str]:
        process = subprocess.Popen(PROGRAM, env=environment, stderr=subprocess.PIPE)
        try:
            until(lambda: process.poll() is not None or _answers(f"http://{address}/health"), 60)
            assert process.poll() is None, process.stderr and process.stderr.read().decode()
            yield f"http://{address}"
        finally:
            process.terminate()
            _, said = process.communicate(timeout=20)
        assert b"Traceback" not in said and SECRET.encode() not in said and b"password" not in said

    return run


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=1).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def test_it_registers_itself_and_a_restart_loses_no_promotion(
    client: MlflowClient, model: str, airflow: AirflowStandIn, deployed: Deployed
) -> None:
    first, second = version(client, model), version(client, model)
    with deployed() as address:
        until(lambda: f"{address}{PATH}" in {w.url for w in client.list_webhooks()})
        client.set_registered_model_alias(model, "source", first)
        until(lambda: ("optimize-tiny", f"source-v{first}") in airflow.runs)
    client.set_registered_model_alias(model, "source", second)  # no webhook is delivered
    assert ("optimize-tiny", f"source-v{second}") not in airflow.runs
    with deployed():
        until(lambda: ("optimize-tiny", f"source-v{second}") in airflow.runs)
    assert len(airflow.runs) == 2


def test_without_its_variables_it_says_what_is_missing(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLIPSTREAM_", "MLFLOW_"))}
    environment["SLIPSTREAM_HOME"] = str(tmp_path)
    done = subprocess.run(PROGRAM, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("Bad input: the receiver of webhooks is not told SLIPSTREAM_AIRFLOW")
