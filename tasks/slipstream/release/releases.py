"""The current release, and keeping servers and traffic in line with the registry."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from mlflow import MlflowClient

from slipstream.contract import Artifact, Cell, Release, StepInput
from slipstream.contract.handover import Selection
from slipstream.errors import DataError
from slipstream.home import Home, file_lock
from slipstream.plan import flow
from slipstream.plugins import BUILD, SELECT
from slipstream.release import moves
from slipstream.spec import BASELINE
from slipstream.store.registry import CHALLENGER, CHAMPION, PREVIOUS, Registry
from slipstream.store.tracking import fetch
from slipstream.traffic.base import Routes, TrafficController

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Incumbent:
    """What serves: the champion, or at the first release the unchanged model."""

    version: str | None
    """Registry version; None before the first release."""
    release: Release
    artifact: Artifact


@contextmanager
def traffic_lock(home: Home, model: str, *, wait: bool = True) -> Iterator[None]:
    """Allow one test, rollout or rollback of a model at a time on this machine, by a lock that ends with the process.

    On a cluster Airflow's pool `release` does the same. Both only avoid wasted work: if two run anyway, the token
    (release/moves.py) keeps the older one from writing. Raise Unavailable if the lock is held and `wait` is false.
    """
    busy = f"a test, rollout or rollback of {model} is under way"
    if not wait:
        busy += (
            "; wait for its end, or mark that task as failed in Airflow, which puts the traffic back; then ask again"
        )
    with file_lock(home.work / f"release-{model}.lock", busy, wait=wait):
        yield


def selected(inputs: StepInput) -> Selection:
    """Return the decision of select. Raise DataError."""
    chosen = inputs.output_of(SELECT)
    if chosen is None:
        raise DataError(
            "IN.json has no output of select, so that there is no challenger; run accuracy validation first"
        )
    return Selection.of(chosen)


def incumbent(registry: Registry, inputs: StepInput, winner: str) -> Incumbent:
    """Return the registry's champion, or the baseline engine of the winner's target. Raise DataError, RegistryError."""
    version = registry.champion()
    if version is not None:
        return Incumbent(version, registry.release(version), registry.artifact(version))
    cell = Cell(recipe=BASELINE, target=flow.cell_of(winner).target)
    built = inputs.output_of(BUILD, cell)
    if built is None or built.artifact is None:
        raise DataError(f"there is no champion yet, and IN.json has no engine of {cell.key} to compare with")
    release = Release(model=registry.model, name=f"{BASELINE}-{built.artifact.sha256[:8]}")
    return Incumbent(None, release, built.artifact)


def serve(controller: TrafficController, who: Incumbent) -> None:
    """Deploy the incumbent and give it all traffic, unless it already has it."""
    controller.deploy(who.release, fetch(who.artifact), who.artifact.sha256)
    routes = Routes(weights={who.release.name: 100})
    if controller.routes(who.release.model) != routes:
        controller.set_routes(who.release.model, routes)


def keep_serving(registry: Registry, controller: TrafficController, who: Incumbent, by: str) -> None:
    """Give the champion all traffic, as a move, if the best engine is already the champion."""
    with moves.begin(registry, controller, "serve", by, who.release.name) as move:
        registry.expect_champion(who.version)
        serve(move.controller, who)
        move.close("done")


def sweep(controller: TrafficController, registry: Registry, *also: Release) -> None:
    """Retire releases that no alias names and that are not in use, including those that no longer answer.

    `previous` stays, so that a rollback is instant.
    """
    versions = {registry.alias(a) for a in (CHAMPION, PREVIOUS, CHALLENGER)} - {None}
    keep = {registry.release(str(v)).name for v in versions} | {r.name for r in also}
    routes = controller.routes(registry.model)
    keep |= set(routes.weights) | {routes.mirror or ""}
    for name in sorted(controller.releases(registry.model) - keep):
        controller.retire(Release(model=registry.model, name=name))
        log.info("traffic: %s %s is retired", registry.model, name)


def drift(model: str, controller: TrafficController, client: MlflowClient | None = None) -> list[str]:
    """Return sentences that say where the champion alias and the real traffic disagree; empty if they agree."""
    registry = Registry(model, client or MlflowClient())
    version, routes = registry.champion(), controller.routes(model)
    releases = {n for n in routes.weights if n.startswith("v")}
    if version is None:
        if releases:
            return [f"{model}: there is no champion, but {_shares(routes.weights)} has traffic"]
        return []
    name = registry.release(version).name
    disagreements = []
    if routes.weights != {name: 100}:
        disagreements.append(
            f"{model}: the champion is version {version}, but the traffic goes to "
            f"{_shares(routes.weights) or 'nobody'}; a test or rollout is under way, or one was killed and its next "
            "run puts this right"
        )
    if name not in controller.deployed(model):
        disagreements.append(f"{model}: the server of the champion, version {version}, is not ready")
    return disagreements


def _shares(weights: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({share} %)" for name, share in sorted(weights.items()))
