"""rebuild: replaces a release whose engine can no longer be loaded here by one that can, without an outage.

The engine is built again from the same candidate, must reproduce the old one's recorded answers, and is registered as a
new version that names the old one. Its server is ready before alias and traffic move. A rebuild that was stopped before
that changes nothing and must be requested again; one that was stopped afterwards is completed when the move is settled.

The held-out samples are not evaluated: stage 1 judged this candidate on them, and evidence is measured once.
"""

import datetime
import getpass
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Run

from slipstream import traffic
from slipstream.contract import Artifact, Verdict
from slipstream.contract.ask import Unanswered, ask
from slipstream.engines.base import EngineManifest, read_manifest, server_environment
from slipstream.errors import EngineError, GateFailed, RegistryError, Unavailable
from slipstream.frameworks.base import read_manifest as read_candidate
from slipstream.home import Home
from slipstream.plugins import ENGINES, FRAMEWORKS
from slipstream.release import moves
from slipstream.release.rebuilt import Finding, Request, Work
from slipstream.release.releases import sweep, traffic_lock
from slipstream.release.settle import settle
from slipstream.reports.find import connect
from slipstream.store.registry import CHAMPION, PIPELINE_RUN, PREVIOUS, REBUILT_FROM, Registry, translated, verdict_tags
from slipstream.store.tracking import CELL, STEP, experiment_name, fetch
from slipstream.traffic.base import Routes, TrafficController

log = logging.getLogger(__name__)

WITHIN_S = 3600
"""A build of a large engine takes minutes."""


def by_hand(model: str, home: Home, alias: str = CHAMPION, *, dry_run: bool = False) -> str:
    """Run `slipstream rebuild MODEL`; return a sentence that says what it did, or would do.

    Raise RegistryError, EngineError, ModelError, GateFailed if the rebuilt engine answers differently; Unavailable,
    also while a test, rollout or rollback is in flight.
    """
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    with traffic_lock(home, model, wait=False):
        client = connect(home)
        rebuild = Rebuild(Registry(model, client), client, home, alias, f"{getpass.getuser()} at {now}")
        return rebuild.run(lambda: traffic.controller(home), dry_run=dry_run)


@dataclass(frozen=True)
class Rebuild:
    """A release that is checked and, if its engine cannot be loaded here, rebuilt."""

    registry: Registry
    client: MlflowClient
    home: Home
    alias: str
    by: str
    """Person who requested it."""

    def run(self, controller: Callable[[], TrafficController], *, dry_run: bool = False) -> str:
        """Run all of it; return a sentence. `controller` is called only if there is traffic to move."""
        model, version = self.registry.model, self.registry.alias(self.alias)
        if version is None:
            raise RegistryError(f"{model}: no version has the alias {self.alias}; there is nothing to rebuild")
        if not dry_run:
            settle(self.registry, controller)
            version = self.registry.alias(self.alias) or version
        old = _Old(version, self.registry.artifact(version))
        problem = _ask(self.home, server_environment(old.folder), Work(action="load", folder=old.folder)).problem
        if not problem:
            return f"{model}: version {version} ({self.alias}) loads here; there is nothing to rebuild"
        candidate = self._candidate(old)
        log.warning("%s: version %s (%s) cannot be loaded here: %s", model, version, self.alias, problem)
        if dry_run:
            return (
                f"{model}: would build {old.manifest.engine} again from candidate {candidate.sha256[:12]}, compare it "
                f"with the recorded answers of version {version}, and make it the {self.alias}; nothing was changed"
            )
        rebuilt, reason = self._new_version(old, candidate)
        self._put_in_place(controller(), version, rebuilt)
        now = "serves" if self.alias == CHAMPION else f"is {self.alias}"
        return f"{model}: version {rebuilt} {now}, rebuilt from the candidate of version {version}: {reason}"

    def _candidate(self, old: "_Old") -> Artifact:
        """Return the candidate; its digest is the one in the engine's own folder, which is signed."""
        with translated(f"reading the lineage of version {old.version}"):
            try:
                parent = self.client.get_logged_model(str(old.artifact.model_id)).tags["slipstream.parent"]
                logged = self.client.get_logged_model(parent)
            except KeyError as error:
                raise RegistryError(
                    f"{self.registry.model} version {old.version} does not say which candidate it was built from; "
                    "release the model with a new run of its spec"
                ) from error
        path = f"data/{logged.tags.get('slipstream.kind', 'candidate')}"
        uri, sha256 = str(logged.artifact_location), old.manifest.candidate_sha256
        return Artifact(uri=uri, path=path, sha256=sha256, size_bytes=0, model_id=parent)

    def _new_version(self, old: "_Old", candidate: Artifact) -> tuple[str, str]:
        """Return the version of the rebuilt engine, and why it may serve. Raise EngineError, GateFailed."""
        tags, work = self.registry.tags(old.version), self.home.work / f"rebuild-{self.registry.model}"
        cell = tags.get(CELL, "rebuilt")
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        with self._mlflow_run(old, cell) as run:
            request = Request(
                engine=old.folder,
                candidate=fetch(candidate),
                folder=work / "engine",
                cell=cell,
                parent=str(candidate.model_id),
                run_id=run.info.run_id,
                experiment_id=run.info.experiment_id,
            )
            verdict = self._build(old, request)
            logged = _ask(self.home, _builds(old, request.candidate), Work(action="log", request=request))
            if logged.artifact is None:
                raise Unavailable(f"{self.registry.model}: the rebuilt engine cannot be logged: {logged.problem}")
        version = self.registry.register(logged.artifact, cell, tags.get(PIPELINE_RUN, run.info.run_id), ())
        audit = {REBUILT_FROM: old.version, "slipstream.rebuilt_by": self.by, **verdict_tags("rebuild", (verdict,))}
        self.registry.tag(version, audit)
        shutil.rmtree(work, ignore_errors=True)
        return version, verdict.reason

    def _build(self, old: "_Old", request: Request) -> Verdict:
        """Build the engine, and verify that it answers as before and can be loaded where it will be served."""
        name, builds = f"{self.registry.model} version {old.version}", _builds(old, request.candidate)
        finding = _ask(self.home, builds, Work(action="build", request=request))
        if finding.problem:
            raise EngineError(f"{name} cannot be rebuilt: {finding.problem}")
        verdict = finding.verdict
        assert verdict is not None, "without a problem there is a verdict"
        if not verdict.passed:
            raise GateFailed(
                f"{name}: {verdict.reason}; nothing was changed. Release the model with a new run of its spec, which "
                "judges it on the held-out samples"
            )
        serves = server_environment(request.folder)
        if problem := _ask(self.home, serves, Work(action="load", folder=request.folder)).problem:
            raise EngineError(
                f"{name}: the engine was built again in the environment {builds}, and the servers' environment "
                f"{serves} cannot load it either: {problem}; nothing was changed. Install the same libraries in both: "
                "`make setup`"
            )
        return verdict

    @contextmanager
    def _mlflow_run(self, old: "_Old", cell: str) -> Iterator[Run]:
        """Open a run in the model's experiment, which ends with the status of the block."""
        with translated(f"starting a run for {self.registry.model}"):
            experiment = self.client.get_experiment_by_name(experiment_name(self.registry.model))
            assert experiment is not None, "its engines were logged there"
            labels = {STEP: "rebuild", CELL: cell, REBUILT_FROM: old.version, "slipstream.by": self.by}
            run = self.client.create_run(experiment.experiment_id, tags=labels, run_name=f"rebuild {cell}")
        status = "FAILED"
        try:
            yield run
            status = "FINISHED"
        finally:
            self.client.update_run(run.info.run_id, status=status)  # set_terminated prints on stdout

    def _put_in_place(self, controller: TrafficController, old: str, version: str) -> None:
        """Deploy, move the alias, then the traffic if it is the champion, as a separate move."""
        registry, release, artifact = self.registry, self.registry.release(version), self.registry.artifact(version)
        settle(registry, lambda: controller)
        serves, previous = self.alias == CHAMPION, registry.alias(PREVIOUS)
        kind: moves.Kind = "rebuild" if serves else "serve"
        facts = {"to": version, "then_previous": previous} if serves else {}
        back = registry.release(registry.champion() or version).name
        with moves.begin(registry, controller, kind, self.by, back, **facts) as move:
            move.controller.deploy(release, fetch(artifact), artifact.sha256)
            if registry.alias(self.alias) != old:
                move.close("given up")
                raise RegistryError(
                    f"{registry.model}@{self.alias} was moved while version {old} was rebuilt; version {version} is "
                    "registered, and neither alias nor traffic was changed"
                )
            if serves:
                # The alias first, unlike in a rollout: from then on a killed rebuild is completed (release/settle.py),
                # and the traffic never returns to a server that may not start again.
                move.update(state="promoting")
                move.set_alias(CHAMPION, version)
                move.controller.set_routes(registry.model, Routes(weights={release.name: 100}))
            else:
                move.set_alias(self.alias, version)
                move.update(previous=version)
            move.close("done")
            sweep(move.controller, registry)


@dataclass(frozen=True)
class _Old:
    """The release that cannot be loaded."""

    version: str
    artifact: Artifact

    @cached_property
    def folder(self) -> Path:
        return fetch(self.artifact)

    @cached_property
    def manifest(self) -> EngineManifest:
        return read_manifest(self.folder)


def _builds(old: _Old, candidate: Path) -> str:
    """Return the environment that builds the engine."""
    return ENGINES[old.manifest.engine].environment or FRAMEWORKS[read_candidate(candidate).framework].environment


def _ask(home: Home, environment: str, work: Work) -> Finding:
    """Return what `release.rebuilt` finds in an environment; in this one if there are no others (an image)."""
    python = home.require_python(environment, "rebuild") if home.envs.is_dir() else Path(sys.executable)
    try:
        return ask("slipstream.release.rebuilt", work, Finding, python=python, timeout_s=WITHIN_S, quiet=False)
    except (subprocess.TimeoutExpired, Unanswered) as error:
        raise Unavailable(f"rebuild: {work.action} ended without an answer: {error}") from error
