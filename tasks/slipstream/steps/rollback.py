"""rollback: the last good release serves again. The traffic moves first, the aliases after.

The replaced release is rejected by its digest (release/rejections.py): no later run releases it, no later rollback
returns to it. A repeated request, by any user, changes nothing and says so; to replace the release that the rollback
restored as well, name it (`--from VERSION`, or the form's field).
"""

import getpass
import logging

from mlflow import MlflowClient

from slipstream import traffic
from slipstream.contract import Json, StepInput, StepOutput
from slipstream.contract.handover import RolledBack
from slipstream.errors import RegistryError, Superseded, Unavailable
from slipstream.home import Home
from slipstream.release import moves, settle
from slipstream.release.releases import traffic_lock
from slipstream.reports.find import connect
from slipstream.runner.context import Context
from slipstream.spec import Spec
from slipstream.store.registry import PREVIOUS, Registry
from slipstream.traffic.base import TrafficController
from slipstream.traffic.termination import sigterm_as_exit

log = logging.getLogger(__name__)

ATTEMPTS = 5
"""Two requests at the same moment supersede each other at most this often."""


def settings(spec: Spec, inputs: StepInput) -> Json:
    """Return what determines the result."""
    return {"model": spec.model.name, "run": inputs.run_key}


def run(context: Context) -> StepOutput:
    """Restore the last good release. Raise RegistryError if there is none."""
    model, inputs = context.spec.model.name, context.inputs
    with traffic_lock(context.home, model):
        controller = traffic.controller(context.home)
        details = rollback(model, controller, context.tracking.client, inputs.run_key, leave=inputs.params.get("from"))
    return context.output(details=details)


def by_hand(model: str, home: Home, *, leave: str | None = None, reason: str = "") -> RolledBack:
    """Run `slipstream rollback MODEL`, with MLflow and Envoy of the platform in `home`.

    It waits for another rollback, but not for a test or rollout, whose end may change the release to replace:
    Unavailable.
    """
    client = connect(home)
    running = moves.newest(Registry(model, client))
    wait = running is not None and running.open and running.kind == "rollback"
    with traffic_lock(home, model, wait=wait):
        return rollback(model, traffic.controller(home), client, getpass.getuser(), leave=leave, reason=reason)


def rollback(
    model: str,
    controller: TrafficController,
    client: MlflowClient,
    by: str,
    *,
    leave: str | None = None,
    reason: str = "",
) -> RolledBack:
    """Restore the last good release, and return what the aliases name now.

    `by` names the requester: a pipeline run's key, or a person. `leave` is the version to replace; by default it is the
    champion, unless the last rollback restored it. Raise RegistryError if there is nothing to return to, Unavailable.
    """
    registry = Registry(model, client)
    with sigterm_as_exit():
        for _ in range(ATTEMPTS):
            try:
                settle.settle(registry, lambda: controller, preempt=("trial", "rollout", "rebuild", "serve"))
                if (details := _done_before(registry, leave)) is not None:
                    return details
                return _begun(registry, controller, by, reason)
            except Superseded as error:
                log.info("rollback: %s", error)
    raise Unavailable(f"{model}: other rollbacks went on at the same time; look at what serves, and ask again")


def _begun(registry: Registry, controller: TrafficController, by: str, reason: str) -> RolledBack:
    source = registry.champion()
    target = settle.rollback_target(registry, source) if source is not None else None
    if source is None or target is None:
        raise RegistryError(
            f"{registry.model}: there is no previous release to go back to (champion {source}, previous "
            f"{registry.alias(PREVIOUS)}); point the alias `previous` at the version that should serve. Releases that "
            "were rejected are no target: `slipstream rejections` lists them"
        )
    after = settle.rollback_target(registry, target, settle.digest_of(registry, source) or "")
    facts = {"to": target, "then_previous": after, "reason": reason}
    with moves.begin(registry, controller, "rollback", by, registry.release(source).name, **facts) as move:
        if move.entry.champion != source:
            move.close("given up")
            raise Superseded(f"{registry.model}@champion moved from version {source} just now")
        settle.finish_rollback(move)
    return RolledBack(champion=target, previous=after, left=source)


def _done_before(registry: Registry, leave: str | None) -> RolledBack | None:
    """Return the details for a request with nothing to do."""
    champion, last = registry.champion(), moves.last_change(registry)
    if champion is None or leave == champion:
        return None
    rolled_back = last is not None and last.kind == "rollback" and last.to == champion
    if leave is None and not rolled_back:
        return None
    sentence = f"version {leave} does not serve"
    if last is not None and rolled_back and leave in (None, last.champion):
        sentence = f"{last.by} rolled version {last.champion} back at {last.at}"
    return RolledBack(champion=champion, previous=registry.alias(PREVIOUS), left=leave, done=sentence)
