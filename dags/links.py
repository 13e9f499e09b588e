"""Links from an Airflow task to what it recorded in MLflow. Computed once, when the task ends; stored as an XCom."""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING
from urllib.parse import quote

import httpx
from airflow.sdk import BaseOperatorLink

from slipstream.plan import flow
from slipstream.reports import urls

if TYPE_CHECKING:  # operators.py imports this module
    from airflow.models.taskinstancekey import TaskInstanceKey

    from operators import StepOperator

TIMEOUT_S = 3
"""Timeout of a request for a link. Links are a convenience: a slow or missing MLflow must not delay the end of a
task."""


class MlflowRunLink(BaseOperatorLink):
    """The step's own run in MLflow."""

    name = "MLflow run"

    def get_link(self, operator: "StepOperator", *, ti_key: "TaskInstanceKey") -> str:
        """Return the address, or an empty string if MLflow does not know the run or does not answer."""
        step, cell = flow.task_of(operator.task_id)
        tags = {"slipstream.step": step} | ({"slipstream.cell": cell.key} if cell else {})
        return _address(urls.mlflow_run, operator.model, str(ti_key.run_id), tags)


class ReportLink(BaseOperatorLink):
    """The report of the pipeline run."""

    name = "Report"

    def get_link(self, operator: "StepOperator", *, ti_key: "TaskInstanceKey") -> str:
        """Return the address, or an empty string if MLflow does not know the run or does not answer."""
        return _address(urls.report, operator.model, str(ti_key.run_id), {"slipstream.step": "pipeline"})


def _address(page: Callable[[str, str, str], str], model: str, run_key: str, tags: dict[str, str]) -> str:
    """Return the page address of the newest run of a model's experiment with these tags, through MLflow's REST API."""
    server = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not server.startswith("http"):
        return ""
    user, password = (os.environ.get(f"MLFLOW_TRACKING_{name}", "") for name in ("USERNAME", "PASSWORD"))
    tag_filter = " and ".join(f"tags.`{k}` = '{v}'" for k, v in ({"slipstream.run_key": run_key} | tags).items())
    try:
        with httpx.Client(base_url=server, timeout=TIMEOUT_S, auth=(user, password) if user else None) as client:
            name = quote(f"slipstream/{model}", safe="")
            answer = client.get(f"/api/2.0/mlflow/experiments/get-by-name?experiment_name={name}").raise_for_status()
            experiment = answer.json()["experiment"]["experiment_id"]
            query = {"experiment_ids": [experiment], "filter": tag_filter, "max_results": 1}
            runs = client.post("/api/2.0/mlflow/runs/search", json=query).raise_for_status().json().get("runs", [])
    except (httpx.HTTPError, ValueError, KeyError):
        return ""
    return page(server, experiment, runs[0]["info"]["run_id"]) if runs else ""
