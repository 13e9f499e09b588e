"""The watchdog restores the traffic if the process of a test, rollout or rollback has died or hangs.

`look` checks one model once. Call it every INTERVAL_S for each model that has traffic, from a process that outlives the
steps (the trigger server does, on one machine and in the chart): the lease of a killed process expires within
`moves.LEASE_S`, so its traffic is restored within 15 + 5 s and the time of one change of routes.
"""

import logging
import time
from collections.abc import Callable, Iterable

from mlflow import MlflowClient

from slipstream.errors import SlipstreamError, Superseded
from slipstream.release import moves, settle
from slipstream.store.registry import Registry
from slipstream.traffic.base import TrafficController

log = logging.getLogger(__name__)

INTERVAL_S = 5.0


def look(
    model: str, controller: Callable[[], TrafficController], registry: Registry, now: float | None = None
) -> str | None:
    """Complete or revert what a dead process left; return what was done, as a sentence, or None if nothing was.

    `now` is seconds since the epoch. Any number of watchdogs may run at once, and a live owner is safe: the newest
    token owns the traffic, and an owner whose lease expired stops at its next write. `controller` is called only if
    there is something to do. Raise Unavailable, and other errors of the completed move.
    """
    entry = moves.newest(registry)
    if entry is None or not entry.open or entry.live(time.time() if now is None else now):
        return None
    try:
        settle.finish(registry, controller(), entry)
    except Superseded:
        return None
    latest = moves.newest(registry)
    state = latest.state if latest is not None else "unknown"
    sentence = f"{model}: the {entry.kind} by {entry.by} stopped renewing its lease ({entry.state}); it is {state} now"
    log.warning("watchdog: %s", sentence)
    return sentence


def look_at_all(
    models: Iterable[str], controller: Callable[[], TrafficController], client: MlflowClient
) -> dict[str, str]:
    """Check each model once; return sentences for those where something was done. An error at one stops no other."""
    sentences = {}
    for model in models:
        try:
            if (sentence := look(model, controller, Registry(model, client))) is not None:
                sentences[model] = sentence
        except SlipstreamError as error:
            log.warning("watchdog: %s: %s", model, error)
    return sentences
