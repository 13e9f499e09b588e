"""Follows a run until it ends."""

import time
from collections.abc import Mapping

from mlflow.exceptions import MlflowException
from rich.console import Console
from rich.markup import escape

from slipstream.errors import InputError, Unavailable
from slipstream.home import Home
from slipstream.orchestrate.watch.journal import (
    OVER,
    Journal,
    Line,
    Try,
    duration,
    exit_code,
    not_reached,
    seconds_between,
    under_way,
)
from slipstream.orchestrate.watch.notes import PIPELINE, Key, Note, Notes, be_patient_elsewhere
from slipstream.orchestrate.watch.start import Started
from slipstream.orchestrate.watch.view import view
from slipstream.platform import addresses
from slipstream.platform.airflow_api import FINAL, AirflowApi, TaskInstance
from slipstream.plugins import STEPS
from slipstream.reports import urls
from slipstream.reports.find import connect

POLL_S = 1.0
MEASURING_POLL_S = 10.0
"""Poll interval while a step measures time: the display's requests to Airflow and MLflow take processor time from
it."""
PATIENCE_S = 300
"""How long to wait for a silent Airflow; a restart takes about a minute."""


def follow(home: Home, run: Started, console: Console) -> int:
    """Show the run until it ends; return the exit code. Ctrl-C leaves the run going and says so.

    Raise Unavailable if Airflow is silent for PATIENCE_S, InputError if there is no such run.
    """
    be_patient_elsewhere()
    notes = Notes(connect(home), run.spec.model.name, run.spec.name, run.run_id)
    watch = _Watch(AirflowApi.of(home), notes, run)
    places = addresses.load(home)
    airflow_page = urls.airflow_run(places.airflow, run.dag_id, run.run_id)
    console.print(f"[dim]{airflow_page}[/]", highlight=False, soft_wrap=True)
    try:
        with view(console) as display:
            while not (watch.due(time.monotonic()) and watch.look()):
                display.show(watch.new_lines(), under_way(watch.tasks, watch.notes), watch.footer())
                time.sleep(POLL_S)
            display.show([*watch.new_lines(), *not_reached(watch.tasks)], (), "")
    except KeyboardInterrupt:
        console.print(f"\nThe run goes on; follow it again with: slipstream watch {run.spec.name} {run.run_id}")
        return 0
    code = exit_code(watch.state, watch.notes)
    pipeline = watch.notes.get(PIPELINE, Note(status=""))
    console.print(_end(code, pipeline.headline, run, watch.seconds), highlight=False)
    pages = {"Airflow": airflow_page}
    if pipeline.headline and notes.experiment_id is not None:
        pages["report"] = urls.report(places.mlflow, notes.experiment_id, pipeline.run_id)
        pages["next"] = f"slipstream report {run.spec.name}  ({_next(code)})"
    else:
        pages["next"] = "see the log of the failed task in Airflow; there is no report of this run"
    for name, value in pages.items():
        console.print(f"  [dim]{name:<8}[/] {value}", highlight=False, soft_wrap=True)
    return code


def _end(code: int, headline: str, run: Started, seconds: float | None) -> str:
    """Return the run's outcome, as stated in its report, and its duration."""
    mark = "[green]✓[/]" if code == 0 else "[bold red]✗[/]"
    text = escape(headline) or ("Finished" if code == 0 else "Failed")
    return f"\n{mark} [bold]{text}[/]\n  [dim]{run.spec.name} {run.run_id} took {duration(seconds)}[/]"


def _next(code: int) -> str:
    return "all engines, and a request to try" if code == 0 else "all engines, and why each was refused"


class _Watch:
    """The latest view of a run."""

    def __init__(self, airflow: AirflowApi, source: Notes, run: Started) -> None:
        self._airflow, self._source, self._run = airflow, source, run
        self._journal = Journal()
        self._heard = time.monotonic()
        self._looked: float | None = None
        self._began: str | None = None
        self._ended: str | None = None
        self._silent = ""
        self.tasks: list[TaskInstance] = []
        self.notes: Mapping[Key, Note] = {}
        self.reasons: dict[Try, str] = {}
        self.state = ""

    @property
    def seconds(self) -> float | None:
        """Duration of the run so far; None while it is queued."""
        return seconds_between(self._began, self._ended)

    def due(self, now_s: float) -> bool:
        """Return whether to poll again: rarely while a step measures. `now_s` is of the monotonic clock."""
        measuring = any(t.state == "running" and t.step in STEPS and STEPS[t.step].measures for t in self.tasks)
        interval_s = MEASURING_POLL_S if measuring else POLL_S
        if self._looked is not None and now_s - self._looked < interval_s:
            return False
        self._looked = now_s
        return True

    def look(self) -> bool:
        """Query Airflow, then MLflow; return whether the run is over. The last query of the tasks follows the run's
        end."""
        try:
            dag_run = self._airflow.run(self._run.dag_id, self._run.run_id)
            if dag_run is None:
                raise InputError(f"{self._run.dag_id} has no run {self._run.run_id}")
            self.state = str(dag_run["state"])
            self._began, self._ended = dag_run["start_date"], dag_run["end_date"]
            self.tasks = self._airflow.tasks(self._run.dag_id, self._run.run_id)
            self._ask_for_reasons()
            self._heard, self._silent = time.monotonic(), ""
        except Unavailable:
            if time.monotonic() - self._heard > PATIENCE_S:
                raise
            self._silent = "Airflow does not answer, waiting"
            return False
        try:
            self.notes = self._source.read()
        except MlflowException:
            self._silent = "MLflow does not answer; the run goes on"
        return self.state in FINAL

    def new_lines(self) -> list[Line]:
        return self._journal.lines(self.tasks, self.notes, self.reasons)

    def _ask_for_reasons(self) -> None:
        """Read a failed task's log once: if a step never reached MLflow, only the log says why it failed."""
        for task in self.tasks:
            key = (task.id, task.tries)
            if task.state in ("failed", "up_for_retry") and task.step != "outcome" and key not in self.reasons:
                self.reasons[key] = self._airflow.error(self._run.dag_id, self._run.run_id, task)

    def footer(self) -> str:
        """Return one quiet line: progress, duration, and silent services."""
        over = sum(t.state in OVER for t in self.tasks)
        facts = [self._run.run_id, f"{over} of {len(self.tasks)} tasks", duration(self.seconds), self._silent]
        return "  ".join(part for part in (self.state if self.state == "queued" else "", *facts) if part)
