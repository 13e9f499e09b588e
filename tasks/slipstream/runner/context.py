"""The interface of a step module, and its context."""

import importlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

from slipstream.contract import Artifact, Cell, Json, StepInput, StepOutput, Verdict, combine
from slipstream.contract.details import Details
from slipstream.contract.handover import Checked
from slipstream.data import splits
from slipstream.errors import DataError, GateFailed, SpecError, Undecided
from slipstream.frameworks.base import ALONE, Group, Job, require_own_architecture
from slipstream.home import Home
from slipstream.plugins import CHECK, module_of
from slipstream.spec import Spec
from slipstream.store.tracking import StepRun, Tracking, fetch

T = TypeVar("T")


@dataclass(frozen=True)
class Context:
    """Everything that a step works with."""

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
    def section(self) -> Any:
        """The settings of this technique in its recipe."""
        return self.spec.section(self.step, self.cell.recipe)

    @property
    def workdir(self) -> Path:
        """Folder for checkpoints; the same again when a killed step is retried. Removed when the step is done."""
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
        checked = self.inputs.output_of(CHECK)
        started = Checked.of(checked).data if checked is not None else None
        if started is not None and started != loaded.digests():
            raise DataError(
                f"data: the splits are not those that this run started with ({started} then, "
                f"{loaded.digests()} now); start a new run"
            )
        return loaded

    @property
    def job(self) -> Job:
        """Everything that training in this step works with."""
        loss, metric = self.spec.model.loss, self.spec.objective.metric
        return Job(self.data, self.spec.seed, self.workdir, self.run, self.group, loss, metric)

    def upstream(self, *steps: str) -> StepOutput:
        """Return the latest upstream output for this cell's recipe among `steps`, given in order from last to first."""
        for step in steps:
            for output in self.inputs.upstream:
                if output.step == step and (output.cell is None or output.cell.recipe == self.cell.recipe):
                    return output
        raise DataError(f"step {self.step}: IN.json has no upstream output of {' or '.join(steps)} for {self.cell.key}")

    def fetch(self, output: StepOutput) -> Path:
        """Return the folder of an upstream artifact, on this machine and verified. In a group, process 0 sends it to
        all.

        Raise ModelError for a candidate whose network would be built by a function that the spec does not name.
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

    def train_on_all(self, train: Callable[["Context"], T]) -> T:
        """Call the module's `train` in every process of the group; return this process's result.

        Raise SpecError if a launcher started another number of processes than the spec requests.
        """
        if self.group.size > 1:
            if self.group.size != self.spec.training.workers:
                raise SpecError(
                    f"training.workers is {self.spec.training.workers}, but the launcher started {self.group.size} "
                    "processes; both must be the same, since their number decides the result"
                )
            self.group.share({"identity": self.identity})
        return train(self)

    def output(
        self,
        *,
        artifact: Artifact | None = None,
        metrics: dict[str, float] | None = None,
        verdicts: tuple[Verdict, ...] = (),
        details: Details | None = None,
    ) -> StepOutput:
        """Return this step's output document."""
        return StepOutput(
            step=self.step,
            cell=self.inputs.cell,
            identity=self.identity,
            run_id=self.run.run_id,
            artifact=artifact,
            metrics=metrics or {},
            verdicts=verdicts,
            details=details.document() if details is not None else {},
        )


class StepModule(Protocol):
    """The functions of a step's module."""

    def settings(self, spec: Spec, inputs: StepInput) -> Json:
        """Return everything that determines the result, except code, data and upstream digests, which are added to
        it."""
        ...

    def run(self, context: Context) -> StepOutput:
        """Do the work; `context.output(...)` fills in the fields that all outputs share."""
        ...


class TrainingModule(StepModule, Protocol):
    """Additional functions of a step that trains: `run` calls `context.train_on_all(train)`; settings have
    `workers`."""

    def train(self, context: Context) -> object:
        """Do the part of every process of the group, process 0 included."""
        ...


def module_for(step: str) -> StepModule:
    """Return the module of a step. Raise ImportError if this environment lacks its libraries."""
    return cast(StepModule, importlib.import_module(module_of(step)))


def workers(spec: Spec) -> dict[str, int]:
    """Return settings of a step that trains: how many processes share the work. One is the same as none given."""
    return {"workers": spec.training.workers} if spec.training.workers > 1 else {}


def require_pass(gate: str, verdicts: tuple[Verdict, ...], transient: str | None = None) -> None:
    """Raise GateFailed, with every reason, unless all verdicts pass.

    transient: why an inconclusive verdict may be decided later; then Undecided is raised, so that the step is retried.
    """
    answer = combine(verdicts)
    if answer != "pass":
        reasons = "; ".join(f"{v.gate}: {v.reason}" for v in verdicts if not v.passed) or "no evidence"
        if answer == "inconclusive" and transient is not None:
            raise Undecided(f"{gate}: {answer}, since {transient}: {reasons}")
        raise GateFailed(f"{gate}: {answer}: {reasons}")
