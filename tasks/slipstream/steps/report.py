"""The last step: the outcome of the run, as a page, plots, JSON, metrics and a status of the pipeline's MLflow run.

It runs whatever happened before and works with what exists: a missing part is named in the report. It fails, and is
retried, only if MLflow itself does not answer.

Output: `metrics` as logged on the pipeline's run; `details`: {"outcome", "headline", "ok"}.
"""

import logging
import tempfile
import time
from pathlib import Path

import numpy as np
from mlflow.entities import Metric, Param, RunTag

from slipstream.contract import Json, StepInput, StepOutput
from slipstream.contract.handover import Reported
from slipstream.data.splits import Data
from slipstream.data.tokens import Tokenizer
from slipstream.errors import SlipstreamError
from slipstream.plugins import BUILD
from slipstream.reports import page, plots, wording
from slipstream.reports.collect import collect
from slipstream.reports.document import PAGE, REPORT, REQUEST, Report, Sample
from slipstream.runner.context import Context
from slipstream.serving import client
from slipstream.spec import Spec
from slipstream.store import tracking

log = logging.getLogger(__name__)


def settings(spec: Spec, inputs: StepInput) -> Json:
    """Return no settings: a report depends only on the run itself."""
    return {"run_key": inputs.run_key}


def run(context: Context) -> StepOutput:
    """Write the report into the pipeline's run and close that run."""
    parent = context.tracking.pipeline_run(context.inputs.run_key)
    sample, body = held_out_sample(context)
    report = collect(context.spec, context.inputs, context.tracking, parent, sample)
    with tempfile.TemporaryDirectory() as folder:
        write(report, Path(folder), body)
        context.tracking.client.log_artifacts(parent, str(Path(folder) / "report"), "report")
    metrics = figures(report)
    _summarize(context, parent, report, metrics)
    log.info("%s", report.headline)
    details = Reported(outcome=report.outcome, headline=report.headline, ok=report.ok)
    return context.output(metrics=metrics, details=details)


def request_body(data: Data) -> bytes:
    """Return the request body for the first held-out sample: as text if the release takes texts."""
    if data.tokenizer is None:
        return client.body(data.test.inputs[:1])
    return client.text_body([Tokenizer(data.tokenizer).decode(data.test.inputs[0])])


def held_out_sample(context: Context) -> tuple[Sample | None, bytes | None]:
    """Return the first held-out sample and its request body; nothing if the data cannot be loaded here."""
    try:
        data = context.data
        label = data.test.labels[0]
        body = request_body(data)
    except (SlipstreamError, OSError, ImportError) as error:
        log.warning("the report gives no example request: %s", error)
        return None, None
    if label.ndim or not np.issubdtype(label.dtype, np.integer):
        return Sample(label="", classes=()), body
    class_name = data.classes[label] if label < len(data.classes) else str(label)
    return Sample(label=class_name, classes=data.classes), body


def write(report: Report, folder: Path, body: bytes | None) -> None:
    """Write page, plots, JSON and the example request below `folder`, under their artifact paths."""
    (folder / PAGE).parent.mkdir(parents=True, exist_ok=True)
    drawn = plots.draw(report)
    for name, figure in drawn.items():
        (folder / "report" / f"{name}.svg").write_text(plots.svg(figure), encoding="utf-8")
    if "pareto" in drawn:
        (folder / "report" / "pareto.png").write_bytes(plots.png(drawn["pareto"]))
    html = page.render(report, {name: (folder / "report" / f"{name}.svg").read_text("utf-8") for name in drawn})
    (folder / PAGE).write_text(html, encoding="utf-8")
    (folder / REPORT).write_text(report.model_dump_json(indent=2), encoding="utf-8")
    if body is not None:
        (folder / REQUEST).write_bytes(body)


def figures(report: Report) -> dict[str, float]:
    """Return metrics of the pipeline's run: how many engines passed, and what the picked one achieved."""
    judged = [r for r in report.rows if r.status != "reference"]
    metrics: dict[str, float] = {"engines.judged": len(judged)}
    metrics |= {f"engines.{s}": sum(r.status == s for r in judged) for s in ("passed", "rejected", "missing")}
    row = report.winning_row
    if row is None or row.evidence is None:
        return metrics
    e = row.evidence
    winner = {
        "quality": e.engine_quality,
        "drop_pp": e.drop_pp.estimate,
        "drop_pp_bound": e.drop_pp.high,
        "p50_ms": e.latency.p50_ms,
        "p99_ms": e.latency.p99_ms,
        "speedup_eager": e.speedup_eager.estimate if e.speedup_eager else None,
        "speedup_fp32": e.speedup_reference.estimate if e.speedup_reference else None,
        "size_bytes": e.size_bytes,
    }
    return metrics | {f"winner.{name}": float(value) for name, value in winner.items() if value is not None}


def _summarize(context: Context, parent: str, report: Report, metrics: dict[str, float]) -> None:
    """Show the result in MLflow's list of runs. The status is written last, when the report is complete."""
    mlflow = context.tracking.client
    tags = {
        "slipstream.outcome": report.outcome,
        tracking.HEADLINE: report.headline,
        "slipstream.winner": report.winner or "",
        "slipstream.version": report.version or "",
        "mlflow.runName": run_name(report),
        "mlflow.source.name": f"spec {report.spec}",
        "mlflow.source.type": "JOB",
        "mlflow.note.content": f"**{report.headline}.** {report.explanation}\n\nThe report: artifact `{PAGE}`.",
    }
    mlflow.log_batch(
        parent,
        metrics=[Metric(k, float(v), int(time.time() * 1000), 0) for k, v in metrics.items()],
        params=[Param(k, str(v)) for k, v in context.spec.objective.model_dump().items()],
        tags=[RunTag(k, v[:4900]) for k, v in tags.items()],
    )
    built = next((m for m in report.made if m.step == BUILD and m.cell == report.winner), None)
    if built is not None and built.model_id is not None:
        context.tracking.run(parent).produces(built.model_id)
    mlflow.set_terminated(parent, "FINISHED" if report.ok else "FAILED")


def run_name(report: Report) -> str:
    """Return the pipeline run's name in MLflow's list: outcome, pick and gain, which no other column shows by
    default."""
    outcome = report.outcome.replace("_", " ")
    row = report.winning_row
    if row is None or row.evidence is None:
        return outcome
    gain = row.evidence.speedup_eager or row.evidence.speedup_reference
    return f"{outcome}: {row.cell}" + (f" {wording.ratio(gain.estimate)}" if gain else "")
