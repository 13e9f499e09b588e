"""The third way to start a run: a promotion in the model registry, once for each model version.

The run's id consists of the alias and the version, so Airflow itself refuses a second run, whether it comes from the
webhook, the reconciler, both at once, or either after a restart.
"""

import logging
from collections.abc import Mapping
from typing import Protocol

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from slipstream.contract import Json
from slipstream.errors import Unavailable
from slipstream.plan import catalog
from slipstream.spec import Spec
from slipstream.store.registry import ABSENT_CODES, PIPELINE_RUN

log = logging.getLogger(__name__)


class Runs(Protocol):
    """The part of Airflow's API that a promotion needs."""

    def dag(self, dag_id: str) -> Json | None: ...
    def run(self, dag_id: str, run_id: str) -> Json | None: ...
    def trigger(self, dag_id: str, run_id: str, conf: Mapping[str, object]) -> bool: ...


def run_id(alias: str, version: str) -> str:
    """Return the id of the run for a promoted version."""
    return f"{alias}-v{version}"


def promoted_version(client: MlflowClient, model: str, alias: str) -> str | None:
    """Return the version that a person pointed the alias at; None without one, or if slipstream made that version
    itself.

    Raise Unavailable if the registry does not answer.
    """
    try:
        version = client.get_model_version_by_alias(model, alias)
    except MlflowException as error:
        if error.error_code in ABSENT_CODES:
            return None
        raise Unavailable(f"MLflow registry: reading {model}@{alias}: {error}") from error
    return None if PIPELINE_RUN in version.tags else str(version.version)


def start(airflow: Runs, spec: Spec, version: str) -> bool:
    """Start the spec's run for a version; return False if it was started before. Raise Unavailable."""
    dag, name = catalog.dag_id(spec.name), run_id(spec.model.alias, version)
    if airflow.run(dag, name) is not None:
        return False
    if airflow.dag(dag) is None:
        raise Unavailable(f"Airflow does not know {dag} yet")
    started = airflow.trigger(dag, name, {"source_version": version})
    if started:
        log.info("%s@%s is version %s: started %s of %s", spec.model.name, spec.model.alias, version, name, dag)
    return started
