"""Starting a run: what is published, and what must not be published now."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.airflow_stand_in import AirflowStandIn

from slipstream import spec
from slipstream.errors import Unavailable
from slipstream.home import Home
from slipstream.orchestrate.watch.start import require_same_graph
from slipstream.plan import catalog
from slipstream.platform.airflow_api import AirflowApi

TINY = """\
name: tiny
model: {registry: models:/tiny@source, architecture: examples.fashion:resnet}
data: examples.fashion:data
recipes: {int8: [quantize]}
targets: {server: {engine: openvino}}
"""


@pytest.fixture
def airflow() -> Iterator[AirflowStandIn]:
    server = AirflowStandIn()
    server.dags["optimize-tiny"] = {}
    yield server
    server.shutdown()


def test_a_spec_with_another_graph_is_not_published_under_a_run(home: Path, airflow: AirflowStandIn) -> None:
    path = home / "tiny.yaml"
    path.write_text(TINY)
    here, api = Home.from_environment(), AirflowApi(airflow.url, "admin", "secret")
    wider = spec.parse(TINY.replace("{int8: [quantize]}", "{int8: [quantize], pruned: [prune]}"), "wider")
    require_same_graph(here, wider, api)  # nothing is published yet
    catalog.publish(here, path)
    require_same_graph(here, wider, api)  # no run is under way
    airflow.runs["optimize-tiny", "run-1"] = {"dag_run_id": "run-1", "state": "running"}
    require_same_graph(here, spec.parse(TINY + "seed: 7\n", "same graph"), api)
    with pytest.raises(Unavailable, match=r"run-1 of tiny is under way.*slipstream watch tiny run-1"):
        require_same_graph(here, wider, api)
    airflow.runs["optimize-tiny", "run-1"]["state"] = "success"
    require_same_graph(here, wider, api)
