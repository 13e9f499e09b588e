"""Gathers a report from the steps' results. A missing part is omitted or named as missing, never an error."""

import datetime
import logging
from collections.abc import Iterable, Sequence

from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from slipstream.contract import StepInput, StepOutput
from slipstream.contract.evidence import Row, row_of
from slipstream.contract.handover import Checked, Observed, Rollout, Selection
from slipstream.errors import DataError
from slipstream.hardware import describe
from slipstream.plan import flow
from slipstream.plugins import CHECK, REPORT, ROLLOUT, SELECT, STEPS, TRIAL, VALIDATE
from slipstream.reports import layers
from slipstream.reports import outcome as outcomes
from slipstream.reports.document import Failure, GateLine, Made, Report, Sample, TimelinePoint
from slipstream.spec import Spec
from slipstream.store import tracking
from slipstream.store.tracking import Tracking

log = logging.getLogger(__name__)


def collect(spec: Spec, inputs: StepInput, track: Tracking, pipeline_run_id: str, sample: Sample | None) -> Report:
    """Return the report of the pipeline run that `inputs` belongs to."""
    latest = _latest_runs(track, inputs.run_key)
    upstream = list(inputs.upstream) + _recorded_by_failed(track, latest, inputs.upstream)
    single = {o.step: o for o in upstream if o.cell is None and not Observed.of(o).skipped}
    select = single.get(SELECT)
    chosen = Selection.of(select) if select else Selection(winner=None, champion=None)
    rows = _rows(spec, upstream, chosen)
    failures = tuple(_failures(latest, {(o.step, _key(o)) for o in inputs.upstream}))
    missing = tuple(r.cell for r in rows if r.status == "missing")
    result = outcomes.decide(single, failures, rows)
    winner, version = chosen.winner, chosen.version
    winning = next((r for r in rows if r.cell == winner), None)
    rollout = single.get(ROLLOUT)
    skipped = inputs.params.get("skip_stages") or ()
    return Report(
        spec=spec.name,
        model=spec.model.name,
        framework=spec.model.framework,
        run_key=inputs.run_key,
        pipeline_run_id=pipeline_run_id,
        experiment_id=str(track.experiment_id),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        outcome=result,
        headline=outcomes.headline(
            spec, result, winning, version, rows, undecided=outcomes.without_answer(single.get(TRIAL), rollout)
        ),
        explanation=outcomes.explanation(result, single, failures, rows),
        ok=outcomes.is_ok(result, skipped, missing),
        winner=winner,
        version=version,
        best_per_target={t: c for t, c in chosen.best_per_target.items() if c},
        objective=spec.objective,
        rows=rows,
        missing=missing,
        gates=tuple(GateLine(step=o.step, cell=_key(o), verdict=v) for o in upstream for v in o.verdicts),
        failures=failures,
        made=tuple(_made(o) for o in upstream),
        timeline=timeline(o for o in (single.get(TRIAL), rollout) if o),
        layers=layers.collect(upstream),
        data=Checked.of(single[CHECK]).data if CHECK in single else {},
        hardware=describe(),
        sample=sample,
        facts={
            "champion": chosen.champion,
            "previous": Rollout.of(rollout).previous if rollout else None,
        },
    )


def timeline(outputs: Iterable[StepOutput]) -> tuple[TimelinePoint, ...]:
    """Return the windows of trial and rollout, in seconds since the first. An unreadable window is omitted."""
    points = []
    for output in outputs:
        for entry in Observed.of(output).timeline:
            try:
                fields = {k: v for k, v in entry.items() if k in TimelinePoint.model_fields}
                points.append(TimelinePoint.model_validate(fields | {"at_s": _seconds(entry["at"])}))
            except (KeyError, ValueError, TypeError) as error:
                log.warning("%s: a timeline entry is left out of the report: %s", output.step, error)
    if not points:
        return ()
    start = min(p.at_s for p in points)
    ordered = sorted(points, key=lambda p: p.at_s)
    return tuple(p.model_copy(update={"at_s": round(p.at_s - start, 3)}) for p in ordered)


def _seconds(at: object) -> float:
    """Return `at` as steps write it: seconds since the epoch, or ISO 8601."""
    if isinstance(at, str):
        return datetime.datetime.fromisoformat(at).timestamp()
    return float(at)  # type: ignore[arg-type]  # anything else raises TypeError, which the caller expects


def _rows(spec: Spec, upstream: Sequence[StepOutput], chosen: Selection) -> tuple[Row, ...]:
    """Return select's rows; if select failed, the same rows built from the evidence that it saw."""
    rows = list(chosen.rows)
    if not rows:
        by_cell = {_key(o): o for o in upstream if o.step == VALIDATE}
        rows = [row_of(cell, by_cell.get(cell)) for cell in flow.cells(spec)]
    return tuple(
        r.model_copy(update={"release": r.cell == chosen.winner, "comparison": _never_released(spec, r.cell)})
        for r in rows
    )


def _never_released(spec: Spec, cell: str) -> bool:
    target = flow.cell_of(cell).target
    return target is not None and not spec.releasable(target)


def _latest_runs(track: Tracking, run_key: str) -> dict[tuple[str, str | None], Run]:
    """Return the newest MLflow run of each step and cell of this pipeline run."""
    latest: dict[tuple[str, str | None], Run] = {}
    for run in track.search({tracking.RUN_KEY: run_key}):
        step, cell = run.data.tags.get(tracking.STEP), run.data.tags.get(tracking.CELL)
        if step and step not in ("pipeline", REPORT):
            latest.setdefault((step, cell), run)
    return latest


def _failures(latest: dict[tuple[str, str | None], Run], finished: set[tuple[str, str | None]]) -> Iterable[Failure]:
    for (step, cell), run in sorted(latest.items(), key=lambda item: int(item[1].info.start_time or 0)):
        if run.info.status in ("FAILED", "KILLED", "RUNNING") and (step, cell) not in finished:
            lost = "the step ended without saying why; its log in Airflow may tell"
            reason = run.data.tags.get("slipstream.error", lost)
            yield Failure(step=step, cell=cell, reason=reason, run_id=run.info.run_id)


def _recorded_by_failed(
    track: Tracking, latest: dict[tuple[str, str | None], Run], upstream: Sequence[StepOutput]
) -> list[StepOutput]:
    """Return outputs that a gating step recorded before it failed: a rejection needs its evidence."""
    finished = {(o.step, _key(o)) for o in upstream}
    outputs = []
    for (step, cell), run in latest.items():
        if step in STEPS and STEPS[step].gates and run.info.status == "FAILED" and (step, cell) not in finished:
            try:
                if any(f.path == tracking.OUTPUT for f in track.client.list_artifacts(run.info.run_id)):
                    outputs.append(track.output(run.info.run_id))
            except (MlflowException, ValueError, DataError) as error:
                log.warning("%s: its recorded output cannot be read: %s", step, error)
    return outputs


def _made(output: StepOutput) -> Made:
    artifact = output.artifact
    return Made(
        step=output.step,
        cell=_key(output),
        run_id=output.run_id,
        reused=output.reused,
        model_id=artifact.model_id if artifact else None,
        sha256=artifact.sha256 if artifact else None,
        size_bytes=artifact.size_bytes if artifact else None,
    )


def _key(output: StepOutput) -> str | None:
    return output.cell.key if output.cell else None
