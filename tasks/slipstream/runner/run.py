"""The one function that runs any step, in every runtime, unless its result can be reused."""

import logging
import sys
from pathlib import Path

from slipstream import digests
from slipstream.contract import Cell, Json, StepInput, StepOutput, combine, digest
from slipstream.contract.handover import Checked
from slipstream.errors import EXIT_RETRY, InputError, SlipstreamError
from slipstream.frameworks.base import ALONE, Group, group_of
from slipstream.home import Home, file_lock
from slipstream.plugins import CHECK, STEPS, TECHNIQUES, module_of
from slipstream.runner import processes
from slipstream.runner.context import Context, StepModule, module_for
from slipstream.spec import Spec
from slipstream.store.tracking import Tracking

log = logging.getLogger(__name__)


def identity(step: str, settings: Json, inputs: StepInput) -> str:
    """Return the digest of everything that determines the result: settings, code, upstream artifacts and the data set.

    The recipe name is excluded, so recipes with a common prefix share cached steps.
    """
    check, name_matters = inputs.output_of(CHECK), step not in TECHNIQUES
    return digest(
        {
            "step": step,
            "cell": inputs.cell.key if inputs.cell and name_matters else None,
            "settings": settings,
            "code": digests.code(module_of(step), *STEPS[step].sources),
            "data": Checked.of(check).data if check else None,
            "upstream": sorted(
                (o.step, o.cell.key if o.cell and name_matters else "", o.artifact.sha256)
                for o in inputs.upstream
                if o.artifact
            ),
        }
    )


def run_step(step: str, spec: Spec, inputs: StepInput) -> StepOutput | None:
    """Run a step, or find its earlier result. The one entry for every runtime.

    Return None if a launcher started several processes and this is not the first: the first has the output. Raise
    GateFailed after the output has been recorded if a verdict is not a pass and the step gates.
    """
    group = group_of(spec.model.framework) if STEPS[step].trains else ALONE
    if not group.leads:
        with group.first_error_wins():
            processes.follow(group, step, spec, inputs)
        group.leave()
        return None
    output = _led(group, step, spec, inputs)
    processes.release_followers(group)
    group.leave()
    return output


def _led(group: Group, step: str, spec: Spec, inputs: StepInput) -> StepOutput:
    module, tracking, home = module_for(step), Tracking(spec), Home.from_environment()
    settings = module.settings(spec, inputs)
    key = identity(step, settings, inputs)

    def execute() -> StepOutput:
        run = tracking.start(inputs.run_key, step, inputs.cell, key)
        complete_inputs = inputs.model_copy(update={"pipeline_run_id": tracking.pipeline_run(inputs.run_key)})
        return _recorded(module, settings, Context(spec, complete_inputs, step, key, tracking, run, home, group))

    if not STEPS[step].cached:
        return execute()
    lock = home.work / f"{step}-{key[:16]}.lock"
    with file_lock(lock, "another recipe begins alike"):
        if earlier := tracking.find(key):
            log.info("%s: unchanged, reusing MLflow run %s", step, earlier.run_id)
            output = tracking.reuse(inputs.run_key, earlier, inputs.cell)
        else:
            output = execute()
        lock.unlink(missing_ok=True)  # a waiting process, or one that creates it again, finds the result
        return output


def _recorded(module: StepModule, settings: Json, context: Context) -> StepOutput:
    """Return the output of a step's work, recorded in MLflow; a failure is recorded there too."""
    tracking, run, cached = context.tracking, context.run, STEPS[context.step].cached
    try:
        output = processes.work(module, context, settings.get("workers", 1))
    except BaseException as error:
        reason = str(error) if isinstance(error, SlipstreamError) else f"{type(error).__name__}: {error}"
        try:
            tracking.fail(run, reason, getattr(error, "exit_code", EXIT_RETRY))
        except Exception as lost:  # the step's own error says whether a retry helps
            log.warning("%s: MLflow could not be told that the step failed: %s", context.step, lost)
        raise
    output = tracking.finish(run, output, cache=cached and not _undecided(output))
    context.clean_up()
    return output


def _undecided(output: StepOutput) -> bool:
    """Return True if measuring again may decide: noise is transient, so such results are never cached. Accuracy is
    final."""
    open_verdicts = [v for v in output.verdicts if not v.passed]
    return (
        combine(output.verdicts) == "inconclusive" and bool(open_verdicts) and not any(v.final for v in open_verdicts)
    )


def wrong_environment(step: str, spec: Spec, cell: Cell | None, error: ImportError) -> InputError | None:
    """Return an error if this environment lacks a step's libraries; None if it is the step's own environment."""
    home, environment = Home.from_environment(), spec.environment_of(step, cell.target if cell else None)
    python = home.python(environment)
    if Path(sys.prefix) == python.parent.parent or not python.exists():
        return None
    program = python.with_name("slipstream")
    return InputError(f"step {step} needs the environment {environment} ({error}): run it with {program}")
