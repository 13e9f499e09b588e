"""The third way in: a promotion in the model registry starts a run, once for each model version.

The run's id is made from the alias and the version, so Airflow itself refuses a second one, whoever asks: the
webhook, the reconciler, both at once, or either after a restart.
"""

import logging
from typing import Any, Protocol

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from slipstream.errors import Unavailable
from slipstream.plan import catalog
from slipstream.spec import Spec
from slipstream.store.registry import ABSENT_CODES, PIPELINE_RUN

log = logging.getLogger(__name__)


class Runs(Protocol):
    """What a promotion needs of Airflow."""

    def dag(self, dag_id: str) -> dict[str, Any] | None: ...
    def run(self, dag_id: str, run_id: str) -> dict[str, Any] | None: ...
    def trigger(self, dag_id: str, run_id: str, conf: dict[str, Any]) -> bool: ...


def run_id(alias: str, version: str) -> str:
    """Id of the run for a promoted version."""
    return f"{alias}-v{version}"


def promoted_version(client: MlflowClient, model: str, alias: str) -> str | None:
    """The version that somebody pointed the alias at; None without one, or when slipstream made that version itself.

    Raises Unavailable when the registry does not answer.
    """
    try:
        version = client.get_model_version_by_alias(model, alias)
    except MlflowException as error:
        if error.error_code in ABSENT_CODES:
            return None
        raise Unavailable(f"MLflow registry: reading {model}@{alias}: {error}") from error
    return None if PIPELINE_RUN in version.tags else str(version.version)


def start(airflow: Runs, spec: Spec, version: str) -> bool:
    """Start the spec's run for a version; False when it was started before. Raises Unavailable."""
    dag, name = catalog.dag_id(spec.name), run_id(spec.model.alias, version)
    if airflow.run(dag, name) is not None:
        return False
    if airflow.dag(dag) is None:
        raise Unavailable(f"Airflow does not know {dag} yet")
    started = airflow.trigger(dag, name, {"source_version": version})
    if started:
        log.info("%s@%s is version %s: started %s of %s", spec.model.name, spec.model.alias, version, name, dag)
    return started
