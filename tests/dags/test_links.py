"""Where a task's links lead: to the newest MLflow run of its step, on a real server."""

import uuid
from types import SimpleNamespace

import pytest
from mlflow import MlflowClient


@pytest.fixture
def model(mlflow_server: str, airflow_home: object) -> str:
    """A model with a pipeline run and two runs of one step."""
    name = f"net-{uuid.uuid4().hex[:8]}"
    client = MlflowClient()
    experiment = client.create_experiment(f"slipstream/{name}")
    for tags in ({"step": "pipeline"}, {"step": "build", "cell": "int8@server"}, {"step": "check"}):
        shared = {"slipstream.run_key": "run-1"} | {f"slipstream.{k}": v for k, v in tags.items()}
        client.create_run(experiment, tags=shared)
    return name


def link(kind: str, task_id: str, model: str, run_key: str = "run-1") -> str:
    import links

    operator = SimpleNamespace(task_id=task_id, model=model)
    return str(getattr(links, kind)().get_link(operator, ti_key=SimpleNamespace(run_id=run_key)))


def test_a_task_leads_to_its_step_and_to_the_report(model: str, mlflow_server: str) -> None:
    client = MlflowClient()
    experiment = client.get_experiment_by_name(f"slipstream/{model}")
    assert experiment is not None

    def run_of(step: str) -> str:
        [run] = client.search_runs([experiment.experiment_id], f"tags.`slipstream.step` = '{step}'")
        return f"{mlflow_server}/#/experiments/{experiment.experiment_id}/runs/{run.info.run_id}"

    view = "?workflowType=machine_learning"
    assert link("MlflowRunLink", "build.int8.server", model) == run_of("build") + view
    assert link("MlflowRunLink", "check", model) == run_of("check") + view
    assert link("ReportLink", "check", model) == run_of("pipeline") + "/artifacts/report/index.html" + view


def test_what_mlflow_does_not_know_has_no_link(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert link("MlflowRunLink", "prune.int8", model) == ""
    assert link("MlflowRunLink", "check", model, run_key="run-2") == ""
    assert link("MlflowRunLink", "check", "unheard-of") == ""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert link("MlflowRunLink", "check", model) == ""
