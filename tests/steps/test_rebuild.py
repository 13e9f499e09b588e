"""A champion that cannot be loaded here is built again from its candidate and put back, or nothing changes.

The engines, MLflow and the processes that load and build are real; the traffic is the fake's.
"""

import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from tests.engines.candidates import network, write
from tests.engines.contract import change_facts, edit_manifest
from tests.engines.images import samples
from tests.steps.pipeline import logged, small_spec
from tests.steps.stages import failing

from slipstream import digests
from slipstream.contract import Artifact, Release, Verdict
from slipstream.engines import recorded
from slipstream.engines.base import build_engine, load_engine, read_manifest, record_answers
from slipstream.errors import EngineError, GateFailed, ModelError, RegistryError
from slipstream.home import Home
from slipstream.release.rebuild import Rebuild
from slipstream.spec import Spec, Target
from slipstream.store.registry import CHAMPION, PREVIOUS, REBUILT_FROM, Registry
from slipstream.store.signature import signature
from slipstream.store.tracking import Tracking, fetch
from slipstream.traffic.base import Routes
from slipstream.traffic.fake import FakeController

TARGET = Target(engine="onnxruntime", threads=1)
PASS = Verdict(gate="accuracy", answer="pass", reason="drop 0.1 points, at most 0.4", n=1000)


@pytest.fixture(scope="module")
def candidate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("made") / "candidate", network())


@dataclass
class Scene:
    """A registered model whose champion has the traffic."""

    spec: Spec
    candidate: Path
    folder: Path
    fake: FakeController
    parent: str = ""

    @property
    def registry(self) -> Registry:
        return Registry(self.spec.model.name, Tracking(self.spec).client)

    def engine(self, change: Callable[[Path], None] = lambda engine: None) -> Artifact:
        """An engine of the candidate, changed after it was built, in MLflow."""
        folder = self.folder / uuid.uuid4().hex / "engine"
        manifest = build_engine(self.candidate, TARGET, folder)
        record_answers(folder, load_engine(folder), samples(5))
        change(folder)
        if not self.parent:
            artifact = logged(self.spec, self.candidate).artifact
            assert artifact is not None
            self.parent = str(artifact.model_id)
        run = Tracking(self.spec).start("run-1", "build", None, uuid.uuid4().hex)
        shapes = signature(manifest.input_shape, manifest.input_dtype, manifest.output_shape)
        return run.log_model(folder, "fp32@server", shapes, parents=[self.parent])

    def champion(self, change: Callable[[Path], None]) -> str:
        """Its version; deployed, with all traffic."""
        version = self.registry.register(self.engine(change), "fp32@server", "run-1", (PASS,))
        self.registry.set_alias(CHAMPION, version)
        release = self.registry.release(version)
        self.fake.deploy(release, fetch(self.registry.artifact(version)))
        self.fake.set_routes(release.model, Routes(weights={release.name: 100}))
        return version

    def rebuild(self, alias: str = CHAMPION, *, dry_run: bool = False) -> str:
        request = Rebuild(self.registry, Tracking(self.spec).client, Home.from_environment(), alias, "a person")
        return request.run(lambda: self.fake, dry_run=dry_run)

    def requires(self, champion: str, *, previous: str | None = None) -> None:
        """Aliases and traffic."""
        assert (self.registry.champion(), self.registry.alias(PREVIOUS)) == (champion, previous)
        assert self.fake.routes(self.spec.model.name) == Routes(weights={f"v{champion}": 100})


@pytest.fixture
def scene(mlflow_server: str, home: Path, tmp_path: Path, candidate: Path, fake: FakeController) -> Scene:
    spec = small_spec(tmp_path / "data", f"rebuilt-{uuid.uuid4().hex[:8]}")
    return Scene(spec, candidate, tmp_path, fake)


def later(engine: Path) -> None:
    """As if it had been built with a later ONNX Runtime than is here."""
    change_facts(engine, onnxruntime="1.999.0")


def other_answers(engine: Path) -> None:
    """And as if it had answered otherwise there."""
    later(engine)
    stored, answers = recorded.read(engine)
    np.savez(engine / recorded.FILE, samples=stored, answers=2 * answers)
    edit_manifest(engine, files=read_manifest(engine).files | {recorded.FILE: digests.file(engine / recorded.FILE)})


def test_a_champion_that_cannot_be_loaded_is_rebuilt_and_serves(scene: Scene) -> None:
    old = scene.champion(later)
    assert "nothing was changed" in scene.rebuild(dry_run=True)
    scene.requires(old)

    said = scene.rebuild()
    new = str(scene.registry.champion())
    assert f"version {new} serves, rebuilt from the candidate of version {old}" in said
    assert "answers to 5 samples" in said
    scene.requires(new)
    assert new != old and scene.fake.releases(scene.spec.model.name) == {f"v{new}"}
    tags = scene.registry.tags(new)
    assert tags[REBUILT_FROM] == old and tags["slipstream.rebuilt_by"] == "a person"
    assert tags["slipstream.rebuild.recorded answers"].startswith("pass: ")
    engine = fetch(scene.registry.artifact(new))
    load_engine(engine)
    assert read_manifest(engine).candidate_sha256 == digests.folder(scene.candidate)
    assert (
        scene.rebuild() == f"{scene.spec.model.name}: version {new} (champion) loads here; there is nothing to rebuild"
    )


def test_the_new_release_is_ready_before_anything_moves_and_a_killed_rebuild_is_finished(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = scene.champion(later)
    writes: list[str] = []
    deploy = scene.fake.deploy

    def watched_deploy(release: Release, engine: Path, sha256: str | None = None) -> None:
        writes.append(f"deploy {release.name} while version {scene.registry.champion()} is the champion")
        deploy(release, engine, sha256)

    def killed(model: str, routes: Routes) -> None:
        writes.append(f"routes {routes.weights}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(scene.fake, "deploy", watched_deploy)
        patched.setattr(scene.fake, "set_routes", killed)
        scene.rebuild()
    [new] = scene.fake.releases(scene.spec.model.name) - {f"v{old}"}
    assert writes == [f"deploy {new} while version {old} is the champion", f"routes {{'{new}': 100}}"]
    assert scene.fake.routes(scene.spec.model.name).weights == {f"v{old}": 100}

    assert "there is nothing to rebuild" in scene.rebuild()
    scene.requires(new.removeprefix("v"))


def test_a_rebuilt_engine_that_answers_otherwise_is_refused_and_nothing_changes(scene: Scene) -> None:
    old = scene.champion(other_answers)
    said = failing(scene.rebuild, GateFailed)
    assert "the rebuilt engine differs by up to" in said and "nothing was changed" in said
    scene.requires(old)
    assert scene.fake.releases(scene.spec.model.name) == {f"v{old}"}


def test_a_candidate_that_is_not_the_one_it_was_built_from_is_refused(scene: Scene) -> None:
    old = scene.champion(lambda engine: (later(engine), edit_manifest(engine, candidate_sha256="0" * 64))[0])
    assert "sha256" in failing(scene.rebuild, ModelError)
    scene.requires(old)


def test_what_the_servers_cannot_load_either_is_neither_registered_nor_deployed(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the servers' environment was changed: the same engine is built again, and would be refused again."""
    changed = tmp_path / "changed"
    (changed / "onnxruntime-1.0.0.dist-info").mkdir(parents=True)
    (changed / "onnxruntime-1.0.0.dist-info" / "METADATA").write_text("Name: onnxruntime\nVersion: 1.0.0\n")
    for name, path in (("torch", ""), ("serve", f"PYTHONPATH={changed} ")):
        python = tmp_path / "envs" / name / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(f'#!/bin/sh\n{path}exec {sys.executable} "$@"\n')
        python.chmod(0o755)
    monkeypatch.setenv("SLIPSTREAM_ENVS", str(tmp_path / "envs"))
    old = scene.champion(lambda engine: None)
    message = failing(scene.rebuild, EngineError)
    for part in ("environment serve cannot load it either", "'1.0.0'", "nothing was changed"):
        assert part in message
    scene.requires(old)
    assert scene.registry.versions_of(scene.registry.artifact(old).sha256) == [old]


def test_previous_is_rebuilt_without_touching_the_champion(scene: Scene) -> None:
    old = scene.registry.register(scene.engine(later), "fp32@server", "run-0", (PASS,))
    scene.registry.set_alias(PREVIOUS, old)
    champion = scene.champion(lambda engine: None)
    assert "is previous, rebuilt from the candidate" in scene.rebuild(PREVIOUS)
    rebuilt = scene.registry.alias(PREVIOUS)
    assert rebuilt not in (old, champion)
    scene.requires(champion, previous=rebuilt)


def test_without_a_release_there_is_nothing_to_rebuild(scene: Scene) -> None:
    assert "no version has the alias champion" in failing(scene.rebuild, RegistryError)
