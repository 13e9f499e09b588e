"""The plan of a pipeline run, as plain data: its stages, its tasks, its cells, and what each step builds on.

The DAG and the Kubeflow package turn this into operators and decide nothing themselves. A step is given exactly the
outputs that it uses, since they decide its identity; they are found by key, never by position, so that a failed cell
leaves a visible gap.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import yaml

from slipstream import storage
from slipstream.contract import Cell, StepOutput
from slipstream.errors import InputError
from slipstream.home import Home
from slipstream.spec import BASELINE, TECHNIQUES, Spec, parse
from slipstream.steps import STEPS

STAGES: dict[str, tuple[str, ...]] = {
    "optimize": ("check", "retrain", *TECHNIQUES, "build"),
    "accuracy_validation": ("validate", "select"),
    "small_scale_test": ("trial",),
    "full_rollout": ("approval", "rollout"),
    "report": ("report", "outcome"),
}
"""Stages in order, and their steps. Every one but `approval` and `outcome` is a step."""

STOP_AFTER = ("none", "accuracy_validation", "small_scale_test")
"""Stages after which a run may end early."""


PER_CELL = ("build", "validate")
"""Steps that run once for each recipe on each target."""


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
        """Its name for people: `retrain`, `quantize int8` or `build int8@server`."""
        return self.step if self.cell is None else f"{self.step} {self.cell.key}"


def task_of(task_id: str) -> Task:
    """The task of an id. Names of recipes and targets have no dots."""
    step, *cell = task_id.split(".")
    return Task(step, Cell(recipe=cell[0], target=cell[1] if len(cell) > 1 else None) if cell else None)


def tasks(spec: Spec, stage: str) -> Iterator[Task]:
    """All steps of a stage, in an order in which each comes after what it builds on."""
    for step in STAGES[stage]:
        if step in TECHNIQUES:
            yield from (Task(step, Cell(recipe=r)) for r in spec.recipes if step in spec.techniques(r))
        elif step in PER_CELL:
            yield from (Task(step, cell_of(key)) for key in cells(spec))
        elif step in STEPS:
            yield Task(step)


def stage_of(step: str) -> str:
    """The stage that a step belongs to."""
    return next(stage for stage, steps in STAGES.items() if step in steps)


def sources(task: Task, spec: Spec) -> list[Task]:
    """Tasks whose outputs a task is given: those that it needs, or all earlier ones where it judges the whole run."""
    if task.cell is not None or task.step in ("check", "retrain"):
        return [Task(step, cell_of(key) if key else None) for step, key in needs(task.step, spec, task.cell)]
    steps = [s for steps in STAGES.values() for s in steps]
    before = steps[: steps.index(task.step)]
    return [t for stage in STAGES for t in tasks(spec, stage) if t.step in before]


def parents(task: Task, spec: Spec) -> list[Task]:
    """Tasks that a task with a cell directly follows: its sources, less those that one of these follows itself."""
    further = {ancestor for source in sources(task, spec) for ancestor in _ancestors(source, spec)}
    return [source for source in sources(task, spec) if source not in further]


def _ancestors(task: Task, spec: Spec) -> set[Task]:
    direct = sources(task, spec)
    return set(direct).union(*(_ancestors(source, spec) for source in direct))


def skipped_stages(stop_after: str) -> tuple[str, ...]:
    """Stages that do not run when the run ends after `stop_after`; the report always runs."""
    if stop_after == "none":
        return ()
    stages = [s for s in STAGES if s != "report"]
    return tuple(stages[stages.index(stop_after) + 1 :])


def run_folder(home: Home, spec_name: str, run_key: str) -> str:
    """Folder, or s3:// prefix, of a pipeline run.

    Run ids are unique for each DAG only: two weekly specs start at the same second.
    """
    return storage.join(str(home.runs), spec_name, run_key)


def with_choices(spec: Spec, *, max_drop: float | None = None, recipes: Sequence[str] | None = None) -> Spec:
    """The spec with a trigger form's choices applied. Raises SpecError for a choice that it does not allow."""
    document = spec.model_dump(mode="json")
    if max_drop is not None:
        document["objective"]["max_drop"] = max_drop
    if recipes is not None:
        if unknown := sorted(set(recipes) - set(spec.recipes)):
            raise InputError(f"recipes {', '.join(unknown)}: not in spec {spec.name}; known: {', '.join(spec.recipes)}")
        for chosen in (document["recipes"], document["quantize"]["schemes"]):
            for name in set(chosen) - set(recipes):
                del chosen[name]
    return parse(yaml.safe_dump(document, sort_keys=False), f"run of {spec.name}")


def cells(spec: Spec) -> list[str]:
    """Keys of all cells that a run must judge: every recipe on every target that takes it, the baseline first."""
    return [Cell(recipe=r, target=t).key for t in spec.targets for r in (BASELINE, *spec.recipes) if spec.runs(r, t)]


def cell_of(key: str) -> Cell:
    """The cell of a key such as `int8` or `int8@server`."""
    recipe, _, target = key.partition("@")
    return Cell(recipe=recipe, target=target or None)


def upstream(step: str, spec: Spec, cell: Cell | None, outputs: Iterable[StepOutput]) -> tuple[StepOutput, ...]:
    """Exactly those outputs that `step` builds on for `cell`.

    Raises InputError when one is missing: the step that should have made it failed, so there is nothing to work on.
    """
    found = {(o.step, o.cell.key if o.cell else None): o for o in outputs}
    if cell is None and step not in ("check", "retrain"):
        return tuple(found.values())
    return tuple(_get(found, *key, needed_by=f"{step} {cell.key}" if cell else step) for key in needs(step, spec, cell))


def needs(step: str, spec: Spec, cell: Cell | None) -> list[tuple[str, str | None]]:
    """Keys (step, cell) of the outputs that a step with a cell, or the start of the flow, builds on."""
    if step == "check":
        return []
    if cell is None:
        return [("check", None)]
    if step == "distill":
        return [("check", None), ("retrain", None)]
    if step in TECHNIQUES:
        return [("check", None), _candidate(spec, cell.recipe, before=step)]
    if step == "build":
        return [("check", None), _candidate(spec, cell.recipe)]
    baseline = Cell(recipe=BASELINE, target=cell.target)
    engines = dict.fromkeys((cell.key, baseline.key))
    return [("check", None), ("retrain", None), *(("build", key) for key in engines)]


def _candidate(spec: Spec, recipe: str, before: str | None = None) -> tuple[str, str | None]:
    """Key of the recipe's latest model before a technique, or its last one."""
    order: tuple[str, ...] = TECHNIQUES
    earlier = order if before is None else order[: order.index(before)]
    done = [t for t in spec.techniques(recipe) if t in earlier]
    return (done[-1], recipe) if done else ("retrain", None)


def _get(found: Mapping[tuple[str, str | None], StepOutput], step: str, cell: str | None, needed_by: str) -> StepOutput:
    try:
        return found[step, cell]
    except KeyError:
        made_by = f"{step} {cell}" if cell else step
        raise InputError(f"{needed_by}: nothing to work on, since {made_by} left no output; see its log") from None
