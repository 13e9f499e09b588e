"""select: the verdict of stage 1. Every expected cell is a row; the best passing engine becomes the challenger.

Details: `rows` (evidence.Row), `winner` (cell key), `version` (registry), `best_per_target`, `champion` (version that
the challenger will be compared with, or None), `already_champion`, `missing` (cells that left no evidence),
`comparison_only` (cells of engines that are never released → why).
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from slipstream import flow
from slipstream.contract import StepInput, StepOutput, Verdict
from slipstream.errors import DataError, GateFailed
from slipstream.evidence import EngineEvidence, Row, row_of
from slipstream.registry import CHALLENGER, SHA256, Registry
from slipstream.spec import Spec
from slipstream.steps.base import Context


def _latency(evidence: EngineEvidence) -> float:
    """Of a request, in parts of what the eager baseline took in the same rounds.

    Each cell is measured in a run of its own, perhaps on another day, so that milliseconds of two cells tell as much
    of the machine's state as of the engines. Infinite where others took the cores, since there is no such ratio then:
    engines that have one go first.
    """
    return 1 / evidence.speedup_eager.estimate if evidence.speedup_eager else math.inf


def _rate(evidence: EngineEvidence) -> float:
    """Requests per second, in multiples of the eager baseline's in the same rounds."""
    return evidence.latency.rate_per_s / evidence.eager.rate_per_s if evidence.eager else 0.0


PREFERENCES: dict[str, Callable[[EngineEvidence], tuple[float, ...]]] = {
    "latency": lambda e: (_latency(e), e.size_bytes),
    "throughput": lambda e: (-_rate(e), _latency(e)),
    "size": lambda e: (e.size_bytes, _latency(e)),
    "accuracy": lambda e: (-e.engine_quality, _latency(e)),
}
"""`objective.prefer` → sort key; the smallest wins, the second figure breaks ties."""


def settings(spec: Spec, inputs: StepInput) -> dict[str, Any]:
    """What decides the result."""
    return {"prefer": spec.objective.prefer, "cells": expected_cells(spec, inputs), "run": inputs.run_key}


def run(context: Context) -> StepOutput:
    """Judge the table, register the winner. Raises GateFailed when no engine passed."""
    spec, inputs = context.spec, context.inputs
    rows = table(spec, inputs)
    unreleased = comparison_only(spec, rows)
    winner = best([r for r in rows if r.cell not in unreleased], spec.objective.prefer)
    rows = [r.model_copy(update={"release": winner is not None and r.cell == winner.cell}) for r in rows]
    _write_rows(context, rows)
    if winner is None:
        raise GateFailed(_refusal(rows, unreleased))
    registry = Registry(spec.model.name, context.tracking.client)
    champion = registry.champion()
    version, already = _register(registry, inputs, winner, champion)
    details = {
        "rows": [r.model_dump(mode="json") for r in rows],
        "winner": winner.cell,
        "version": version,
        "best_per_target": best_per_target(spec, rows),
        "champion": champion,
        "already_champion": already,
        "missing": [r.cell for r in rows if r.status == "missing"],
        "comparison_only": unreleased,
    }
    verdict = Verdict(
        gate="select",
        answer="pass",
        reason=f"{winner.cell} is the best of {_passed(rows, unreleased)} passing engines by {spec.objective.prefer}",
        n=len(rows),
    )
    return context.output(verdicts=(verdict,), details=details)


def expected_cells(spec: Spec, inputs: StepInput) -> list[str]:
    """Keys of the cells that must be there, whether or not their steps left anything."""
    chosen = inputs.params.get("recipes") or None
    return flow.cells(flow.with_choices(spec, recipes=chosen) if chosen else spec)


def table(spec: Spec, inputs: StepInput) -> list[Row]:
    """A row for each expected cell, in the spec's order."""
    found = {o.cell.key: o for o in inputs.upstream if o.step == "validate" and o.cell is not None}
    return [row_of(cell, found.get(cell)) for cell in expected_cells(spec, inputs)]


def comparison_only(spec: Spec, rows: Sequence[Row]) -> dict[str, str]:
    """Cells whose engine is measured and never released, with the reason."""
    targets = {r.cell: str(flow.cell_of(r.cell).target) for r in rows}
    return {
        cell: f"engine {spec.targets[target].engine} is measured for comparison; no model server runs it"
        for cell, target in targets.items()
        if not spec.releasable(target)
    }


def best(rows: Sequence[Row], prefer: str) -> Row | None:
    """The passing engine that the objective prefers; never the baseline, never one that did not pass."""
    passed = [(PREFERENCES[prefer](r.evidence), r.cell, r) for r in rows if r.status == "passed" and r.evidence]
    return min(passed, key=lambda entry: entry[:2])[2] if passed else None


def best_per_target(spec: Spec, rows: Sequence[Row]) -> dict[str, str | None]:
    """Target → cell of its best engine; None where none passed."""
    found = {}
    for target in spec.targets:
        row = best([r for r in rows if flow.cell_of(r.cell).target == target], spec.objective.prefer)
        found[target] = row.cell if row else None
    return found


def _register(registry: Registry, inputs: StepInput, winner: Row, champion: str | None) -> tuple[str, bool]:
    """The winner's version, and whether that very engine serves already; then nothing is written."""
    built = inputs.output_of("build", flow.cell_of(winner.cell))
    if built is None or built.artifact is None:
        raise DataError(f"step select: IN.json has evidence for {winner.cell}, but not its build output")
    if champion is not None and registry.tags(champion).get(SHA256) == built.artifact.sha256:
        return champion, True
    version = registry.register(built.artifact, winner.cell, inputs.pipeline_run_id, winner.verdicts)
    registry.set_alias(CHALLENGER, version)
    return version, False


def _write_rows(context: Context, rows: Sequence[Row]) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        path.write_text(json.dumps([r.model_dump(mode="json") for r in rows], indent=1))
        context.run.artifact(path)


def _passed(rows: Sequence[Row], unreleased: Mapping[str, str]) -> int:
    return sum(r.status == "passed" and r.cell not in unreleased for r in rows)


def _refusal(rows: Sequence[Row], unreleased: Mapping[str, str]) -> str:
    lines = [f"{r.cell}: {r.status}: {_why(r, unreleased)}" for r in rows if r.status != "reference"]
    return "accuracy validation: no engine passed, nothing is promoted:\n  " + "\n  ".join(lines)


def _why(row: Row, unreleased: Mapping[str, str]) -> str:
    """Why an engine is not released."""
    failed = [f"{v.gate}: {v.reason}" for v in row.verdicts if not v.passed]
    return "; ".join(failed) or unreleased[row.cell]
