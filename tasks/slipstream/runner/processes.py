"""A step's work in as many processes as it needs: in a launcher's group, or in new processes on this machine.

Process 0 runs the step. The others wait until it trains, and then call the module's `train` as well.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar, cast

from slipstream import log_lines
from slipstream.contract import StepInput, StepOutput
from slipstream.data.user_code import told
from slipstream.errors import CodeError
from slipstream.frameworks.base import Group, distributes
from slipstream.home import Home
from slipstream.runner.context import Context, StepModule, TrainingModule, module_for
from slipstream.spec import Spec
from slipstream.store.tracking import StepRun, Tracking

log = logging.getLogger(__name__)

T = TypeVar("T")


class NullStepRun(StepRun):
    """The MLflow run for all processes but the first, which alone records."""

    def params(self, values: Mapping[str, object]) -> None: ...
    def metrics(self, values: Mapping[str, float], step: int = 0) -> None: ...
    def tags(self, values: Mapping[str, object]) -> None: ...
    def progress(self, done: int, total: int, unit: str = "", **figures: float) -> None: ...


def work(module: StepModule, context: Context, processes: int) -> StepOutput:
    """Do the step's own work: here, in a launcher's group, or in as many new processes as it needs."""
    if processes > 1 and context.group.size == 1:
        log.info("%s: starting %d processes", context.step, processes)
        run = context.run
        task = _Task(context.step, context.spec, context.inputs, context.identity, run.run_id, run.experiment_id)
        output = distributes(context.spec.model.framework).launch(processes, _member, task)
        assert output is not None, "process 0 has the output"
        return output
    with context.group.first_error_wins():
        return _never_exits(context.step, lambda: module.run(context))


def _never_exits(step: str, function: Callable[[], T]) -> T:
    """Return the result of a step's work. An exit from within it, as by a user's network, is not the step's verdict."""
    try:
        return function()
    except SystemExit as error:
        raise CodeError(f"step {step}: {told(error)}") from error


@dataclass(frozen=True)
class _Task:
    """Input of a new process: a context without its connections."""

    step: str
    spec: Spec
    inputs: StepInput
    identity: str
    run_id: str
    experiment_id: str


def _member(group: Group, task: _Task) -> StepOutput | None:
    """Run one of the new processes: the first does the step's work, the others their part on request."""
    log_lines.configure(logging.INFO if group.leads else logging.WARNING)
    if not group.leads:
        follow(group, task.step, task.spec, task.inputs)
        return None
    tracking, home = Tracking(task.spec), Home.from_environment()
    run = StepRun(tracking.client, task.run_id, task.experiment_id)
    context = Context(task.spec, task.inputs, task.step, task.identity, tracking, run, home, group)
    output = module_for(task.step).run(context)
    release_followers(group)
    return output


def follow(group: Group, step: str, spec: Spec, inputs: StepInput) -> None:
    """Train whenever process 0 does, until it shares None: the step is done."""
    tracking, module = Tracking(spec), cast(TrainingModule, module_for(step))
    while (word := group.share(cast("dict[str, str] | None", None))) is not None:
        run = NullStepRun(tracking.client, "", "")
        module.train(Context(spec, inputs, step, word["identity"], tracking, run, Home.from_environment(), group))


def release_followers(group: Group) -> None:
    """Tell the processes that follow that the step is done."""
    group.share(None)
