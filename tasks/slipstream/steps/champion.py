"""Stage 1 against the champion: a retrained baseline may itself be worse, and its engines then pass against it.

The champion's scores come from its own validation if the test samples are unchanged; otherwise its engine is run here,
once. A champion that can no longer be loaded here is judged by scores recorded elsewhere, or the verdict is
inconclusive.
"""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np

from slipstream.contract import Artifact, Verdict
from slipstream.contract.evidence import Row, judged
from slipstream.engines.base import load_engine
from slipstream.errors import InputError
from slipstream.measure import gates
from slipstream.measure.metrics import base as metrics
from slipstream.measure.metrics.base import Runs, metric_for
from slipstream.plan.flow import cell_of
from slipstream.plugins import BUILD
from slipstream.runner.context import Context
from slipstream.steps import scores as scoring
from slipstream.steps.scores import Scores
from slipstream.store.registry import Registry

log = logging.getLogger(__name__)

Load = Callable[[Path], Runs]


def compare(context: Context, registry: Registry, version: str, rows: list[Row], load: Load = load_engine) -> list[Row]:
    """Return the rows; those that passed so far and may be released have an additional verdict."""
    passed = [r for r in rows if r.status == "passed" and not r.comparison]
    serving: Scores | None = None
    why, contenders = "", passed
    try:
        artifact = registry.artifact(version)  # signed: a tag could say that any engine is the champion
        contenders = [r for r in passed if _sha256(context, r) != artifact.sha256]
        serving = _champion_scores(context, artifact, version, load) if contenders else None
    except InputError as error:
        why = str(error)
        log.warning("champion version %s cannot be compared with: %s", version, why)
    return [judged(r, _verdict(context, version, r, serving, why)) if r in contenders else r for r in rows]


def _champion_scores(context: Context, artifact: Artifact, version: str, load: Load) -> Scores:
    metric, what = metric_for(context.spec.objective.metric), f"champion version {version}"
    try:
        return scoring.scores(context, scoring.engine(context, artifact, what, load), metric)
    except InputError as error:
        earlier = scoring.recorded(context, artifact)
        if earlier is None:
            raise
        log.warning("%s: not run here (%s); its scores in MLflow run %s stand", what, error, earlier.run_id)
        return earlier


def _verdict(context: Context, version: str, row: Row, serving: Scores | None, why: str) -> Verdict:
    objective = context.spec.objective
    margin = objective.max_drop if objective.max_drop_from_champion is None else objective.max_drop_from_champion
    assert row.evidence is not None, "a row that passed has evidence"
    if serving is None or row.evidence.scores_run is None:
        reason = f"champion version {version} cannot be compared with: {why or 'this engine has no scores'}"
        return Verdict(gate="champion", answer="inconclusive", reason=reason, limit=margin, unit="pp")
    metric, own = metric_for(objective.metric), scoring.of_run(context, row.evidence.scores_run)
    confidence, rng = row.evidence.confidence, np.random.default_rng(0)
    drop = metrics.drop(metric, serving.records, own.records, confidence, rng)
    return gates.champion(drop, margin, confidence, row.evidence.competing, version)


def _sha256(context: Context, row: Row) -> str | None:
    built = context.inputs.output_of(BUILD, cell_of(row.cell))
    return built.artifact.sha256 if built is not None and built.artifact is not None else None
