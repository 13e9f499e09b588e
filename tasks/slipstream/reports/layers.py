"""Layers of the engines, from the tables recorded at the build: reading and drawing."""

import logging
from collections.abc import Iterable
from html import escape

import mlflow
from mlflow.exceptions import MlflowException

from slipstream.contract import StepOutput
from slipstream.contract.handover import Built
from slipstream.engines.base import LAYERS
from slipstream.plugins import BUILD
from slipstream.reports.document import LayerTable

log = logging.getLogger(__name__)

ROWS = 200
"""Rows of an engine's table in the report; all of them are in the artifact of its build."""


def collect(outputs: Iterable[StepOutput]) -> tuple[LayerTable, ...]:
    """Return the tables of the built engines that have one. An unreadable table is omitted."""
    tables = []
    for output in outputs:
        if output.step == BUILD and output.cell is not None and Built.of(output).layers:
            try:
                document = mlflow.artifacts.load_dict(f"runs:/{output.run_id}/{LAYERS}")
                rows = tuple(tuple(map(str, row)) for row in document["data"][:ROWS])
                columns, total = tuple(document["columns"]), len(document["data"])
                tables.append(LayerTable(cell=output.cell.key, columns=columns, rows=rows, total=total))
            except (MlflowException, OSError, ValueError, KeyError, TypeError) as error:
                log.warning("build %s: its layers are left out of the report: %s", output.cell.key, error)
    return tuple(tables)


def section(tables: Iterable[LayerTable]) -> str:
    """Return a collapsed table for each engine; empty without any."""
    drawn = "".join(_table(table) for table in tables)
    caption = "Which parts of the model each engine fused into one kernel, and the precision that it computes in."
    return f"<h2>Layers</h2><p>{caption}</p>{drawn}" if drawn else ""


def _table(table: LayerTable) -> str:
    count = len(table.rows)
    note = f"{count} layers" if count == table.total else f"{count} of {table.total} layers; all are in the artifact"
    head = "".join(f'<th class="text">{escape(column)}</th>' for column in table.columns)
    body = "".join(
        '<tr class="lead">' + "".join(f'<td class="text wrap">{escape(cell)}</td>' for cell in row) + "</tr>"
        for row in table.rows
    )
    return (
        f"<details><summary>{escape(table.cell)} <span>{note}</span></summary>"
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></details>'
    )
