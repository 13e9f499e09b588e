"""Finds promotions missed by a lost webhook, and reports where a champion and its traffic disagree."""

import logging
import threading
from collections.abc import Callable

from mlflow import MlflowClient

from slipstream.errors import SlipstreamError
from slipstream.home import Home
from slipstream.orchestrate.triggers import promotion
from slipstream.plan import catalog
from slipstream.release import releases
from slipstream.spec import Spec
from slipstream.traffic.base import TrafficController

log = logging.getLogger(__name__)

INTERVAL_S = 30


def reconcile(home: Home, client: MlflowClient, airflow: promotion.Runs) -> list[str]:
    """Start every missing run; return the names of the specs that got one. An error at one spec does not stop the
    others."""
    started = []
    for name, spec in catalog.published(home):
        if not isinstance(spec, Spec):
            continue
        try:
            version = promotion.promoted_version(client, spec.model.name, spec.model.alias)
            if version is not None and promotion.start(airflow, spec, version):
                started.append(name)
        except SlipstreamError as error:
            log.warning("%s: not reconciled, next try in %d s: %s", name, INTERVAL_S, error)
        except Exception:
            log.exception("%s: not reconciled, next try in %d s", name, INTERVAL_S)
    return started


def models(home: Home) -> list[str]:
    """Return the registered models of published specs."""
    return sorted({spec.model.name for _, spec in catalog.published(home) if isinstance(spec, Spec)})


def report_drift(home: Home, client: MlflowClient, traffic: TrafficController) -> list[str]:
    """Log where alias and real traffic of a published model disagree, as they do during a rollout.

    This is only reported: unfinished moves are completed or reverted by the watchdog (release/watchdog.py).
    """
    sentences = []
    for model in models(home):
        try:
            sentences += releases.drift(model, traffic, client)
        except SlipstreamError as error:
            log.warning("%s: traffic not compared with the registry: %s", model, error)
    for sentence in sentences:
        log.warning("drift: %s", sentence)
    return sentences


def keep_reconciling(once: Callable[[], object], stop: threading.Event, interval_s: float = INTERVAL_S) -> None:
    """Call `once` now and every `interval_s` until `stop` is set; no exception ends the loop."""
    while True:
        try:
            once()
        except Exception:
            # The loop is the safety net: the next round must run after any error.
            log.exception("reconciling failed, next try in %.0f s", interval_s)
        if stop.wait(interval_s):
            return
