"""An API server in memory, a stand-in for KServe with toy servers, and a controller that talks to them."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.kserve.api_server import ApiServer
from tests.kserve.kserve_stand_in import KServeStandIn
from tests.steps.stages import quiet, world, world_maker
from tests.traffic.conftest import TOY_SERVER

from slipstream.plan.settings import Kubernetes, Serving, Settings
from slipstream.traffic.kserve import KServeController
from slipstream.traffic.kserve_api import Api

__all__ = ["quiet", "world", "world_maker"]

NAMESPACE = "models"
USER = "release"


@pytest.fixture
def api_server() -> Iterator[ApiServer]:
    server = ApiServer()
    yield server
    server.close()


@pytest.fixture
def stand_in(api_server: ApiServer, tmp_path: Path) -> Iterator[KServeStandIn]:
    running = KServeStandIn(api_server.client("kserve"), NAMESPACE, tmp_path / "stand-in", TOY_SERVER)
    yield running
    running.close()


@pytest.fixture
def control(api_server: ApiServer, stand_in: KServeStandIn, tmp_path: Path) -> KServeController:
    return made(api_server, stand_in.ingress, tmp_path)


def made(api_server: ApiServer, ingress: str | None, folder: Path, **serving: object) -> KServeController:
    """A controller as another process would make it: it knows nothing but the cluster."""
    settings = Settings(kubernetes=Kubernetes(serving=Serving.model_validate({"ready_timeout_s": 30, **serving})))
    api = Api(NAMESPACE, api_server.client(USER))
    return KServeController(api, settings, str(folder / "uploaded"), ingress, failed_for_s=0.3)
