"""The plan of a pipeline run, as plain data: its stages, its tasks, its cells, and their dependencies.

The DAG and the Kubeflow package turn this into operators and make no decisions themselves. A step receives exactly the
outputs that it uses, since they determine its identity; they are found by key, never by position, so that a failed cell
leaves a visible gap.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, get_args

import yaml

from slipstream import storage
from slipstream.contract import Cell, StepOutput
from slipstream.errors import InputError
from slipstream.home import Home
from slipstream.plugins import BASELINE_ENGINE, BUILD, CANDIDATE, RETRAIN, STEPS, TECHNIQUES, Stage
from slipstream.spec import BASELINE, Spec, parse

STAGES: dict[str, tuple[str, ...]] = {
    stage: tuple(step for step, info in STEPS.items() if info.stage == stage) for stage in get_args(Stage)
}
"""Stages in order, and their steps."""
OF_AIRFLOW = {"approval": "full_rollout", "outcome": "report"}
"""Tasks of the DAG that are not steps: a person's approval before the rollout, and the run's state after the report."""

STOP_AFTER = ("none", "accuracy_validation", "small_scale_test")
"""Stages after which a run may end early."""


class Task(NamedTuple):
    """A step for the run, for a recipe or for a cell."""

    step: str
    cell: Cell | None = None

    @property
    def id(self) -> str:
        """Its name in Airflow: `retrain`, `quantize.int8` or `build.int8.server`."""
        parts = (self.step, self.cell.recipe, self.cell.target) if self.cell else (self.step,)
        return ".".join(part for part in parts if part)

    @property
    def title(self) -> str:
        """Its display name: `retrain`, `quantize int8` or `build int8@server`."""
        return self.step if self.cell is None else f"{self.step} {self.cell.key}"


def task_of(task_id: str) -> Task:
    """Return the task of an id. Names of recipes and targets have no dots."""
    step, *cell = task_id.split(".")
    return Task(step, Cell(recipe=cell[0], target=cell[1] if len(cell) > 1 else None) if cell else None)


def tasks(spec: Spec, stage: str) -> Iterator[Task]:
    """Yield all steps of a stage, each after those that it depends on."""
    for step in STAGES[stage]:
        match STEPS[step].per:
            case "recipe":
                yield from (Task(step, Cell(recipe=r)) for r in spec.recipes if step in spec.techniques(r))
            case "cell":
                yield from (Task(step, cell_of(key)) for key in cells(spec))
            case "run":
                yield Task(step)


def stage_of(name: str) -> str:
    """Return the stage of a step, or of another task of the DAG."""
    return OF_AIRFLOW.get(name) or str(STEPS[name].stage)


def place(name: str) -> tuple[int, int]:
    """Return the position of a step or another task of the DAG in the flow, by which lists of tasks are sorted."""
    steps = list(STEPS)
    within = steps.index(name) if name in STEPS else -1 if name == "approval" else len(steps)
    return list(STAGES).index(stage_of(name)), within


def sources(task: Task, spec: Spec) -> list[Task]:
    """Return tasks whose outputs a task receives, in the order of the flow's table."""
    uses, steps = STEPS[task.step].uses, list(STEPS)
    if uses is None:
        before = steps[: steps.index(task.step)]
        return [t for stage in STAGES for t in tasks(spec, stage) if t.step in before]
    return list(dict.fromkeys(_used(name, task, spec) for name in uses))


def _used(name: str, task: Task, spec: Spec) -> Task:
    """Return the task behind an entry of `StepInfo.uses`."""
    if task.cell is None or (name in STEPS and STEPS[name].per == "run"):
        return Task(name)
    if name == BASELINE_ENGINE:
        return Task(BUILD, Cell(recipe=BASELINE, target=task.cell.target))
    if name != CANDIDATE:
        return Task(name, task.cell)
    before = itertools.takewhile(lambda technique: technique != task.step, TECHNIQUES)
    applied = [t for t in before if t in spec.techniques(task.cell.recipe)]
    return Task(applied[-1], Cell(recipe=task.cell.recipe)) if applied else Task(RETRAIN)


def parents(task: Task, spec: Spec) -> list[Task]:
    """Return tasks that a task with a cell directly follows: its sources, without those that another source follows."""
    further = {ancestor for source in sources(task, spec) for ancestor in _ancestors(source, spec)}
    return [source for source in sources(task, spec) if source not in further]


def _ancestors(task: Task, spec: Spec) -> set[Task]:
    direct = sources(task, spec)
    return set(direct).union(*(_ancestors(source, spec) for source in direct))


def skipped_stages(stop_after: str) -> tuple[str, ...]:
    """Return stages that do not run if the run ends after `stop_after`; the report always runs."""
    if stop_after == "none":
        return ()
    stages = [s for s in STAGES if s != "report"]
    return tuple(stages[stages.index(stop_after) + 1 :])


def run_folder(home: Home, spec_name: str, run_key: str) -> str:
    """Return the folder, or s3:// prefix, of a pipeline run.

    Run ids are unique only within a DAG: two weekly specs start at the same second.
    """
    return storage.join(str(home.runs), spec_name, run_key)


def with_choices(spec: Spec, *, max_drop: float | None = None, recipes: Sequence[str] | None = None) -> Spec:
    """Return the spec with a trigger form's choices applied. Raise SpecError for a choice that it does not allow."""
    document = spec.model_dump(mode="json")
    if max_drop is not None:
        document["objective"]["max_drop"] = max_drop
    if recipes is not None:
        if unknown := sorted(set(recipes) - set(spec.recipes)):
            raise InputError(f"recipes {', '.join(unknown)}: not in spec {spec.name}; known: {', '.join(spec.recipes)}")
        for name in set(document["recipes"]) - set(recipes):
            del document["recipes"][name]
    return parse(yaml.safe_dump(document, sort_keys=False), f"run of {spec.name}")


def cells(spec: Spec) -> list[str]:
    """Return keys of all cells that a run must judge: every recipe on every target that supports it, baseline first."""
    return [Cell(recipe=r, target=t).key for t in spec.targets for r in (BASELINE, *spec.recipes) if spec.runs(r, t)]


def cell_of(key: str) -> Cell:
    """Return the cell of a key such as `int8` or `int8@server`."""
    recipe, _, target = key.partition("@")
    return Cell(recipe=recipe, target=target or None)


def upstream(step: str, spec: Spec, cell: Cell | None, outputs: Iterable[StepOutput]) -> tuple[StepOutput, ...]:
    """Return exactly the outputs that `step` depends on for `cell`.

    Raise InputError if one is missing: the step that should have made it failed, so there is nothing to work on. A step
    that judges the whole run accepts what exists.
    """
    by_task = {Task(o.step, o.cell): o for o in outputs}
    task = Task(step, cell)
    if STEPS[step].uses is None:
        return tuple(by_task.values())
    return tuple(_get(by_task, source, task) for source in sources(task, spec))


def _get(by_task: Mapping[Task, StepOutput], source: Task, task: Task) -> StepOutput:
    if source not in by_task:
        raise InputError(f"{task.title}: nothing to work on, since {source.title} left no output; see its log")
    return by_task[source]
