"""How a run's report is found, and what is said when it is not."""

import socket

import mlflow
import pytest

from slipstream.errors import Unavailable
from slipstream.home import Home
from slipstream.report import find


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
