"""rollback: `previous` serves again. The traffic moves first, the aliases after; what was champion is `previous` then.

A journal says which way it goes, so that a rollback that was stopped half way is finished by the next one instead
of being turned around. Details: `champion` and `previous`, the versions that the aliases name now.
"""

import datetime
import getpass
import logging
from typing import Any

from mlflow import MlflowClient

from slipstream import traffic
from slipstream.contract import StepInput, StepOutput
from slipstream.errors import RegistryError, SlipstreamError
from slipstream.home import Home
from slipstream.registry import CHAMPION, PREVIOUS, ROLLED_BACK, Registry
from slipstream.report.find import connect
from slipstream.spec import Spec
from slipstream.steps.base import Context
from slipstream.tracking import fetch
from slipstream.traffic.base import Release, Routes, TrafficController
from slipstream.traffic.releases import moving_alone
from slipstream.traffic.termination import terminable

log = logging.getLogger(__name__)

JOURNAL = "rollback"
STARTED, DONE, GIVEN_UP = "started", "done", "given up"
"""What the journal says under `state`."""


def settings(spec: Spec, inputs: StepInput) -> dict[str, Any]:
    """What decides the result."""
    return {"model": spec.model.name, "run": inputs.run_key}


def run(context: Context) -> StepOutput:
    """Put `previous` back. Raises RegistryError when there is none."""
    model = context.spec.model.name
    with moving_alone(context.home, model):
        details = rollback(model, traffic.controller(context.home), context.tracking.client, context.inputs.run_key)
    return context.output(details=details)


def by_hand(model: str, home: Home) -> dict[str, Any]:
    """What `slipstream rollback MODEL` does, with MLflow and Envoy of the platform in `home`.

    It does not wait for a test or rollout under way, whose end may change what there is to go back from: Unavailable.
    """
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    with moving_alone(home, model, wait=False):
        return rollback(model, traffic.controller(home), connect(home), f"{getpass.getuser()} at {now}")


def rollback(model: str, controller: TrafficController, client: MlflowClient, by: str) -> dict[str, Any]:
    """Put `previous` back, and return what the aliases name now.

    `by` says who asked: a pipeline run's key, or a person. Asked again by the same one, a rollback that is done
    changes nothing. Raises RegistryError when there is nothing to go back to, Unavailable.
    """
    registry = Registry(model, client)
    journal = registry.journal(JOURNAL)
    if journal.get("state") == DONE and by in journal["by"]:
        return {"champion": journal["to"], "previous": journal["from"]}
    with terminable():
        under_way = _under_way(registry, journal)
        source, target = (journal["from"], journal["to"]) if under_way else _back(registry)
        # All who asked for this one: who was stopped half way, and tries again, must not turn it around.
        entry = {"from": source, "to": target, "by": [*(journal["by"] if under_way else ()), by]}
        registry.write_journal(JOURNAL, entry | {"state": STARTED})
        release = registry.release(target)
        try:
            _unsplit(controller, registry.release(source), release)
            artifact = registry.artifact(target)
            controller.deploy(release, fetch(artifact), artifact.sha256)
        except SlipstreamError:
            if not under_way:  # nothing has moved yet: it must not stand in the way of every rollout to come
                registry.write_journal(JOURNAL, entry | {"state": GIVEN_UP})
            raise
        controller.set_routes(model, Routes(weights={release.name: 100}))
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        registry.tag(source, {ROLLED_BACK: now, "slipstream.rolled_back_by": by})
        registry.set_alias(CHAMPION, target)
        registry.set_alias(PREVIOUS, source)
        registry.write_journal(JOURNAL, entry | {"state": DONE})
    log.info("rollback: %s serves version %s instead of %s", model, target, source)
    return {"champion": target, "previous": source}


def _unsplit(controller: TrafficController, source: Release, target: Release) -> None:
    """Give `source` all the traffic that a killed rollout left split: KServe takes no third release beside two."""
    weights = controller.routes(source.model).weights
    if len(weights) > 1 and source.name in weights and target.name not in weights:
        controller.set_routes(source.model, Routes(weights={source.name: 100}))


def _under_way(registry: Registry, journal: dict[str, Any]) -> bool:
    """Whether a rollback was stopped half way, and nobody pointed an alias elsewhere since."""
    aliases = {registry.champion(), registry.alias(PREVIOUS)}
    return journal.get("state") == STARTED and aliases <= {journal["from"], journal["to"]}


def _back(registry: Registry) -> tuple[str, str]:
    """Versions (from, to): champion and previous. Raises RegistryError where there is nothing to go back to."""
    champion, previous = registry.champion(), registry.alias(PREVIOUS)
    if champion is None or previous is None or champion == previous:
        raise RegistryError(
            f"{registry.model}: there is no previous release to go back to (champion {champion}, previous {previous}); "
            "point the alias `previous` at the version that should serve"
        )
    return champion, previous
