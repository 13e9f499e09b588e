"""The content of a report, as data. `report.json` is this document; the page and the terminal table only draw it."""

import io
from typing import Any, Literal

from slipstream.contract import Document, Verdict
from slipstream.contract.evidence import Row
from slipstream.errors import InputError
from slipstream.spec import Objective

Outcome = Literal["released", "unchanged", "held", "rejected", "stopped", "rolled_back", "failed"]
"""Outcome of the run:

- `released`: an engine took all traffic and the alias `champion`
- `unchanged`: the best engine is the one that already serves
- `held`: an engine passed stage 1, but stage 2 or 3 did not run
- `rejected`: no engine passed its gates
- `stopped`: the small-scale test did not pass
- `rolled_back`: the rollout was aborted and the traffic restored
- `failed`: a step failed before the gates could judge
"""

REPORT = "report/report.json"
PAGE = "report/index.html"
REQUEST = "report/request.json"
"""Artifact paths in the pipeline's MLflow run."""


class Figure(Document):
    """A name with its number, such as a tile at the top of the page."""

    name: str
    value: str
    note: str = ""


class Failure(Document):
    """A step that ended without a result."""

    step: str
    cell: str | None
    reason: str
    run_id: str

    @property
    def where(self) -> str:
        return f"{self.step} {self.cell}" if self.cell else self.step


class GateLine(Document):
    """A verdict and the step that gave it."""

    step: str
    cell: str | None
    verdict: Verdict


class Made(Document):
    """One step's result and where it is recorded."""

    step: str
    cell: str | None
    run_id: str
    reused: bool
    model_id: str | None = None
    sha256: str | None = None
    size_bytes: int | None = None


class TimelinePoint(Document):
    """One window of the small-scale test or the rollout."""

    at_s: float
    """Seconds since the first window."""
    phase: str
    champion_weight: float
    challenger_weight: float
    """Share of the traffic, in percent."""
    requests: int
    errors: int
    p50_ms: float | None = None
    p99_ms: float | None = None


class LayerTable(Document):
    """An engine's layers."""

    cell: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    total: int
    """Rows of the whole table."""


class Sample(Document):
    """The held-out sample in `report/request.json`, ready to be sent to the release."""

    label: str
    """Its label in the data set; empty if labels are not classes of whole samples."""
    classes: tuple[str, ...]


class Report(Document):
    """Everything that the page shows."""

    spec: str
    model: str
    framework: str
    run_key: str
    pipeline_run_id: str
    experiment_id: str
    created: str
    """UTC, ISO 8601."""
    outcome: Outcome
    headline: str
    explanation: str = ""
    ok: bool
    """Whether the pipeline run counts as finished; otherwise it is marked as failed."""
    winner: str | None = None
    version: str | None = None
    best_per_target: dict[str, str]
    objective: Objective
    rows: tuple[Row, ...] = ()
    missing: tuple[str, ...] = ()
    gates: tuple[GateLine, ...] = ()
    failures: tuple[Failure, ...] = ()
    made: tuple[Made, ...] = ()
    timeline: tuple[TimelinePoint, ...] = ()
    layers: tuple[LayerTable, ...] = ()
    """Of the engines that report their layers."""
    data: dict[str, str]
    """sha256 of each split."""
    hardware: dict[str, str]
    sample: Sample | None = None
    facts: dict[str, object]
    """Other results of select and rollout, such as the champion that was compared with."""

    def table(self) -> Any:
        """Return the engines as a pandas DataFrame: a row for each cell, with its figures and its verdicts.

        Raise InputError where pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise InputError(f"a report's table needs pandas, which this environment lacks ({error})") from error

        rows = [
            {"cell": row.cell, "status": row.status, "release": row.release}
            | (row.evidence.model_dump(mode="json") if row.evidence is not None else {})
            | {f"gate_{verdict.gate}": verdict.answer for verdict in row.verdicts}
            for row in self.rows
        ]
        return pandas.DataFrame(rows).set_index("cell") if rows else pandas.DataFrame()

    def __rich__(self) -> Any:
        from slipstream.reports import tables

        return tables.summary(self)

    def _repr_html_(self) -> str:
        from rich.console import Console

        console = Console(record=True, file=io.StringIO(), width=110)
        console.print(self)
        return console.export_html(inline_styles=True, code_format='<pre style="line-height:1.2">{code}</pre>')

    @property
    def winning_row(self) -> Row | None:
        """The row of the picked engine."""
        return next((r for r in self.rows if r.cell == self.winner), None)

    @property
    def sample_label(self) -> str:
        """Label of the sample; empty without one."""
        return self.sample.label if self.sample else ""
