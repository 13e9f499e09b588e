"""One DAG for each published spec: optimize, then three stages that decide whether the result is released.

Read `pipeline` from top to bottom; it is the Airflow graph. Dependencies are in `slipstream.plan.flow`, the steps in
`slipstream.steps`, and where they run in `runtimes`.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from airflow.providers.standard.operators.hitl import ApprovalOperator
from airflow.sdk import DAG, Param, TaskGroup, get_parsing_context, task
from airflow.sdk.exceptions import AirflowFailException

from operators import RETRIES, StepOperator, ask_only_if_wanted, settle
from slipstream.errors import SpecError
from slipstream.home import Home
from slipstream.plan import catalog, flow
from slipstream.plugins import BUILD, CHECK, REPORT, RETRAIN, ROLLOUT, SELECT, STEPS, TECHNIQUES, TRIAL, VALIDATE
from slipstream.spec import BASELINE, Spec

HOME = Home.from_environment()

WHOLE_MACHINE: dict[str, Any] = {"pool": "machine", "pool_slots": 2}
HALF_THE_MACHINE: dict[str, Any] = {"pool": "machine", "pool_slots": 1}
ONE_RELEASE: dict[str, Any] = {"pool": "release"}


def pipeline(spec: Spec) -> DAG:
    """Return the DAG of a spec."""
    with DAG(
        dag_id=catalog.dag_id(spec.name),
        description=f"{spec.model.name}: {len(spec.recipes)} recipes × {len(spec.targets)} targets "
        f"(spec {catalog.fingerprint(spec)})",
        doc_md=describe(spec),
        params=trigger_form(spec),
        schedule=spec.schedule,
        start_date=catalog.published_at(HOME, spec.name),
        catchup=False,
        max_active_runs=1,
        # The weights finish one recipe before the next.
        default_args=RETRIES | {"weight_rule": "upstream", "model": spec.model.name},
        tags=["slipstream", spec.model.name],
        auto_register=False,  # one that fails half-way must not be found; the last lines register the rest
    ) as dag:
        placed: dict[flow.Task, StepOperator] = {}

        with TaskGroup("optimize", prefix_group_id=False):
            place(spec, (CHECK, RETRAIN), placed)
            for recipe in (BASELINE, *spec.recipes):
                with TaskGroup(f"recipe-{recipe}", group_display_name=recipe, prefix_group_id=False):
                    place(spec, (*TECHNIQUES, BUILD), placed, recipe)

        with TaskGroup("accuracy_validation", prefix_group_id=False):
            place(spec, (VALIDATE,), placed)
            select = StepOperator(task_id=SELECT, trigger_rule="all_done", **share_of(SELECT))
            [operator for planned, operator in placed.items() if planned.step == VALIDATE] >> select

        with TaskGroup("small_scale_test", prefix_group_id=False) as small_scale_test:
            StepOperator(task_id=TRIAL, **share_of(TRIAL))

        with TaskGroup("full_rollout", prefix_group_id=False) as full_rollout:
            rollout = StepOperator(task_id=ROLLOUT, **share_of(ROLLOUT))
            if spec.rollout.approval:
                approval(spec) >> rollout

        report = StepOperator(task_id=REPORT, trigger_rule="all_done")

        select >> small_scale_test >> full_rollout >> report >> outcome()
    return dag


def place(spec: Spec, steps: Sequence[str], placed: dict[flow.Task, StepOperator], recipe: str | None = None) -> None:
    """Add the tasks of these steps, of one recipe or of all, each right after the tasks whose outputs it uses.

    Recipes do not wait for each other: an engine is built and judged as soon as its own candidate exists.
    """
    of_stages = [planned for stage in flow.STAGES for planned in flow.tasks(spec, stage) if planned.step in steps]
    for planned in of_stages:
        if recipe is not None and (planned.cell is None or planned.cell.recipe != recipe):
            continue
        placed[planned] = StepOperator(task_id=planned.id, task_display_name=planned.title, **share_of(planned.step))
        for parent in flow.parents(planned, spec):
            placed[parent] >> placed[planned]


def share_of(step: str) -> dict[str, Any]:
    """Return the pool slots of a step: all if it trains or measures, half for other steps of a recipe or cell."""
    info = STEPS[step]
    if info.moves_traffic:
        return ONE_RELEASE
    if info.trains or info.measures:
        return WHOLE_MACHINE
    return {} if info.per == "run" else HALF_THE_MACHINE


def approval(spec: Spec) -> ApprovalOperator:
    """Ask a person to approve before traffic moves. No answer within a day counts as a rejection, which fails the
    run."""
    return ApprovalOperator(
        task_id="approval",
        subject=f"Roll out a new release of {spec.model.name}?",
        body="{% set chosen = ti.xcom_pull(task_ids='select', key='output').details %}"
        "**{{ chosen.winner }}** passed the accuracy validation and the small-scale test. "
        f"Approve to move the traffic in steps of {', '.join(f'{s} %' for s in spec.rollout.steps)}.",
        defaults="Reject",
        response_timeout=timedelta(days=1),
        fail_on_reject=True,
        pre_execute=ask_only_if_wanted,
        retries=0,
    )


@task(trigger_rule="all_done", retries=0)
def outcome(**context: Any) -> str:
    """Succeed only if everything expected of the run happened."""
    return settle(context)


def trigger_form(spec: Spec) -> dict[str, Param]:
    """Return the form of choices for a single run; everything else is fixed by the spec."""
    return {
        "max_drop": Param(
            spec.objective.max_drop,
            type="number",
            exclusiveMinimum=0,
            maximum=100,
            title="Allowed drop",
            description=f"Largest allowed drop of {spec.objective.metric} in percentage points.",
        ),
        "recipes": Param(
            list(spec.recipes),
            type="array",
            items={"type": "string", "enum": list(spec.recipes)},
            examples=list(spec.recipes),
            minItems=1,
            uniqueItems=True,
            title="Recipes",
            description="Recipes to try.",
        ),
        "stop_after": Param(
            "none",
            type="string",
            enum=list(flow.STOP_AFTER),
            values_display={s: s.replace("_", " ") for s in flow.STOP_AFTER},
            title="Stop after",
            description="Skip the stages after this one.",
        ),
        "source_version": Param(
            None,
            type=["null", "string"],
            pattern="^[0-9]+$",
            title="Source version",
            description=f"Version of {spec.model.name} to optimize, instead of the one that the spec leads to.",
        ),
    }


def describe(spec: Spec) -> str:
    """Return the DAG's description in the Airflow UI."""
    recipes = {name: spec.techniques(name) for name in spec.recipes}
    rows = "\n".join(f"| `{name}` | {' → '.join(steps) or 'as it is'} |" for name, steps in recipes.items())
    targets = "\n".join(f"| `{n}` | {t.engine}, {t.device}, {t.threads} threads |" for n, t in spec.targets.items())
    return (
        f"Makes **{spec.model.name}** faster; {spec.objective.metric} may drop by at most {spec.objective.max_drop} "
        f"points.\n\nStarts by its schedule ({spec.schedule or 'none'}), by this form, or when the alias "
        f"`{spec.model.alias}` moves.\n\n| recipe | techniques |\n| --- | --- |\n{rows}\n\n"
        f"| target | engine |\n| --- | --- |\n{targets}\n"
    )


def broken(name: str, error: SpecError) -> DAG:
    """Return a placeholder for an unusable spec, whose DAG stays in the list and says what to fix."""
    reason = str(error).encode(errors="backslashreplace").decode()  # a file's name need not be UTF-8
    with DAG(
        dag_id=catalog.dag_id(name),
        dag_display_name=f"{catalog.dag_id(name)} (broken spec)",
        description=reason.splitlines()[0],
        doc_md=f"The spec cannot be read. Mend it and publish it again.\n\n```\n{reason}\n```",
        schedule=None,
        tags=["slipstream", "broken spec"],
        auto_register=False,
    ) as dag:

        @task(task_id="spec")
        def say() -> None:
            raise AirflowFailException(reason)

        say()
    return dag


def dag_of(name: str, published: Spec | SpecError) -> DAG:
    """Return the DAG of a published spec. Never raise: that would remove the other specs' DAGs."""
    if isinstance(published, SpecError):
        return broken(name, published)
    try:
        dag = pipeline(published)
        dag.validate()
    except Exception as error:
        return broken(name, SpecError(f"{name}: Airflow takes no DAG of it: {type(error).__name__}: {error}"))
    return dag


requested_id = get_parsing_context().dag_id  # a task process needs only its own DAG
for spec_name, parsed in catalog.published(HOME):
    if requested_id in (None, catalog.dag_id(spec_name)):
        spec_dag = dag_of(spec_name, parsed)
        globals()[spec_dag.dag_id] = spec_dag
