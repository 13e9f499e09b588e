"""Follows a run until it ends."""

import time
from collections.abc import Mapping

from mlflow.exceptions import MlflowException
from rich.console import Console

from slipstream.airflow_api import FINAL, AirflowApi, TaskInstance
from slipstream.errors import InputError, Unavailable
from slipstream.home import Home
from slipstream.report.find import connect
from slipstream.watch.journal import OVER, Journal, Line, duration, exit_code, under_way
from slipstream.watch.notes import Key, Note, Notes, be_patient_elsewhere
from slipstream.watch.start import Started
from slipstream.watch.view import view

POLL_S = 1.0
PATIENCE_S = 300
"""How long a silent Airflow is waited for; a restart takes about a minute."""


def follow(home: Home, run: Started, console: Console) -> int:
    """Show the run until it ends; returns the exit code. Ctrl-C leaves the run going and says so.

    Raises Unavailable when Airflow is silent for PATIENCE_S, InputError when there is no such run.
    """
    be_patient_elsewhere()
    watch = _Watch(AirflowApi.of(home), Notes(connect(home), run.spec.model.name, run.spec.name, run.run_id), run)
    try:
        with view(console) as shown:
            while not watch.look():
                shown.show(watch.new_lines(), under_way(watch.tasks, watch.notes), watch.footer())
                time.sleep(POLL_S)
            shown.show(watch.new_lines(), (), "")
    except KeyboardInterrupt:
        console.print(f"\nThe run goes on; follow it again with: slipstream watch {run.spec.name} {run.run_id}")
        return 0
    code = exit_code(watch.state, watch.notes)
    mark = "[green]✓ Finished[/]" if code == 0 else "[bold red]✗ Failed[/]"
    console.print(f"\n{mark} [dim]{run.spec.name} {run.run_id} after {duration(watch.seconds)}[/]", highlight=False)
    return code


class _Watch:
    """The newest look at a run."""

    def __init__(self, airflow: AirflowApi, source: Notes, run: Started) -> None:
        self._airflow, self._source, self._run = airflow, source, run
        self._journal = Journal()
        self._began = self._heard = time.monotonic()
        self._silent = ""
        self.tasks: list[TaskInstance] = []
        self.notes: Mapping[Key, Note] = {}
        self.state = ""

    @property
    def seconds(self) -> float:
        """How long this run has been watched."""
        return time.monotonic() - self._began

    def look(self) -> bool:
        """Ask Airflow, then MLflow; whether the run is over. The last look at the tasks comes after the run's end."""
        try:
            found = self._airflow.run(self._run.dag_id, self._run.run_id)
            if found is None:
                raise InputError(f"{self._run.dag_id} has no run {self._run.run_id}")
            self.state = str(found["state"])
            self.tasks = self._airflow.tasks(self._run.dag_id, self._run.run_id)
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
        return self._journal.lines(self.tasks, self.notes)

    def footer(self) -> str:
        """One quiet line: how far, how long, and what is silent."""
        over = sum(t.state in OVER for t in self.tasks)
        known = [self._run.run_id, f"{over} of {len(self.tasks)} tasks", duration(self.seconds), self._silent]
        return "  ".join(part for part in (self.state if self.state == "queued" else "", *known) if part)
