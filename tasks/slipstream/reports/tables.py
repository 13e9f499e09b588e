"""The report in a terminal: the engine table in 80 columns, the reasons, and where to look next."""

import json
import shlex
from pathlib import Path

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from slipstream.contract.evidence import EngineEvidence, Interval, Row
from slipstream.plugins import SELECT
from slipstream.reports import wording
from slipstream.reports.document import Report

WIDTH = 80
STYLES = {"passed": "green", "rejected": "red", "inconclusive": "yellow", "missing": "bold red", "reference": "dim"}


def engines(report: Report) -> Table:
    """Return one entry of two lines for each engine: the figures, and below them their confidence bounds."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False, header_style="dim")
    table.add_column("engine\ntarget")
    bounds = f"{report.objective.confidence * 100:g} % bounds"
    for name, below in (
        (f"{wording.metric(report.objective.metric)} (drop)", bounds),
        ("p50 ms", "p99 ms"),
        ("vs eager", bounds),
        ("vs FP32", bounds),
        ("size", "per s"),
    ):
        table.add_column(f"{name}\n{below}", justify="right", no_wrap=True)
    for row in report.rows:
        figures = _figures(row.evidence) if row.evidence else [Text(wording.DASH, "dim")] * 5
        table.add_row(_engine(row), *figures)
    return table


def _engine(row: Row) -> Text:
    """Return glyph of the verdict and recipe, and below them target, verdict and pick."""
    recipe, _, target = row.cell.partition("@")
    style = STYLES[row.status]
    name = Text.assemble(
        (f"{wording.STATUS_GLYPH[row.status]} ", style), (recipe, "bold"), "\n  ", (f"{target} ", "dim")
    )
    status = "open" if row.status == "inconclusive" else row.status  # what fits; the reason below has the rest
    return name.append("← picked", "bold green") if row.release else name.append(status, style)


def _figures(e: EngineEvidence) -> list[Text]:
    drop = f"{wording.points(e.drop_pp.low)} to {wording.points(e.drop_pp.high)}"
    return [
        _two_lines(f"{wording.percent(e.engine_quality)} ({wording.points(e.drop_pp.estimate)})", drop),
        _two_lines(wording.milliseconds(e.latency.p50_ms), wording.milliseconds(e.latency.p99_ms)),
        _gain(e.speedup_eager),
        _gain(e.speedup_reference),
        _two_lines(wording.size(e.size_bytes), wording.rate(e.latency.rate_per_s)),
    ]


def _gain(interval: Interval | None) -> Text:
    if interval is None:
        return Text(wording.DASH, "dim")
    return _two_lines(wording.ratio(interval.estimate), wording.bounds(interval))


def _two_lines(figure: str, below: str) -> Text:
    return Text.assemble(figure, "\n", (below, "dim"))


def reasons(report: Report) -> list[Text]:
    """Return one line for each engine that did not pass, then one for each step that failed."""
    lines = [_reason(row) for row in report.rows if row.status not in ("passed", "reference")]
    return lines + [
        Text.assemble(("! ", "bold red"), (f.where, "bold"), f"  failed: {f.reason}")
        for f in report.failures
        if f.step != SELECT
    ]


def _reason(row: Row) -> Text:
    text = "; ".join(f"{v.gate}: {v.reason}" for v in row.verdicts if not v.passed)
    return Text.assemble((f"{wording.STATUS_GLYPH[row.status]} ", STYLES[row.status]), (row.cell, "bold"), f"  {text}")


def summary(report: Report) -> RenderableType:
    """Return headline, table, reasons, noise."""
    headline = Text(f"{report.headline}.", "bold green" if report.ok else "bold red")
    parts: list[RenderableType] = [headline]
    parts += [Text(report.explanation)] if report.explanation else []
    parts += [Text(), engines(report)] if report.rows else []
    reason_lines = reasons(report)
    parts += [Text(), *reason_lines] if reason_lines else []
    if best_of := wording.best_of(report.rows, report.objective.confidence):
        parts += [Text(), Text(best_of, "dim")]
    if any(r.evidence and r.evidence.noise.noisy for r in report.rows):
        noise = "Other processes were busy in some rounds; the ratios are from interleaved rounds, with wider bounds."
        parts += [Text(), Text(noise, "dim")]
    return Group(*parts)


def curl(url: str, request: Path, classes: Path | None, *, labelled: bool = True) -> str:
    """Return a shell line that sends the sample to the release and prints its label, or else the shape of the answer.

    For a sample labeled with a class, the answer contains a score for each class; the label is the class with the
    highest score.
    """
    label = f"json.load(open({json.dumps(str(classes))}))[y.index(max(y))]" if classes else "y.index(max(y))"
    part, expression = ("data", label) if labelled else ("shape", "y")
    code = f'import json,sys; y=json.load(sys.stdin)["outputs"][0]["{part}"]; print({expression})'
    post = f"curl -s {url} -H content-type:application/json -d @{shlex.quote(str(request))}"
    return f"{post} | python3 -c {shlex.quote(code)}"
