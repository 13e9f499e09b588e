"""Alias moved in a real MLflow → webhook over HTTP → signature → a run in Airflow, once for each version."""

import base64
import contextlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn
from airflow_stand_in import AirflowStandIn
from fastapi.testclient import TestClient
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from slipstream.home import Home
from slipstream.orchestrate.triggers import server, signature
from slipstream.platform.airflow_api import AirflowApi
from slipstream.serving.connections import Bounded

from .conftest import SECRET, until, version


@pytest.fixture
def receiver(
    home: Path, client: MlflowClient, api: AirflowApi, airflow: AirflowStandIn, published: str
) -> Iterator[str]:
    """The receiver on a free port, registered in MLflow; yields its webhook address."""
    here = Home.from_environment()
    config = uvicorn.Config(lambda: None, port=0)
    listening = config.bind_socket()
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    for left in client.list_webhooks():
        client.delete_webhook(left.webhook_id)
    app = server.create_app(here, client, api, url, SECRET)
    running = uvicorn.Server(uvicorn.Config(app, log_level="warning", http=Bounded))
    thread = threading.Thread(target=running.run, args=([listening],))
    thread.start()
    until(lambda: running.started and len(client.list_webhooks()) == 1)
    yield url + server.PATH
    running.should_exit = True
    thread.join(20)


def test_moving_the_alias_starts_one_run_for_each_version(
    client: MlflowClient, model: str, airflow: AirflowStandIn, receiver: str
) -> None:
    first, second = version(client, model), version(client, model)
    for number in (first, first, second):
        client.set_registered_model_alias(model, "source", number)
        until(lambda number=number: ("optimize-tiny", f"source-v{number}") in airflow.runs)
    assert {k: v["conf"] for k, v in airflow.runs.items()} == {
        ("optimize-tiny", "source-v1"): {"source_version": "1"},
        ("optimize-tiny", "source-v2"): {"source_version": "2"},
    }


def test_other_aliases_and_own_versions_start_nothing(
    client: MlflowClient, model: str, airflow: AirflowStandIn, receiver: str
) -> None:
    own, theirs = version(client, model, {"slipstream.pipeline_run": "r"}), version(client, model)
    client.set_registered_model_alias(model, "champion", theirs)
    client.set_registered_model_alias(model, "source", own)
    client.set_registered_model_alias(model, "source", theirs)  # the mark that all were delivered
    until(lambda: len(airflow.runs) > 0)
    assert list(airflow.runs) == [("optimize-tiny", f"source-v{theirs}")]


def test_a_forged_delivery_is_refused(receiver: str, client: MlflowClient, model: str, airflow: AirflowStandIn) -> None:
    with httpx.Client() as forger:
        answer = forger.post(
            receiver, json={"entity": "model_version_alias"}, headers={"X-MLflow-Signature": "v1,AA=="}
        )
    assert answer.status_code == 401
    assert not airflow.runs


def signed_headers(body: bytes, timestamp: str) -> dict[str, str]:
    digest = base64.b64encode(signature.sign(SECRET, "1", timestamp, body)).decode()
    named = {"X-MLflow-Delivery-Id": "1", "X-MLflow-Timestamp": timestamp, "X-MLflow-Signature": f"v1,{digest}"}
    return {**named, "content-type": "application/json"}


def test_a_signed_delivery_without_a_proper_time_is_refused(receiver: str) -> None:
    for timestamp in ("1" * 4000, "-1", "1e9", ""):
        assert httpx.post(receiver, content=b"{}", headers=signed_headers(b"{}", timestamp)).status_code == 401


def test_a_signed_document_of_another_kind_is_refused(receiver: str) -> None:
    now = str(int(time.time()))
    for body in (b"", b"[]", b"\xff", b"[" * 20_000):
        assert httpx.post(receiver, content=body, headers=signed_headers(body, now)).status_code == 422


def test_large_posts_do_not_fill_the_memory(receiver: str) -> None:
    """In chunks, so that no length gives them away; 64 MiB each, without a signature or with a false one."""
    part = b" " * 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
    before = peak_mib()
    for headers, status in (({}, 401), (signed_headers(b"", str(int(time.time()))), 413)):
        for _ in range(3):
            with contextlib.suppress(httpx.WriteError, httpx.RemoteProtocolError):  # closed while still sending
                answer = httpx.post(receiver, content=iter([part] * 64), headers=headers, timeout=30)
                assert answer.status_code == status
    assert peak_mib() - before < 32


def peak_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))


def test_while_airflow_is_down_the_delivery_is_put_off(
    home: Path, client: MlflowClient, model: str, api: AirflowApi, airflow: AirflowStandIn, published: str
) -> None:
    from slipstream.errors import Unavailable

    client.set_registered_model_alias(model, "source", version(client, model))
    data = {"name": model, "alias": "source", "version": "1"}
    body = json.dumps({"entity": "model_version_alias", "action": "created", "data": data})
    airflow.down = True
    with pytest.raises(Unavailable):
        server.deliver(Home.from_environment(), client, api, body.encode())
    airflow.down = False
    assert server.deliver(Home.from_environment(), client, api, body.encode()) == ["tiny"]


def test_while_the_webhook_is_refused_the_reconciler_goes_on(
    home: Path,
    client: MlflowClient,
    model: str,
    api: AirflowApi,
    airflow: AirflowStandIn,
    published: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(*_: object) -> None:
        raise MlflowException("Invalid webhook URL: it must use https")

    monkeypatch.setattr(server, "ensure_webhook", refused)
    client.set_registered_model_alias(model, "source", version(client, model))
    with TestClient(server.create_app(Home.from_environment(), client, api, "http://127.0.0.1:9", SECRET)):
        until(lambda: ("optimize-tiny", "source-v1") in airflow.runs)


def test_registering_the_webhook_again_changes_nothing(client: MlflowClient, receiver: str) -> None:
    server.ensure_webhook(client, receiver, SECRET)
    server.ensure_webhook(client, receiver, SECRET)
    [webhook] = client.list_webhooks()
    assert (webhook.name, webhook.url) == (server.NAME, receiver)
