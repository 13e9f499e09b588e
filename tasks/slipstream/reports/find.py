"""Finds a run's report in MLflow: by run key, by MLflow run id, or that of a spec's latest finished run."""

import json
import logging
import os
import re
from pathlib import Path
from urllib.parse import urlsplit

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from slipstream.errors import InputError, Unavailable
from slipstream.home import Home, write_atomically
from slipstream.platform import addresses
from slipstream.reports.document import REPORT, REQUEST, Report
from slipstream.store import tracking
from slipstream.store.registry import OUTAGE_CODES

log = logging.getLogger(__name__)


def connect(home: Home) -> MlflowClient:
    """Return a client of the server that MLFLOW_TRACKING_URI names, or else of the embedded platform's.

    A person waits for the answer: MLflow's own seven retries would take minutes to report a missing server.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    addresses.reach_mlflow(home, os.environ)
    mlflow.set_tracking_uri(os.environ[addresses.MLFLOW])
    return tracking.connected()


def pipeline_run(client: MlflowClient, reference: str) -> Run:
    """Return the parent run that `reference` names.

    Raise InputError if there is none, or more than one; Unavailable if MLflow does not answer.
    """
    try:
        return _pipeline_run(client, reference)
    except MlflowException as error:
        where = urlsplit(mlflow.get_tracking_uri()).netloc.rpartition("@")[2]  # without a password before it
        raise Unavailable(
            f"MLflow does not answer as it should at {where}; `slipstream up` starts the embedded one"
        ) from error


def _pipeline_run(client: MlflowClient, reference: str) -> Run:
    if "'" in reference:
        raise InputError(f"{reference!r} is neither a run key, nor an MLflow run id, nor the name of a spec")
    if re.fullmatch(r"[0-9a-f]{32}", reference):
        return _by_id(client, reference)
    by_key = _search(client, tracking.RUN_KEY, reference)
    if len(by_key) > 1:
        ids = ", ".join(f"{r.info.run_id} (spec {r.data.tags.get(tracking.SPEC)})" for r in by_key)
        raise InputError(f"{reference}: several runs have this key; name one by its MLflow run id: {ids}")
    if by_key:
        return by_key[0]
    runs = _search(client, tracking.SPEC, reference)
    if not runs:
        raise InputError(
            f"{reference}: no such run; give a run key, an MLflow run id, or the name of a spec (for its latest run)"
        )
    ended = next((run for run in runs if run.info.status != "RUNNING"), runs[0])
    if ended is not runs[0]:
        log.info("%s: a later run, %s, is under way", reference, runs[0].info.run_name)
    return ended


def _by_id(client: MlflowClient, run_id: str) -> Run:
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code in OUTAGE_CODES:
            raise
        raise InputError(f"{run_id}: MLflow has no such run") from error
    parent = run.data.tags.get("mlflow.parentRunId")
    return client.get_run(parent) if parent else run


def _search(client: MlflowClient, tag: str, value: str) -> list[Run]:
    """Return pipeline runs of all experiments with this tag, newest first."""
    prefix = tracking.experiment_name("")
    experiments = [e.experiment_id for e in client.search_experiments() if e.name.startswith(prefix)]
    if not experiments:
        return []
    condition = f"tags.`{tracking.STEP}` = 'pipeline' and tags.`{tag}` = '{value}'"
    return list(client.search_runs(experiments, condition, order_by=["attributes.start_time DESC"], max_results=100))


def load(run: Run) -> Report:
    """Return the report of a pipeline run. Raise Unavailable while there is none."""
    try:
        return Report.model_validate_json(mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/{REPORT}"))
    except MlflowException as error:
        state = run.info.status.lower()
        raise Unavailable(f"{run.info.run_name}: no report yet; the run is {state}. Its last step writes it") from error


def sample_files(home: Home, report: Report) -> tuple[Path, Path | None] | None:
    """Return files with the request body and the class names, written into the run's folder; None without a sample."""
    if report.sample is None:
        return None
    folder = home.root / "runs" / report.spec / report.run_key
    request = folder / "request.json"
    if not request.exists():
        try:
            body = mlflow.artifacts.load_text(f"runs:/{report.pipeline_run_id}/{REQUEST}")
        except MlflowException:  # the report is worth showing without it
            return None
        write_atomically(request, body)
    if not report.sample.classes:
        return request, None
    classes = folder / "classes.json"
    write_atomically(classes, json.dumps(report.sample.classes))
    return request, classes
