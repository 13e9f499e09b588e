import socket
import threading
from pathlib import Path

import pytest
from mlflow import MlflowClient
from tests.steps.stages import FAIL, PASS, World

from slipstream.contract import Release
from slipstream.errors import RegistryError, Unavailable
from slipstream.release.releases import drift
from slipstream.store.registry import Registry
from slipstream.traffic.base import Routes
from slipstream.traffic.fake import FakeController


def test_a_missing_alias_and_a_missing_model_are_none(world: World) -> None:
    assert Registry("no-such-model", MlflowClient()).champion() is None
    world.version("int8")
    assert world.registry.champion() is None
    assert Registry("no-such-model", MlflowClient()).model_tags() == {}


def test_aliases_move_and_go(world: World) -> None:
    a, b = world.version("a"), world.version("b")
    for version in (a, b, b, None, None):
        world.registry.set_alias("champion", version)
        assert world.registry.champion() == version


def test_registering_twice_gives_one_version_and_another_run_another(world: World) -> None:
    artifact, registry = world.engine("int8"), world.registry
    first = registry.register(artifact, "int8@server", "run-1", (PASS, FAIL))
    assert registry.register(artifact, "int8@server", "run-1", (PASS,)) == first
    assert registry.register(artifact, "int8@server", "run-2", (PASS,)) != first
    tags = registry.tags(first)
    assert tags["slipstream.kind"] == "engine"
    assert tags["slipstream.cell"] == "int8@server"
    assert registry.artifact(first) == artifact
    found = MlflowClient().get_model_version(world.model, first)
    assert found.source == f"models:/{artifact.model_id}"


def test_an_engine_that_is_no_logged_model_is_refused(world: World) -> None:
    loose = world.engine("int8").model_copy(update={"model_id": None})
    with pytest.raises(RegistryError, match="not a logged model"):
        world.registry.register(loose, "int8@server", "run-1", ())


def test_a_version_of_somebody_else_is_no_engine(world: World) -> None:
    world.version("int8")
    model_id = world.engine("int8").model_id
    theirs = MlflowClient().create_model_version(world.model, f"models:/{model_id}", model_id=model_id)
    with pytest.raises(RegistryError, match="not an engine that slipstream registered"):
        world.registry.artifact(str(theirs.version))


def test_what_a_version_deploys_cannot_be_changed_in_the_registry(world: World) -> None:
    registry, client = world.registry, MlflowClient()
    honest, other = world.version("int8"), world.version("other")
    theirs, ours = registry.tags(other), registry.artifact(honest)
    changed = ours.model_copy(update={"sha256": "0" * 64})
    cases: list[tuple[dict[str, str], str]] = [
        ({"slipstream.artifact": changed.model_dump_json()}, "changed after slipstream wrote it"),
        ({"slipstream.artifact": "not JSON"}, "changed after slipstream wrote it"),
        ({"slipstream.artifact": theirs["slipstream.artifact"]}, "changed after slipstream wrote it"),
        ({"slipstream.artifact_signature": ""}, "not signed"),
    ]
    genuine = registry.tags(honest)
    for tags, how in cases:
        registry.tag(honest, genuine | tags)
        with pytest.raises(RegistryError, match=f"version {honest}: tag slipstream.artifact is {how}.*security.md"):
            registry.artifact(honest)
    assert registry.sign(honest) == registry.artifact(honest) == ours  # a person vouches for it
    registry.tag(honest, genuine)
    assert registry.artifact(honest) == ours
    elsewhere = Registry(f"{world.model}-elsewhere", client)  # the same tags, on a version of another model
    elsewhere.ensure_model()
    copied = client.create_model_version(
        elsewhere.model, f"models:/{ours.model_id}", tags=genuine, model_id=ours.model_id
    )
    with pytest.raises(RegistryError, match="is changed after slipstream wrote it"):
        elsewhere.artifact(str(copied.version))


def test_a_champion_that_moved_stops_the_rollout(world: World) -> None:
    a, b = world.version("a"), world.version("b")
    world.registry.expect_champion(None)
    world.registry.set_alias("champion", a)
    world.registry.expect_champion(a)
    for expected in (b, None):
        with pytest.raises(RegistryError, match=f"champion is version {a}, but the gates compared with"):
            world.registry.expect_champion(expected)


def test_an_outage_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        client = MlflowClient(f"http://127.0.0.1:{closed.getsockname()[1]}")
        with pytest.raises(Unavailable, match="reading net@champion"):
            Registry("net", client).champion()


def test_an_answer_of_503_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(
                    b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
                )

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        with pytest.raises(Unavailable):
            Registry("net", MlflowClient(f"http://127.0.0.1:{server.getsockname()[1]}")).champion()
        thread.join(5)


def test_tags_of_the_model_come_and_go(world: World) -> None:
    world.version("int8")
    world.registry.tag_model("slipstream.test", "1")
    assert world.registry.model_tags() == {"slipstream.test": "1"}
    for _ in range(2):
        world.registry.untag_model("slipstream.test")
        assert world.registry.model_tags() == {}


def test_drift_says_where_alias_and_traffic_disagree(world: World, fake: FakeController, tmp_path: Path) -> None:
    model, registry = world.model, world.registry
    assert drift(model, fake) == []
    a, b = world.version("a"), world.version("b")
    for version in (a, b):
        fake.deploy(registry.release(version), tmp_path / version)
    fake.deploy(Release(model=model, name="baseline-12345678"), tmp_path / "base")
    fake.set_routes(model, Routes(weights={"baseline-12345678": 100}))
    assert drift(model, fake) == []  # before the first release
    fake.set_routes(model, Routes(weights={f"v{a}": 100}))
    assert ["there is no champion" in s for s in drift(model, fake)] == [True]
    registry.set_alias("champion", a)
    assert drift(model, fake) == []
    fake.set_routes(model, Routes(weights={f"v{a}": 75, f"v{b}": 25}))
    [sentence] = drift(model, fake)
    assert f"the champion is version {a}, but the traffic goes to v{a} (75 %), v{b} (25 %)" in sentence
    registry.set_alias("champion", b)
    fake.set_routes(model, Routes(weights={f"v{a}": 100}))
    fake.retire(registry.release(b))
    assert len(drift(model, fake)) == 2
