"""What a step module implements, and the one function that runs any of them.

A step module has:

    def settings(spec, inputs) -> dict     what decides its result, beyond code and upstream digests
    def run(context) -> StepOutput         the work; `context.output(...)` fills in the common fields
"""

import importlib
import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, cast

from slipstream import data, digests
from slipstream.contract import Artifact, Cell, StepInput, StepOutput, Verdict, combine, digest
from slipstream.errors import EXIT_RETRY, DataError, GateFailed, SlipstreamError
from slipstream.home import Home
from slipstream.spec import Spec
from slipstream.steps import STEPS
from slipstream.tracking import StepRun, Tracking, fetch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Context:
    """What a step works with."""

    spec: Spec
    inputs: StepInput
    step: str
    identity: str
    tracking: Tracking
    run: StepRun
    home: Home

    @property
    def cell(self) -> Cell:
        """The cell of a step that has one."""
        assert self.inputs.cell is not None, f"step {self.step} needs a cell"
        return self.inputs.cell

    @property
    def workdir(self) -> Path:
        """Folder for checkpoints; the same again when a killed step is tried again."""
        path = self.home.work / f"{self.step}-{self.identity[:16]}"
        path.mkdir(parents=True, exist_ok=True)
        return path

    @cached_property
    def data(self) -> data.Data:
        """The spec's data set, checked to be the one that the run started with. Raises DataError."""
        loaded = data.load(self.spec)
        started = self.inputs.output_of("check")
        if started is not None and started.details["data"] != loaded.digests():
            raise DataError(
                f"data: the splits are not those that this run started with ({started.details['data']} then, "
                f"{loaded.digests()} now); start a new run"
            )
        return loaded

    def upstream(self, *steps: str) -> StepOutput:
        """The latest upstream output for this cell's recipe among `steps`, in the order given last to first."""
        for step in steps:
            for output in self.inputs.upstream:
                if output.step == step and (output.cell is None or output.cell.recipe == self.cell.recipe):
                    return output
        raise DataError(f"step {self.step}: IN.json has no upstream output of {' or '.join(steps)} for {self.cell.key}")

    def fetch(self, output: StepOutput) -> Path:
        """Folder of an upstream artefact, on this machine and verified."""
        assert output.artifact is not None, f"step {output.step} hands on no artefact"
        return fetch(output.artifact)

    def output(
        self,
        *,
        artifact: Artifact | None = None,
        metrics: dict[str, float] | None = None,
        verdicts: tuple[Verdict, ...] = (),
        details: dict[str, Any] | None = None,
    ) -> StepOutput:
        """This step's output document."""
        return StepOutput(
            step=self.step,
            cell=self.inputs.cell,
            identity=self.identity,
            run_id=self.run.run_id,
            artifact=artifact,
            metrics=metrics or {},
            verdicts=verdicts,
            details=details or {},
        )


class StepModule(Protocol):
    """The functions of a step module."""

    def settings(self, spec: Spec, inputs: StepInput) -> dict[str, Any]: ...
    def run(self, context: Context) -> StepOutput: ...


def identity(step: str, spec: Spec, inputs: StepInput, module: StepModule) -> str:
    """Digest of all that decides the result: settings, code, upstream artefacts and the data set."""
    check = inputs.output_of("check")
    return digest(
        {
            "step": step,
            "cell": inputs.cell.key if inputs.cell else None,
            "settings": module.settings(spec, inputs),
            "code": digests.source(f"steps/{step}.py", *STEPS[step].sources),
            "data": check.details["data"] if check else None,
            "upstream": sorted(
                (o.step, o.cell.key if o.cell else "", o.artifact.sha256) for o in inputs.upstream if o.artifact
            ),
        }
    )


def run_step(step: str, spec: Spec, inputs: StepInput) -> StepOutput:
    """Run a step, or find that it was run before. The one entry for every runtime.

    Raises GateFailed after the output has been recorded when a verdict is not a pass and the step gates.
    """
    module = cast(StepModule, importlib.import_module(f"slipstream.steps.{step}"))
    tracking = Tracking(spec)
    key = identity(step, spec, inputs, module)
    if STEPS[step].cached and (earlier := tracking.find(key)):
        log.info("%s: unchanged, reusing MLflow run %s", step, earlier.run_id)
        return tracking.reuse(inputs.run_key, earlier)
    run = tracking.start(inputs.run_key, step, inputs.cell, key)
    inputs = inputs.model_copy(update={"pipeline_run_id": tracking.pipeline_run(inputs.run_key)})
    context = Context(spec, inputs, step, key, tracking, run, Home.from_environment())
    try:
        output = module.run(context)
    except BaseException as error:
        reason = str(error) if isinstance(error, SlipstreamError) else f"{type(error).__name__}: {error}"
        tracking.fail(run, reason, getattr(error, "exit_code", EXIT_RETRY))
        raise
    tracking.finish(run, output, cache=STEPS[step].cached and not _undecided(output))
    return output


def _undecided(output: StepOutput) -> bool:
    """Whether the evidence did not suffice. A busy machine passes; its evidence must not be reused for ever."""
    return bool(output.verdicts) and combine(output.verdicts) == "inconclusive"


def require_pass(gate: str, verdicts: tuple[Verdict, ...]) -> None:
    """Raise GateFailed, with every reason, unless all verdicts pass."""
    answer = combine(verdicts)
    if answer != "pass":
        reasons = "; ".join(f"{v.gate}: {v.reason}" for v in verdicts if not v.passed) or "no evidence"
        raise GateFailed(f"{gate}: {answer}: {reasons}")
