"""A step as an Airflow task. Its upstream tasks come from `slipstream.plan.flow`, its runtime from `runtimes`."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta

from airflow.sdk import BaseOperator, Context
from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException

import runtimes
from links import MlflowRunLink, ReportLink
from slipstream import spec, storage
from slipstream.contract import Json, StepInput, StepOutput
from slipstream.contract.handover import Selection
from slipstream.errors import InputError
from slipstream.home import Home
from slipstream.plan import catalog, flow
from slipstream.plan.flow import Task
from slipstream.plugins import CHECK, SELECT, VALIDATE
from slipstream.spec import BASELINE, Spec

OUTPUT = "output"
"""XCom key of a step's OUT document."""

# Retried after 15 s and 30 s, if the step was killed or a service was down. Input and gate errors are permanent and are
# not retried (runtimes/).
RETRIES = {
    "retries": 2,
    "retry_delay": timedelta(seconds=15),
    "retry_exponential_backoff": True,
    "max_retry_delay": timedelta(minutes=2),
}


@dataclass(frozen=True)
class PipelineRun:
    """The part of Airflow's context that a task needs of its run."""

    context: Context

    @property
    def key(self) -> str:
        """The run's name, in Airflow, in MLflow and on disk."""
        return str(self.context["run_id"])

    @property
    def spec_name(self) -> str:
        """Name of the spec that the DAG was made from."""
        return str(self.context["dag"].dag_id).removeprefix(catalog.dag_id(""))

    @property
    def spec_uri(self) -> str:
        """The run's own copy of the spec, with the choices of the trigger form applied."""
        return storage.join(flow.run_folder(Home.from_environment(), self.spec_name, self.key), "spec.yaml")

    @property
    def skipped(self) -> tuple[str, ...]:
        """Stages that the trigger form excluded."""
        return flow.skipped_stages(self.context["params"].get("stop_after", "none"))

    def snapshot(self) -> None:
        """Freeze the spec for this run, so that a spec published meanwhile affects only later runs."""
        params = self.context["params"]
        published = catalog.read(Home.from_environment(), self.spec_name)
        chosen = flow.with_choices(published, max_drop=params["max_drop"], recipes=params["recipes"])
        storage.write_text(self.spec_uri, spec.dump(chosen))

    def outputs(self, tasks: Iterable[Task]) -> list[StepOutput]:
        """Return all outputs that these tasks have left so far, without those of failed and skipped tasks."""
        pulled = self.context["ti"].xcom_pull(task_ids=[task.id for task in tasks], key=OUTPUT)
        return [StepOutput.model_validate(value) for value in pulled if value is not None]

    def choices(self) -> Json:
        """Return the run-time choices that a step may need."""
        params = self.context["params"]
        return {k: params.get(k) for k in ("source_version", "recipes")} | {"skip_stages": list(self.skipped)}


class StepOperator(BaseOperator):
    """Runs the step that the task id names: for a recipe (`quantize.int8`), a cell (`build.int8.server`), or the run.

    Its template field is the cell, which Airflow shows next to the task.
    """

    template_fields = ("cell",)
    ui_color = "#e8f0fe"
    operator_extra_links = (MlflowRunLink(), ReportLink())

    def __init__(self, *, model: str = "", **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.model = model
        self.step, cell = flow.task_of(self.task_id)
        self.cell = cell.key if cell else None

    def execute(self, context: Context) -> None:
        """Run the step and return its output."""
        run = PipelineRun(context)
        try:
            if self.step == CHECK:
                run.snapshot()
            if self.step == SELECT and not any(context["ti"].xcom_pull(task_ids=self.upstream_task_ids, key=OUTPUT)):
                raise InputError("select: nothing to judge, since no cell was validated; see the tasks before it")
            inputs = self._inputs(run, spec.load(run.spec_uri))
        except InputError as error:
            raise AirflowFailException(f"{error.headline}: {error}") from error
        context["ti"].xcom_push(OUTPUT, runtimes.run_step(self.step, run.spec_uri, inputs, context))

    def on_kill(self) -> None:
        """End the step's processes when Airflow ends the task."""
        runtimes.stop_step()

    def _inputs(self, run: PipelineRun, chosen: Spec) -> StepInput:
        """Return the IN document. Raise AirflowSkipException if the step has nothing to do in this run."""
        task = flow.task_of(self.task_id)
        if task.cell is not None and task.cell.recipe not in (BASELINE, *chosen.recipes):
            raise AirflowSkipException(f"recipe {task.cell.recipe} is not among this run's: see the trigger form")
        outputs = run.outputs(flow.sources(task, chosen))
        skip_unless_wanted(run, task.step, outputs)
        return StepInput(
            run_key=run.key,
            cell=task.cell,
            upstream=flow.upstream(task.step, chosen, task.cell, outputs),
            params=run.choices(),
        )


def skip_unless_wanted(run: PipelineRun, step: str, outputs: Sequence[StepOutput]) -> None:
    """Skip stages that the form excluded, and the rollout if the best engine already serves.

    The small-scale test runs even then: it tests nothing, but returns to the champion any traffic that a killed run
    left split.
    """
    stage = flow.stage_of(step)
    if stage in run.skipped:
        raise AirflowSkipException(f"{stage.replace('_', ' ')} is skipped: stop_after was chosen in the trigger form")
    select = next((o for o in outputs if o.step == SELECT), None)
    if stage == "full_rollout" and select and Selection.of(select).already_champion:
        raise AirflowSkipException("the best engine is the champion already; there is nothing to roll out")


def ask_only_if_wanted(context: Context) -> None:
    """Hook of the approval task: skip the question if no rollout will follow."""
    run = PipelineRun(context)
    skip_unless_wanted(run, "approval", run.outputs([Task(SELECT)]))


def settle(context: Context) -> str:
    """Raise AirflowFailException unless everything expected of the run happened.

    Airflow takes a run's state from its leaves, and a leaf that runs after failures would mark the run successful; a
    task whose recipe was removed by a new publication has no state at all. Therefore both states and expected cells are
    compared here.
    """
    run, ti = PipelineRun(context), context["ti"]
    states = ti.get_task_states(dag_id=ti.dag_id, run_ids=[run.key]).get(run.key, {})
    by_title = {flow.task_of(task_id).title: state for task_id, state in states.items() if task_id != ti.task_id}
    chosen = spec.load(run.spec_uri) if storage.exists(run.spec_uri) else None
    validated = [t for t in flow.tasks(chosen, "accuracy_validation") if t.step == VALIDATE] if chosen else []
    judged = {o.cell.key for o in run.outputs(validated) if o.cell}
    problems = {
        "failed": sorted(k for k, v in by_title.items() if v == "failed"),
        "not reached": sorted(k for k, v in by_title.items() if v == "upstream_failed"),
        "cells without evidence": [c for c in (flow.cells(chosen) if chosen else ()) if c not in judged],
    }
    if any(problems.values()):
        raise AirflowFailException(
            "; ".join(f"{what}: {', '.join(which)}" for what, which in problems.items() if which)
        )
    return json.dumps({"cells": sorted(judged), "stages skipped": list(run.skipped)})
