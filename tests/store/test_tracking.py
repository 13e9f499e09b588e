"""Where a step's runs are recorded, and which of them are believed."""

import logging
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slipstream import spec as specs
from slipstream.contract import Artifact, StepOutput, Verdict
from slipstream.data.splits import Data, Split
from slipstream.errors import DataError, InputError
from slipstream.plan import flow
from slipstream.store.tracking import IDENTITY, OUTPUT, SPEC, STEP, Tracking, connected

IDENTITY_OF_STEP = "1" * 64


def test_an_address_of_no_server_is_refused_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://mlflow:hidden@127.0.0.1/mlflow")
    with pytest.raises(InputError, match=r"^MLFLOW_TRACKING_URI: .*such as http://127.0.0.1:5000, not to postgresql:…"):
        connected()
    with pytest.raises(InputError) as raised:
        connected()
    assert "hidden" not in str(raised.value)


@pytest.fixture
def tracking(mlflow_server: str, home: Path) -> Tracking:
    document = (Path(__file__).parents[1] / "specs" / "good-smallest.yaml").read_text()
    chosen = specs.parse(document, "test")
    model = chosen.model.model_copy(update={"registry": f"models:/net-{uuid.uuid4().hex[:8]}@source"})
    return Tracking(chosen.model_copy(update={"model": model}))


def finished(tracking: Tracking, identity: str = IDENTITY_OF_STEP) -> StepOutput:
    """The output of a step that this platform ran."""
    run = tracking.start("run-1", "build", None, identity)
    artifact = Artifact(uri="mlflow-artifacts:/1", path="data/engine", sha256="b" * 64, size_bytes=1)
    return tracking.finish(
        run, StepOutput(step="build", identity=identity, run_id=run.run_id, artifact=artifact), cache=True
    )


def planted(tracking: Tracking, document: dict[str, Any] | None) -> str:
    """A run as an intruder plants it: newer than every other, finished, with the identity that a step asks for."""
    tags = {IDENTITY: IDENTITY_OF_STEP, SPEC: tracking.spec.name, STEP: "build"}
    run_id = str(tracking.client.create_run(tracking.experiment_id, tags=tags).info.run_id)
    if document is not None:
        tracking.client.log_dict(run_id, document | {"run_id": run_id}, OUTPUT)
    tracking.client.set_terminated(run_id)
    return run_id


def test_a_planted_result_is_not_believed(tracking: Tracking, caplog: pytest.LogCaptureFixture) -> None:
    ours = finished(tracking)
    assert ours.signature
    theirs = ours.model_copy(
        update={"artifact": ours.artifact and ours.artifact.model_copy(update={"sha256": "c" * 64})}
    )
    documents = [theirs.model_dump(mode="json"), theirs.model_dump(mode="json") | {"signature": ""}, {}, None]
    runs = [planted(tracking, document) for document in documents]
    with caplog.at_level(logging.WARNING):
        assert tracking.find(IDENTITY_OF_STEP) == ours
    for run_id in runs:
        assert f"MLflow run {run_id} claims to be this step's result and is not used" in caplog.text
        if documents[runs.index(run_id)] is not None:
            with pytest.raises(DataError, match=f"MLflow run {run_id}"):
                tracking.output(run_id)


def test_a_genuine_result_of_another_step_or_run_is_not_believed(
    tracking: Tracking, caplog: pytest.LogCaptureFixture
) -> None:
    other = finished(tracking, "2" * 64)
    tracking.client.set_tag(other.run_id, IDENTITY, IDENTITY_OF_STEP)  # relabelled
    copied = planted(tracking, None)
    tracking.client.log_dict(copied, other.model_dump(mode="json") | {"identity": IDENTITY_OF_STEP}, OUTPUT)
    assert tracking.find(IDENTITY_OF_STEP) is None
    assert f"MLflow run {other.run_id} carries the output of another step" in caplog.text


def test_results_of_another_key_are_made_again(
    tracking: Tracking, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ours = finished(tracking)
    monkeypatch.setenv("SLIPSTREAM_HOME", str(tmp_path / "elsewhere"))
    assert tracking.find(IDENTITY_OF_STEP) is None
    monkeypatch.setenv("SLIPSTREAM_SIGNING_KEY", "0" * 64)
    again = finished(tracking)
    assert tracking.find(IDENTITY_OF_STEP) == again != ours


def test_a_reused_result_is_signed_for_the_run_that_reuses_it(tracking: Tracking) -> None:
    ours = finished(tracking)
    reused = tracking.reuse("run-2", ours, None)
    assert reused.reused
    assert reused.run_id == ours.run_id
    (run,) = tracking.search({"slipstream.reused_from": ours.run_id})
    assert tracking.output(run.info.run_id) == reused
    assert tracking.find(IDENTITY_OF_STEP) == ours


def test_a_judged_engine_carries_its_figures_and_verdicts_and_the_data_they_are_about(tracking: Tracking) -> None:
    model = tracking.client.create_logged_model(tracking.experiment_id, "engine")
    run = tracking.start("run-1", "validate", flow.cell_of("int8@server"), IDENTITY_OF_STEP)
    output = StepOutput(
        step="validate",
        cell=flow.cell_of("int8@server"),
        identity=IDENTITY_OF_STEP,
        run_id=run.run_id,
        metrics={"top1": 91.5, "p50_ms": 0.2},
        verdicts=(Verdict(gate="accuracy", answer="pass", reason="drop 0.1 points"),),
    )
    split = Split(np.zeros((4, 2), np.float32), np.arange(4))
    engine = Artifact(uri="models:/m", path="data/engine", sha256="b" * 64, size_bytes=1, model_id=model.model_id)
    run.judges(output, engine, Data(split, split), "tiny")
    judged = tracking.client.get_logged_model(model.model_id)
    assert {(m.key, m.value, m.dataset_name) for m in judged.metrics} == {
        ("top1", 91.5, "tiny-test"),
        ("p50_ms", 0.2, "tiny-test"),
    }
    assert judged.tags["gate.accuracy"] == "pass: drop 0.1 points"
    inputs = tracking.client.get_run(run.run_id).inputs
    assert [d.dataset.name for d in inputs.dataset_inputs] == ["tiny-test"]
    assert [m.model_id for m in inputs.model_inputs] == [model.model_id]
