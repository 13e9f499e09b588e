"""select: the verdict of stage 1. Every expected cell is a row; the best passing engine becomes the challenger.

Engines that passed against the baseline are compared with the champion (champion.py); then all engines are timed in one
run in which they take turns (measure/race.py), and the objective's `prefer` picks among those that passed. Details:
`handover.Selection`.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from slipstream import traffic
from slipstream.contract import Artifact, Json, StepInput, StepOutput, Verdict
from slipstream.contract.evidence import Row, judged, row_of, settled
from slipstream.contract.handover import Selection
from slipstream.errors import DataError, GateFailed
from slipstream.measure.waivers import waive
from slipstream.plan import flow
from slipstream.plugins import BUILD, VALIDATE
from slipstream.release import rejections, settle
from slipstream.reports import wording
from slipstream.runner.context import Context
from slipstream.spec import Spec
from slipstream.steps import champion as champions
from slipstream.steps import racing
from slipstream.steps.choice import Choice
from slipstream.store.registry import CHALLENGER, SHA256, Registry


def settings(spec: Spec, inputs: StepInput) -> Json:
    """Return what determines the result."""
    return {"prefer": spec.objective.prefer, "cells": expected_cells(spec, inputs), "run": inputs.run_key}


def run(context: Context) -> StepOutput:
    """Judge the table, register the winner. Raise GateFailed if no engine passed."""
    spec, inputs = context.spec, context.inputs
    registry = Registry(spec.model.name, context.tracking.client)
    settle.settle(registry, lambda: traffic.controller(context.home), wait_for=("rollback",))
    champion = registry.champion()
    rows = _waived(spec, rejected_before(registry, inputs, table(spec, inputs)))
    if champion is not None:
        rows = _waived(spec, champions.compare(context, registry, champion, rows))
    choice = _choice(context, rows)
    winner = choice.best(choice.entrants)
    rows = [choice.placed(r) for r in rows]
    selection = Selection(
        rows=tuple(r.model_copy(update={"release": r.cell == winner}) for r in rows),
        winner=winner,
        champion=champion,
        missing=tuple(r.cell for r in rows if r.status == "missing"),
        comparison_only=comparison_only(spec, rows),
        competing=spec.competing,
        race=choice.race,
        not_raced=dict(choice.absent),
    )
    _write_rows(context, rows)
    if winner is None:
        verdict = Verdict(gate="select", answer="fail", reason="no engine passed", n=len(rows))
        context.tracking.record(context.run, context.output(verdicts=(verdict,), details=selection))
        raise GateFailed(_refusal(rows, comparison_only(spec, rows)))
    picked = next(r for r in rows if r.cell == winner)
    version, already = _register(registry, inputs, picked, champion)
    verdict = Verdict(gate="select", answer="pass", reason=choice.reason(winner), n=len(rows))
    best = {target: choice.best(choice.entrants_of(target)) for target in spec.targets}
    registration = {"version": version, "already_champion": already, "best_per_target": best}
    return context.output(verdicts=(verdict,), details=selection.model_copy(update=registration))


def _waived(spec: Spec, rows: Sequence[Row]) -> list[Row]:
    """Return the rows with waived undecided verdicts as passes. Not in `validate`, which is reused: a waiver
    expires."""
    today = datetime.datetime.now(datetime.UTC).date()
    return [settled(r, waive(r.verdicts, spec.guardrails.waivers, today)) for r in rows]


def expected_cells(spec: Spec, inputs: StepInput) -> list[str]:
    """Return keys of the expected cells, whether or not their steps left a result."""
    chosen = inputs.params.get("recipes") or None
    return flow.cells(flow.with_choices(spec, recipes=chosen) if chosen else spec)


def table(spec: Spec, inputs: StepInput) -> list[Row]:
    """Return a row for each expected cell, in the spec's order."""
    by_cell = {o.cell.key: o for o in inputs.upstream if o.step == VALIDATE and o.cell is not None}
    rows = [row_of(cell, by_cell.get(cell)) for cell in expected_cells(spec, inputs)]
    unreleased = comparison_only(spec, rows)
    return [r.model_copy(update={"comparison": r.cell in unreleased}) for r in rows]


def comparison_only(spec: Spec, rows: Sequence[Row]) -> dict[str, str]:
    """Return cells whose engine is measured and never released, with the reason."""
    targets = {r.cell: str(flow.cell_of(r.cell).target) for r in rows}
    return {
        cell: f"engine {spec.targets[target].engine} is measured for comparison; no model server runs it"
        for cell, target in targets.items()
        if not spec.releasable(target)
    }


def rejected_before(registry: Registry, inputs: StepInput, rows: Sequence[Row]) -> list[Row]:
    """Return the rows; an engine rejected by its digest in an earlier test, rollout or rollback also fails here."""
    active = rejections.active(registry)

    def judge(row: Row) -> Row:
        built = inputs.output_of(BUILD, flow.cell_of(row.cell))
        if built is None or built.artifact is None or (rejection := active.get(built.artifact.sha256)) is None:
            return row
        return judged(row, Verdict(gate="rejection", answer="fail", reason=rejections.explain(registry, rejection)))

    return [judge(row) for row in rows]


def _choice(context: Context, rows: Sequence[Row]) -> Choice:
    """Return everything needed to pick; race the engines if any passed."""
    objective = context.spec.objective
    choice = Choice(objective.prefer, objective.confidence, {r.cell: r for r in rows}, None)
    if not choice.entrants:
        return choice
    measured = [flow.cell_of(r.cell) for r in rows if r.evidence is not None]
    outputs = [context.inputs.output_of(BUILD, cell) for cell in measured]
    built = {o.cell.key: o.artifact for o in outputs if o is not None and o.cell is not None and o.artifact is not None}
    race, absent = racing.race(context, built)
    return Choice(choice.prefer, choice.confidence, choice.rows, race, absent)


def _built(inputs: StepInput, cell: str) -> Artifact:
    output = inputs.output_of(BUILD, flow.cell_of(cell))
    if output is None or output.artifact is None:
        raise DataError(f"step select: IN.json has evidence for {cell}, but not its build output")
    return output.artifact


def _register(registry: Registry, inputs: StepInput, winner: Row, champion: str | None) -> tuple[str, bool]:
    """Return the winner's version, and whether that engine already serves; then nothing is written."""
    built = _built(inputs, winner.cell)
    if champion is not None and registry.tags(champion).get(SHA256) == built.sha256:
        return champion, True
    version = registry.register(built, winner.cell, inputs.pipeline_run_id, winner.verdicts)
    if not registry.description(version):  # a retried step may have more to say by now
        registry.describe(version, description(winner, inputs.run_key))
    registry.set_alias(CHALLENGER, version)
    return version, False


def description(row: Row, run_key: str) -> str:
    """Return a registered version's description on MLflow's page of the model: one sentence and its origin."""
    e = row.evidence
    if e is None:
        return f"**{row.cell}**, from pipeline run `{run_key}`."
    gains = {"the eager baseline": e.speedup_eager, "its FP32 engine": e.speedup_reference}
    facts = [
        f"{wording.metric(e.metric)} {wording.percent(e.engine_quality)} %",
        f"drop {wording.points(e.drop_pp.estimate)} points (at most {wording.points(e.drop_pp.high)})",
        *(f"{wording.ratio(gain.estimate)} {reference}" for reference, gain in gains.items() if gain),
        f"p50 {wording.milliseconds(e.latency.p50_ms)} ms",
        wording.size(e.size_bytes),
    ]
    return f"**{row.cell}**: {', '.join(facts)}. Measured on {e.hardware}, by pipeline run `{run_key}`."


def _write_rows(context: Context, rows: Sequence[Row]) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        path.write_text(json.dumps([r.model_dump(mode="json") for r in rows], indent=1))
        context.run.artifact(path)


def _refusal(rows: Sequence[Row], unreleased: Mapping[str, str]) -> str:
    lines = [f"{r.cell}: {r.status}: {_why(r, unreleased)}" for r in rows if r.status != "reference"]
    return "accuracy validation: no engine passed, nothing is promoted:\n  " + "\n  ".join(lines)


def _why(row: Row, unreleased: Mapping[str, str]) -> str:
    """Return why an engine is not released."""
    failed = [f"{v.gate}: {v.reason}" for v in row.verdicts if not v.passed]
    return "; ".join([*failed, *([unreleased[row.cell]] if row.cell in unreleased else [])])
