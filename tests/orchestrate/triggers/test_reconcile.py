"""What a lost webhook missed is found, once, and one spec's trouble stops no other."""

import threading
from pathlib import Path

import pytest
from airflow_stand_in import AirflowStandIn
from mlflow import MlflowClient
from tests.odd_specs import ODD

from slipstream.contract import Release
from slipstream.home import Home
from slipstream.orchestrate.triggers import promotion
from slipstream.orchestrate.triggers.reconcile import INTERVAL_S, keep_reconciling, reconcile, report_drift
from slipstream.platform.airflow_api import AirflowApi
from slipstream.traffic.base import Routes
from slipstream.traffic.fake import FakeController

from .conftest import SPEC, version


def test_a_missed_promotion_is_started_once(
    client: MlflowClient, model: str, api: AirflowApi, airflow: AirflowStandIn, published: str
) -> None:
    home = Home.from_environment()
    assert reconcile(home, client, api) == []
    client.set_registered_model_alias(model, "source", version(client, model))
    assert reconcile(home, client, api) == ["tiny"]
    assert reconcile(home, client, api) == []
    assert list(airflow.runs) == [("optimize-tiny", "source-v1")]


def test_trouble_with_one_spec_stops_no_other(
    home: Path, client: MlflowClient, model: str, api: AirflowApi, airflow: AirflowStandIn, published: str
) -> None:
    (home / "specs" / "a-broken.yaml").write_text("name: [")
    (home / "specs" / "b-unknown.yaml").write_text(SPEC.format(name="b-unknown", model=model))
    client.set_registered_model_alias(model, "source", version(client, model))
    assert reconcile(Home.from_environment(), client, api) == ["tiny"]


def test_no_file_among_the_specs_stops_the_others(
    home: Path, client: MlflowClient, model: str, api: AirflowApi, airflow: AirflowStandIn, published: str
) -> None:
    for put, _ in ODD.values():
        put(home / "specs")
    client.set_registered_model_alias(model, "source", version(client, model))
    assert reconcile(Home.from_environment(), client, api) == ["tiny"]
    assert report_drift(Home.from_environment(), client, FakeController(home)) == []


def test_an_error_of_any_kind_about_one_spec_stops_no_other(
    home: Path,
    client: MlflowClient,
    model: str,
    api: AirflowApi,
    airflow: AirflowStandIn,
    published: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (home / "specs" / "a-other.yaml").write_text(SPEC.format(name="a-other", model="other"))
    promoted = promotion.promoted_version

    def fails_for_other(client: MlflowClient, name: str, alias: str) -> str | None:
        if name == "other":
            raise ValueError("out of the blue")
        return promoted(client, name, alias)

    monkeypatch.setattr(promotion, "promoted_version", fails_for_other)
    client.set_registered_model_alias(model, "source", version(client, model))
    assert reconcile(Home.from_environment(), client, api) == ["tiny"]


def test_nothing_is_lost_while_airflow_is_down(
    client: MlflowClient, model: str, api: AirflowApi, airflow: AirflowStandIn, published: str
) -> None:
    client.set_registered_model_alias(model, "source", version(client, model))
    airflow.down = True
    assert reconcile(Home.from_environment(), client, api) == []
    airflow.down = False
    airflow.token = "second"  # a restarted Airflow forgets its tokens
    assert reconcile(Home.from_environment(), client, api) == ["tiny"]


def test_traffic_without_a_champion_is_reported(
    client: MlflowClient, model: str, published: str, tmp_path: Path
) -> None:
    version(client, model)
    fake = FakeController(tmp_path)
    try:
        assert report_drift(Home.from_environment(), client, fake) == []
        fake.deploy(Release(model=model, name="v1"), tmp_path)
        fake.set_routes(model, Routes(weights={"v1": 100}))
        [sentence] = report_drift(Home.from_environment(), client, fake)
        assert f"{model}: there is no champion, but v1 (100 %) has traffic" in sentence
    finally:
        fake.close()


def test_the_loop_survives_whatever_a_round_raises() -> None:
    stop, rounds = threading.Event(), []

    def once() -> None:
        rounds.append(1)
        if len(rounds) == 3:
            stop.set()
        raise ValueError("out of the blue")

    keep_reconciling(once, stop, interval_s=0.01)
    assert len(rounds) == 3
    assert INTERVAL_S <= 30  # a lost webhook is found within a minute
