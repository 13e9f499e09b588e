"""The race of stage 1: every judged engine of a run, timed in turns with the others (measure/race.py)."""

import logging
from collections.abc import Mapping

from slipstream import digests, hardware
from slipstream.contract import Artifact, StepOutput, digest
from slipstream.contract.evidence import Race
from slipstream.contract.handover import Raced
from slipstream.engines.base import engine_for, load_engine
from slipstream.errors import EngineError
from slipstream.frameworks.base import load_eager, toolchain
from slipstream.home import file_lock
from slipstream.measure import race as races
from slipstream.measure.latency import Plan
from slipstream.plugins import RETRAIN
from slipstream.runner.context import Context
from slipstream.steps.validate import EAGER, single
from slipstream.store.tracking import fetch

log = logging.getLogger(__name__)

PLAN = races.PLAN
RACE = "race"
"""Name of the MLflow runs that hold races; not a step of the flow."""


def race(context: Context, built: Mapping[str, Artifact]) -> tuple[Race | None, dict[str, str]]:
    """Time all engines (cell → its artifact) and the eager baseline in one run; also return the absent cells with
    reasons.

    A quiet race of an earlier run of the same engines is reused: the pick then is the same.
    """
    plan = PLAN.at(context.spec.objective.confidence)
    key = _identity(context, built, plan)
    if earlier := context.tracking.find(key):
        log.info("the same engines were raced in MLflow run %s", earlier.run_id)
        raced = Raced.of(earlier)
        return raced.race, raced.absent
    run = context.tracking.start(context.inputs.run_key, RACE, None, key)
    with file_lock(context.home.root / "measure.lock", "another engine is being measured"):
        result, absent = _timed(context, built, plan)
    details = Raced(race=result, absent=absent).document()
    output = StepOutput(step=RACE, identity=key, run_id=run.run_id, details=details)
    context.tracking.finish(run, output, cache=result is not None and not result.noise.noisy)
    return result, absent


def _timed(context: Context, built: Mapping[str, Artifact], plan: Plan) -> tuple[Race | None, dict[str, str]]:
    spec, test = context.spec, context.data.test
    threads = max(target.threads for target in spec.targets.values())
    subjects, absent = {}, {}
    for cell, artifact in built.items():
        try:
            subjects[cell] = single(load_engine(fetch(artifact)), test)
        except EngineError as error:  # its libraries or its hardware are elsewhere
            absent[cell] = str(error)
            log.warning("%s takes no part in the race: %s", cell, error)
    if not subjects:
        return None, absent
    baseline = context.inputs.output_of(RETRAIN)
    if baseline is not None:
        subjects[EAGER] = single(load_eager(context.fetch(baseline), threads=threads), test)

    def progress(done: int, total: int, others_cores: float | None) -> None:
        figures = {} if others_cores is None else {"cores used by others": others_cores}
        context.run.progress(done, total, "rounds", **figures)

    mean = spec.objective.prefer == "throughput"
    return races.run(subjects, len(test), plan, seed=spec.seed, threads=threads, mean=mean, progress=progress), absent


def _identity(context: Context, built: Mapping[str, Artifact], plan: Plan) -> str:
    """Return the digest of everything that determines a race, except for the noise."""
    spec, baseline = context.spec, context.inputs.output_of(RETRAIN)
    distributions = {d for t in spec.targets.values() for d in _distributions(t.engine)}
    return digest(
        {
            "step": RACE,
            "engines": {cell: artifact.sha256 for cell, artifact in built.items()},
            "baseline": baseline.artifact.sha256 if baseline is not None and baseline.artifact is not None else None,
            "test": context.data.test.digest,
            "plan": [repr(plan), spec.objective.prefer == "throughput", spec.seed],
            "versions": [toolchain(spec.model.framework), digests.versions(*sorted(distributions))],
            "hardware": hardware.describe(),
            "code": digests.source("engines", "measure"),
        }
    )


def _distributions(engine: str) -> tuple[str, ...]:
    try:
        return engine_for(engine).distributions
    except EngineError:  # in another environment: its engines take no part
        return ()
