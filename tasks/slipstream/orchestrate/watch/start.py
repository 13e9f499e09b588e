"""Starts a run: publish the spec, wait until Airflow has read it, trigger its DAG."""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from slipstream import spec as specs
from slipstream.contract import Json
from slipstream.errors import InputError, SpecError, Unavailable
from slipstream.home import Home
from slipstream.plan import catalog, flow
from slipstream.platform.airflow_api import AirflowApi
from slipstream.spec import Spec

CHOICES = ("max_drop", "recipes", "stop_after", "source_version")
"""The trigger form's fields (dags/optimize.py)."""


@dataclass(frozen=True)
class Started:
    """A run that Airflow has accepted."""

    spec: Spec
    dag_id: str
    run_id: str


def choices(parameters: Sequence[str]) -> Json:
    """Return `KEY=VALUE` pairs as the trigger form's fields; a list is `a,b` or JSON (`["a","b"]`). Raise
    InputError."""
    chosen: Json = {}
    for pair in parameters:
        key, equals, text = pair.partition("=")
        if not equals or key not in CHOICES:
            raise InputError(f"--param {pair}: must be KEY=VALUE with a KEY of {', '.join(CHOICES)}")
        if key == "recipes":
            chosen[key] = _names(pair, text)
        else:
            chosen[key] = _number(pair, text) if key == "max_drop" else text
    return chosen


def _names(pair: str, text: str) -> list[str]:
    """Return names in `a,b`, `[a, b]` or JSON: none contains a comma or a quote. Raise InputError if there are none."""
    inner = text.strip().removeprefix("[").removesuffix("]")
    names = [stripped for name in inner.split(",") if (stripped := name.strip(" \"'"))]
    if not names:
        raise InputError(f'--param {pair}: write names as a,b or as a JSON list, ["a","b"]')
    return names


def _number(pair: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"--param {pair}: must be a number, in percentage points, such as max_drop=0.5") from None


def check_choices(wanted: Spec, chosen: Json) -> None:
    """Reject here what Airflow would reject later. Raise InputError."""
    flow.with_choices(wanted, max_drop=chosen.get("max_drop"), recipes=chosen.get("recipes"))
    if chosen.get("stop_after", "none") not in flow.STOP_AFTER:
        raise InputError(f"--param stop_after={chosen['stop_after']}: must be one of {', '.join(flow.STOP_AFTER)}")


def start(home: Home, path: Path, chosen: Json) -> Started:
    """Publish the spec and start a run of it. Raise SpecError, InputError, Unavailable."""
    spec = specs.load(path)
    check_choices(spec, chosen)
    airflow = AirflowApi.of(home)
    require_same_graph(home, spec, airflow)
    promoted = None if chosen else _promotion(home, spec, airflow)
    catalog.publish(home, path)
    dag_id = catalog.dag_id(spec.name)
    airflow.wait_for_dag(dag_id, catalog.fingerprint(spec))
    airflow.unpause(dag_id)
    if promoted:
        run_id, conf = promoted
        airflow.trigger(dag_id, run_id, conf)  # if the reconciler was faster, its run is the one to follow
        return Started(spec, dag_id, run_id)
    run_id = f"run-{datetime.datetime.now(datetime.UTC):%Y%m%d-%H%M%S}"
    if not airflow.trigger(dag_id, run_id, chosen):
        raise Unavailable(f"{dag_id} has a run {run_id} already, started this very second; try again")
    return Started(spec, dag_id, run_id)


def require_same_graph(home: Home, wanted: Spec, airflow: AirflowApi) -> None:
    """Raise Unavailable if publishing the spec now would change the graph of a run in progress.

    A run keeps its own copy of the spec, but Airflow takes the tasks of every run from the current DAG.
    """
    try:
        published = catalog.read(home, wanted.name)
    except SpecError:  # none is published yet, or one that cannot run
        return
    if _graph(published) == _graph(wanted):
        return
    if (run_id := airflow.run_under_way(catalog.dag_id(wanted.name))) is not None:
        raise Unavailable(
            f"{run_id} of {wanted.name} is under way, and this spec has other recipes, techniques or targets, which "
            f"would change that run's tasks; wait for its end (`slipstream watch {wanted.name} {run_id}`), or mark it "
            "as failed in Airflow"
        )


def _graph(spec: Spec) -> set[flow.Task]:
    return {task for stage in flow.STAGES for task in flow.tasks(spec, stage)}


def _promotion(home: Home, spec: Spec, airflow: AirflowApi) -> tuple[str, Json] | None:
    """Return run id and conf of the run that the alias requests, if it has not started yet.

    Publishing a spec whose alias points at a version makes the reconciler start that version's run; using its id here
    gives one run instead of two. A spec that trains is trained.
    """
    if spec.model.train is not None:
        return None
    from slipstream.orchestrate.triggers import promotion
    from slipstream.reports.find import connect

    version = promotion.promoted_version(connect(home), spec.model.name, spec.model.alias)
    if version is None:
        return None
    run_id = promotion.run_id(spec.model.alias, version)
    if airflow.run(catalog.dag_id(spec.name), run_id) is not None:
        return None
    return run_id, {"source_version": version}
