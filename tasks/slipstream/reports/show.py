"""`slipstream report`: the summary of a run, the addresses of its pages, and a line that queries the release."""

import json
import os
import sys
from pathlib import Path

from rich.console import Console

from slipstream.errors import Unavailable
from slipstream.home import Home
from slipstream.plan import catalog
from slipstream.platform import addresses
from slipstream.platform.addresses import Addresses
from slipstream.reports import find, tables, urls
from slipstream.reports.document import Report
from slipstream.serving.client import infer_path


def show(reference: str, *, as_json: bool) -> None:
    """Print the report of a run. Raise InputError if there is no such run, Unavailable while it has no report."""
    home = Home.from_environment()
    report = find.load(find.pipeline_run(find.connect(home), reference))
    if as_json:
        sys.stdout.write(json.dumps(report.model_dump(mode="json"), indent=2) + "\n")
        return
    console = Console(highlight=False)
    console.width = max(console.width, tables.WIDTH)  # a narrow terminal wraps lines, rather than lose columns
    console.print(tables.summary(report))
    try:
        places = addresses.load(home)
    except Unavailable:  # a report read from another MLflow server has no pages here
        return
    console.print()
    for name, value in pages(home, places, report, reveal=console.is_terminal).items():
        console.print(f"[dim]{name:<10}[/]  {value}", soft_wrap=True)  # unbroken, so that it can be copied
    line = request_line(home, places, report)
    if line:
        console.print(f"\nSend a held-out sample to the release; {_expectation(report)}:")
        sys.stdout.write(line + "\n")


def pages(home: Home, places: Addresses, report: Report, *, reveal: bool) -> dict[str, str]:
    """Return addresses of the run's pages, and the log-in; its password only with `reveal`."""
    secrets = addresses.load_secrets(home)
    password = secrets.airflow_password if reveal else "(shown on a terminal, and by `slipstream up`)"
    experiment, run = report.experiment_id, report.pipeline_run_id
    return {
        "Airflow": urls.airflow_run(places.airflow, catalog.dag_id(report.spec), report.run_key),
        "log-in": f"{secrets.airflow_user} / {password}",
        "MLflow run": urls.mlflow_run(places.mlflow, experiment, run),
        "report": urls.report(places.mlflow, experiment, run),
        "registry": urls.registered_model(places.mlflow, report.model),
    }


def request_line(home: Home, places: Addresses, report: Report) -> str | None:
    """Return the curl line if something serves the model, whatever this run's outcome."""
    if report.outcome not in ("released", "unchanged"):
        return None
    files = find.sample_files(home, report)
    if files is None:
        return None
    request, classes = (_short(f) if f else None for f in files)
    assert request is not None
    return tables.curl(places.envoy + infer_path(report.model), request, classes, labelled=bool(report.sample_label))


def _expectation(report: Report) -> str:
    """Return what the line should print."""
    label = report.sample_label
    return f"the data set calls it {label}" if label else "the line prints the shape of its answer"


def _short(path: Path) -> Path:
    """Return the path relative to the current folder if it is below it."""
    return Path(os.path.relpath(path)) if path.is_relative_to(Path.cwd()) else path
