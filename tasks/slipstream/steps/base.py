"""What a step module implements, and the one function that runs any of them.

A step module has:

    def settings(spec, inputs) -> dict     what decides its result, beyond code and upstream digests
    def run(context) -> StepOutput         the work; `context.output(...)` fills in the common fields

A step that trains may do a part of `run` in several processes: `context.together(train)` calls the module's function
`train(context)` in each of them. Their number is in its settings, as `workers`, since it decides the result.
"""

import importlib
import logging
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

from slipstream import digests, log_lines
from slipstream.contract import Artifact, Cell, StepInput, StepOutput, Verdict, combine, digest
from slipstream.data import splits
from slipstream.data.user_code import told
from slipstream.errors import (
    EXIT_RETRY,
    CodeError,
    DataError,
    GateFailed,
    InputError,
    SlipstreamError,
    SpecError,
    Undecided,
)
from slipstream.frameworks.base import ALONE, Group, Job, group_of, require_own_architecture, trainer_for
from slipstream.home import Home, file_lock
from slipstream.plugins import STEPS, TECHNIQUES
from slipstream.spec import Spec
from slipstream.store.tracking import StepRun, Tracking, fetch

log = logging.getLogger(__name__)

T = TypeVar("T")


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
    group: Group = ALONE

    @property
    def cell(self) -> Cell:
        """The cell of a step that has one."""
        assert self.inputs.cell is not None, f"step {self.step} needs a cell"
        return self.inputs.cell

    @property
    def workdir(self) -> Path:
        """Folder for checkpoints; the same again when a killed step is tried again. Removed when the step is done."""
        path = self._workdir
        path.mkdir(parents=True, exist_ok=True)
        return path

    @property
    def _workdir(self) -> Path:
        return self.home.work / f"{self.step}-{self.identity[:16]}"

    def clean_up(self) -> None:
        """Remove the work folder: the result is recorded, so nothing is resumed from it."""
        shutil.rmtree(self._workdir, ignore_errors=True)

    @cached_property
    def data(self) -> splits.Data:
        """The spec's data set, checked to be the one that the run started with. Raises DataError."""
        loaded = splits.load(self.spec)
        started = self.inputs.output_of("check")
        if started is not None and started.details["data"] != loaded.digests():
            raise DataError(
                f"data: the splits are not those that this run started with ({started.details['data']} then, "
                f"{loaded.digests()} now); start a new run"
            )
        return loaded

    @property
    def job(self) -> Job:
        """What training in this step works with."""
        loss, metric = self.spec.model.loss, self.spec.objective.metric
        return Job(self.data, self.spec.seed, self.workdir, self.run, self.group, loss, metric)

    def upstream(self, *steps: str) -> StepOutput:
        """The latest upstream output for this cell's recipe among `steps`, in the order given last to first."""
        for step in steps:
            for output in self.inputs.upstream:
                if output.step == step and (output.cell is None or output.cell.recipe == self.cell.recipe):
                    return output
        raise DataError(f"step {self.step}: IN.json has no upstream output of {' or '.join(steps)} for {self.cell.key}")

    def fetch(self, output: StepOutput) -> Path:
        """Folder of an upstream artifact, on this machine and verified. In a group process 0 brings it to all.

        Raises ModelError for a candidate whose network would be built by a function that the spec does not name.
        """
        artifact = output.artifact
        assert artifact is not None, f"step {output.step} hands on no artifact"
        if self.group.size > 1:
            if self.group.leads:
                fetch(artifact)
            self.group.broadcast_file(self.home.cache / artifact.sha256 / Path(artifact.path).name)
        folder = fetch(artifact)
        require_own_architecture(folder, self.spec)
        return folder

    def run_on_all(self, function: Callable[["Context"], T]) -> T:
        """Call a function of the step's module in every process of the group; what it returned in this one."""
        if self.group.size > 1:
            if self.group.size != self.spec.training.workers:
                raise SpecError(
                    f"training.workers is {self.spec.training.workers}, but the launcher started {self.group.size} "
                    "processes; both must be the same, since their number decides the result"
                )
            self.group.share({"function": function.__name__, "identity": self.identity})
        return function(self)

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


class NullStepRun(StepRun):
    """The MLflow run as all processes but the first see it: what they would record, that one does."""

    def params(self, values: Mapping[str, Any]) -> None: ...
    def metrics(self, values: Mapping[str, float], step: int = 0) -> None: ...
    def tags(self, values: Mapping[str, Any]) -> None: ...
    def progress(self, done: int, total: int, unit: str = "", **figures: float) -> None: ...


def workers(spec: Spec) -> dict[str, int]:
    """For the settings of a step that trains: how many processes share the work. One is as if nothing was said."""
    return {"workers": spec.training.workers} if spec.training.workers > 1 else {}


def identity(step: str, settings: Mapping[str, Any], inputs: StepInput) -> str:
    """Digest of all that decides the result: settings, code, upstream artefacts and the data set.

    What a recipe is called decides nothing of what its techniques make: recipes that begin alike share that work.
    """
    check, name_matters = inputs.output_of("check"), step not in TECHNIQUES
    return digest(
        {
            "step": step,
            "cell": inputs.cell.key if inputs.cell and name_matters else None,
            "settings": settings,
            "code": digests.source(f"steps/{step}.py", *STEPS[step].sources),
            "data": check.details["data"] if check else None,
            "upstream": sorted(
                (o.step, o.cell.key if o.cell and name_matters else "", o.artifact.sha256)
                for o in inputs.upstream
                if o.artifact
            ),
        }
    )


def run_step(step: str, spec: Spec, inputs: StepInput) -> StepOutput | None:
    """Run a step, or find that it was run before. The one entry for every runtime.

    None where a launcher started several processes and this is not the first: the first has the output.
    Raises GateFailed after the output has been recorded when a verdict is not a pass and the step gates.
    """
    module = cast(StepModule, importlib.import_module(f"slipstream.steps.{step}"))
    group = group_of(spec.model.framework) if hasattr(module, "train") else ALONE
    if not group.leads:
        with group.first_error_wins():
            _follow(group, module, step, spec, inputs)
        group.leave()
        return None
    output = _led(group, module, step, spec, inputs)
    group.share(None)  # see _follow
    group.leave()
    return output


def _led(group: Group, module: StepModule, step: str, spec: Spec, inputs: StepInput) -> StepOutput:
    tracking, settings, home = Tracking(spec), module.settings(spec, inputs), Home.from_environment()
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
        lock.unlink(missing_ok=True)  # who waits for it, or makes it anew, finds the result
        return output


def _recorded(module: StepModule, settings: Mapping[str, Any], context: Context) -> StepOutput:
    """The output of a step's work, in MLflow; a failure is told there too."""
    tracking, run, cached = context.tracking, context.run, STEPS[context.step].cached
    try:
        output = _work(module, context, settings.get("workers", 1))
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


def _work(module: StepModule, context: Context, processes: int) -> StepOutput:
    """The step's own work: here, in the group that a launcher made, or in as many new processes as it needs."""
    if processes > 1 and context.group.size == 1:
        log.info("%s: starting %d processes", context.step, processes)
        run = context.run
        task = _Task(context.step, context.spec, context.inputs, context.identity, run.run_id, run.experiment_id)
        output = trainer_for(context.spec.model.framework).launch(processes, _member, task)
        assert output is not None, "process 0 has the output"
        return output
    with context.group.first_error_wins():
        return _never_exits(context.step, lambda: module.run(context))


def _never_exits(step: str, work: Callable[[], T]) -> T:
    """The result of a step's work. An exit from within it, as a user's network may do, is not the step's verdict."""
    try:
        return work()
    except SystemExit as error:
        raise CodeError(f"step {step}: {told(error)}") from error


@dataclass(frozen=True)
class _Task:
    """What a new process is told: a context without its connections."""

    step: str
    spec: Spec
    inputs: StepInput
    identity: str
    run_id: str
    experiment_id: str


def _member(group: Group, task: _Task) -> StepOutput | None:
    """What each of the new processes does: the first the step's work, the others their part when it asks for it."""
    log_lines.configure(logging.INFO if group.leads else logging.WARNING)
    module = cast(StepModule, importlib.import_module(f"slipstream.steps.{task.step}"))
    if not group.leads:
        _follow(group, module, task.step, task.spec, task.inputs)
        return None
    tracking, home = Tracking(task.spec), Home.from_environment()
    run = StepRun(tracking.client, task.run_id, task.experiment_id)
    output = module.run(Context(task.spec, task.inputs, task.step, task.identity, tracking, run, home, group))
    group.share(None)  # see _follow
    return output


def _follow(group: Group, module: StepModule, step: str, spec: Spec, inputs: StepInput) -> None:
    """Call what process 0 calls `run_on_all`, until it shares None: the step is done."""
    tracking = Tracking(spec)
    while (word := group.share(cast("dict[str, str] | None", None))) is not None:
        run = NullStepRun(tracking.client, "", "")
        context = Context(spec, inputs, step, word["identity"], tracking, run, Home.from_environment(), group)
        getattr(module, word["function"])(context)


def _undecided(output: StepOutput) -> bool:
    """True if measuring again may decide: noise is transient, so such results are never cached. Accuracy is final."""
    open_verdicts = [v for v in output.verdicts if not v.passed]
    return (
        combine(output.verdicts) == "inconclusive" and bool(open_verdicts) and not any(v.final for v in open_verdicts)
    )


def wrong_environment(step: str, spec: Spec, cell: Cell | None, error: ImportError) -> InputError | None:
    """What to say when this environment lacks a step's libraries; None when it is the step's own environment."""
    home, environment = Home.from_environment(), spec.environment_of(step, cell.target if cell else None)
    python = home.python(environment)
    if Path(sys.prefix) == python.parent.parent or not python.exists():
        return None
    program = python.with_name("slipstream")
    return InputError(f"step {step} needs the environment {environment} ({error}): run it with {program}")


def require_pass(gate: str, verdicts: tuple[Verdict, ...], transient: str | None = None) -> None:
    """Raise GateFailed, with every reason, unless all verdicts pass.

    transient: why what is inconclusive may be decided later; then Undecided is raised, so that the step is retried.
    """
    answer = combine(verdicts)
    if answer != "pass":
        reasons = "; ".join(f"{v.gate}: {v.reason}" for v in verdicts if not v.passed) or "no evidence"
        if answer == "inconclusive" and transient is not None:
            raise Undecided(f"{gate}: {answer}, since {transient}: {reasons}")
        raise GateFailed(f"{gate}: {answer}: {reasons}")
