"""Real MLflow, real HTTP, and published specs. These tests run in the airflow environment, as the receiver does."""

import importlib.util
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "tests"))

from airflow_stand_in import AirflowStandIn  # noqa: E402 (found on the path added above)

from slipstream.platform.airflow_api import AirflowApi  # noqa: E402

if importlib.util.find_spec("fastapi") is None or importlib.util.find_spec("sqlalchemy") is None:
    collect_ignore_glob = ["test_*.py"]

SECRET = "a secret of this test"
SPEC = """\
name: {name}
model: {{registry: models:/{model}@source, architecture: examples.fashion:resnet}}
data: examples.fashion:data
recipes: {{int8: [quantize]}}
targets: {{server: {{engine: openvino}}}}
"""


@pytest.fixture
def airflow() -> Iterator[AirflowStandIn]:
    server = AirflowStandIn()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def api(airflow: AirflowStandIn) -> AirflowApi:
    return AirflowApi(airflow.url, "user", "password")


@pytest.fixture
def client(mlflow_server: str) -> MlflowClient:
    mlflow.set_tracking_uri(mlflow_server)
    return MlflowClient()


@pytest.fixture
def model(client: MlflowClient, request: pytest.FixtureRequest) -> str:
    """A registered model of this test's own."""
    name = f"model-{request.node.name[:40]}"
    client.create_registered_model(name)
    return name


@pytest.fixture
def unused_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def published(home: Path, model: str, airflow: AirflowStandIn) -> str:
    """A published spec for the model, known to Airflow; its DAG."""
    (home / "specs").mkdir()
    (home / "specs" / "tiny.yaml").write_text(SPEC.format(name="tiny", model=model))
    airflow.dags["optimize-tiny"] = {"is_paused": False}
    return "optimize-tiny"


def version(client: MlflowClient, model: str, tags: dict[str, str] | None = None) -> str:
    """A new version of the model; nothing here looks at its files."""
    return str(client.create_model_version(model, "s3://nowhere/model", tags=tags).version)


def until(true: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    pause = threading.Event()
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        pause.wait(0.05)
