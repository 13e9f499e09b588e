"""How a run's report is found, and what is said when it is not."""

import socket

import mlflow
import pytest

from slipstream.errors import Unavailable
from slipstream.home import Home
from slipstream.reports import find
from slipstream.store import tracking


@pytest.mark.parametrize("reference", ["fashion", "0" * 32])
def test_a_server_that_is_away_is_named_without_its_password(reference: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    before, address = mlflow.get_tracking_uri(), f"http://somebody:hidden@127.0.0.1:{port}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    mlflow.set_tracking_uri(address)
    try:
        with pytest.raises(Unavailable, match=rf"does not answer as it should at 127\.0\.0\.1:{port}; `slipstream up`"):
            find.pipeline_run(find.connect(Home.from_environment()), reference)
    finally:
        mlflow.set_tracking_uri(before)


def test_a_specs_latest_run_that_has_ended_is_shown_while_another_is_under_way(mlflow_server: str) -> None:
    """A schedule may start a run the moment before the report of the one that just ended is requested."""
    mlflow.set_tracking_uri(mlflow_server)
    client = mlflow.MlflowClient()
    experiment = client.create_experiment(tracking.experiment_name("weekly-net"))
    tags = {tracking.STEP: "pipeline", tracking.SPEC: "weekly"}
    first, second = (client.create_run(experiment, start_time=when, tags=tags).info.run_id for when in (1000, 2000))
    assert find.pipeline_run(client, "weekly").info.run_id == second, "nothing has ended: the latest says so itself"
    client.set_terminated(first)
    assert find.pipeline_run(client, "weekly").info.run_id == first
    client.set_terminated(second, "FAILED")
    assert find.pipeline_run(client, "weekly").info.run_id == second
