"""Addresses of a run's pages in Airflow and MLflow. Light: the DAG processor imports it too."""

from urllib.parse import quote

from slipstream.reports.document import PAGE

_VIEW = "?workflowType=machine_learning"
"""Without it, MLflow's pages open in their view of language-model traces."""


def airflow_run(airflow: str, dag_id: str, run_key: str) -> str:
    """Return Airflow's page of a DAG run; `airflow` is the server's base URL."""
    return f"{airflow}/dags/{dag_id}/runs/{quote(run_key, safe='')}"


def mlflow_run(mlflow: str, experiment_id: str, run_id: str) -> str:
    """Return MLflow's page of a run; `mlflow` is the server's base URL."""
    return f"{_run(mlflow, experiment_id, run_id)}{_VIEW}"


def report(mlflow: str, experiment_id: str, pipeline_run_id: str) -> str:
    """Return the page of a pipeline run's report, in MLflow."""
    return f"{_run(mlflow, experiment_id, pipeline_run_id)}/artifacts/{PAGE}{_VIEW}"


def registered_model(mlflow: str, model: str) -> str:
    """Return MLflow's page of a registered model."""
    return f"{mlflow}/#/models/{quote(model, safe='')}{_VIEW}"


def _run(mlflow: str, experiment_id: str, run_id: str) -> str:
    return f"{mlflow.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}"
