"""Manual rollback: `previous` serves again. `slipstream rollback MODEL` does the same from a terminal."""

import logging
from datetime import datetime

from airflow.sdk import DAG, Context, Param
from airflow.sdk.exceptions import AirflowFailException

import runtimes
from operators import OUTPUT, RETRIES, StepOperator
from slipstream import spec, storage
from slipstream.contract import StepInput
from slipstream.errors import SlipstreamError
from slipstream.home import Home
from slipstream.plan import catalog, flow
from slipstream.spec import Spec

log = logging.getLogger(__name__)


class RollbackOperator(StepOperator):
    """Runs the step `rollback` for the model that the form names."""

    def execute(self, context: Context) -> None:
        """Use any published spec of the model: the step needs only its name and nothing that differs between specs."""
        home, model = Home.from_environment(), context["params"]["model"]
        chosen = next((s for _, s in catalog.published(home) if isinstance(s, Spec) and s.model.name == model), None)
        if chosen is None:
            raise AirflowFailException(f"no published spec is about the model {model!r}")
        uri = storage.join(flow.run_folder(home, "rollback", context["run_id"]), "spec.yaml")
        storage.write_text(uri, spec.dump(chosen))
        leave = context["params"]["version"]
        inputs = StepInput(run_key=context["run_id"], params={"from": leave} if leave else {})
        output = runtimes.run_step(self.task_id, uri, inputs, context)
        context["ti"].xcom_push(OUTPUT, output)


def models() -> list[str]:
    """Return the registered models of published specs; empty if the specs cannot be listed."""
    try:
        specs = [s for _, s in catalog.published(Home.from_environment()) if isinstance(s, Spec)]
    except (SlipstreamError, OSError) as error:  # without a list of models, the form accepts any name
        log.warning("the published specs cannot be listed: %s", error)
        return []
    return sorted({s.model.name for s in specs})


with DAG(
    dag_id="rollback",
    description="Put the previous release of a model back into production",
    doc_md=__doc__,
    params={
        "model": Param(
            type="string",
            title="Model",
            description="Registered model whose last good release shall serve again.",
            **({"enum": models()} if models() else {}),
        ),
        "version": Param(
            None,
            type=["null", "string"],
            pattern="^[0-9]+$",
            title="Version to leave",
            description="Only to leave a version that a rollback put back; without it the release is left once.",
        ),
    },
    schedule=None,
    start_date=datetime(2026, 1, 1),
    catchup=False,
    default_args=RETRIES,
    tags=["slipstream"],
) as dag:
    # Waits for a rollout in flight, ahead of everything else that waits: two must not move traffic at once.
    RollbackOperator(task_id="rollback", pool="release", priority_weight=1000)
