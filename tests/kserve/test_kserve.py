"""KServe's rules: the contract, and what only it can show. The stand-in plays KServe; the API is spoken over HTTP."""

import copy
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.kserve.api_server import ApiServer
from tests.kserve.conftest import NAMESPACE, USER, made
from tests.kserve.kserve_stand_in import KServeStandIn
from tests.traffic.conftest import TOY_SERVER
from tests.traffic.contract import A, B, TrafficContract, engine, load, shares

from slipstream.contract import Json, Release
from slipstream.errors import InputError, RegistryError, Unavailable
from slipstream.home import Home
from slipstream.traffic import kserve
from slipstream.traffic.base import Endpoint, Routes, TrafficController
from slipstream.traffic.kserve import KServeController
from slipstream.traffic.kserve_api import ACCESS, PLURAL, Api
from slipstream.traffic.kserve_objects import Service

C = Release(model="net", name="v3")
KIND = (NAMESPACE, PLURAL)


class TestKServe(TrafficContract):
    @pytest.fixture
    def control(self, control: KServeController) -> TrafficController:
        return control


def service(api_server: ApiServer, name: str = "net") -> Service:
    return Service(api_server.get(KIND, name))


def test_a_release_that_is_never_ready_leaves_nothing(
    control: KServeController, api_server: ApiServer, stand_in: KServeStandIn, tmp_path: Path
) -> None:
    broken = engine(tmp_path / "broken" / "engine", broken=True)
    with pytest.raises(Unavailable, match="this engine cannot be loaded"):
        control.deploy(A, broken)
    assert api_server.select(KIND, "")[0] == []
    control.deploy(A, engine(tmp_path / "a" / "engine"))
    with pytest.raises(Unavailable, match="net--v2 is not ready: PredictorConfigurationReady: RevisionFailed"):
        control.deploy(B, broken)
    assert control.deployed("net") == {"v1"}
    assert control.routes("net") == Routes(weights={"v1": 100})
    assert service(api_server).release == "v1"
    assert shares(load(control, 20)) == {"v1": 100}


def test_a_breach_at_100_percent_goes_back_at_once_and_later_releases_are_not_confused(
    control: KServeController, api_server: ApiServer, tmp_path: Path
) -> None:
    for release in (A, B):
        control.deploy(release, engine(tmp_path / release.name / "engine"))
    control.set_routes("net", Routes(weights={"v2": 100}))
    before = service(api_server).status["latestCreatedRevision"]
    control.set_routes("net", Routes(weights={"v1": 100}))
    assert service(api_server).status["latestCreatedRevision"] == before  # no new server had to start
    control.deploy(C, engine(tmp_path / "v3" / "engine"))
    assert control.routes("net") == Routes(weights={"v1": 100})
    control.set_routes("net", Routes(weights={"v1": 60, "v3": 40}))
    assert shares(load(control, 200))["v3"] == pytest.approx(40, abs=14)
    control.set_routes("net", Routes(weights={"v3": 100}))
    control.deploy(A, tmp_path / "v1" / "engine")  # a rollback: v3 serves until v1 is ready again
    assert control.routes("net") == Routes(weights={"v3": 100})
    control.set_routes("net", Routes(weights={"v1": 100}))
    assert shares(load(control, 20)) == {"v1": 100}


def test_nobody_else_answers_while_a_release_comes_and_goes(control: KServeController, tmp_path: Path) -> None:
    control.deploy(A, engine(tmp_path / "v1" / "engine"))
    failures: list[BaseException] = []

    def come_and_go() -> None:
        try:
            control.deploy(B, engine(tmp_path / "v2" / "engine"))
            control.retire(B)
        except BaseException as error:
            failures.append(error)
            raise

    worker = threading.Thread(target=come_and_go)
    worker.start()
    while worker.is_alive():
        sent = load(control, 100, rate=200)
        assert (shares(sent), [r for r in sent.records if r.failed]) == ({"v1": 100}, [])
    assert failures == []


def test_when_kserve_takes_a_deployment_for_a_rollback_the_traffic_is_put_right(
    api_server: ApiServer, tmp_path: Path
) -> None:
    hasty = KServeStandIn(api_server.client("kserve"), NAMESPACE, tmp_path / "s", TOY_SERVER, late_revisions=True)
    try:
        control = made(api_server, hasty.ingress, tmp_path)
        control.deploy(A, engine(tmp_path / "v1" / "engine"))
        control.deploy(B, engine(tmp_path / "v2" / "engine"))
        control.set_routes("net", Routes(weights={"v2": 100}))
        with pytest.raises(Unavailable, match=r"KServe moved the traffic from v2 to \{'v1': 100\}"):
            control.deploy(C, engine(tmp_path / "v3" / "engine"))
        assert control.routes("net") == Routes(weights={"v2": 100})
    finally:
        hasty.close()


def test_a_write_that_loses_is_decided_anew(control: KServeController, api_server: ApiServer, tmp_path: Path) -> None:
    for release in (A, B):
        control.deploy(release, engine(tmp_path / release.name / "engine"))
    api_server.rivals = 3
    control.set_routes("net", Routes(weights={"v1": 75, "v2": 25}))
    assert (api_server.rivals, control.routes("net").weights) == (0, {"v1": 75, "v2": 25})


def test_a_write_that_always_loses_is_given_up(
    control: KServeController, api_server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    control.deploy(A, engine(tmp_path / "v1" / "engine"))
    api_server.rivals = 1000
    monkeypatch.setattr("slipstream.traffic.kserve_api.ATTEMPTS", 3)
    with pytest.raises(Unavailable, match="others wrote it 3 times in a row"):
        control.deploy(B, engine(tmp_path / "v2" / "engine"))
    assert control.routes("net") == Routes(weights={"v1": 100})


class Killed(BaseException):
    """Stands for kill -9."""


class Mortal(Api):
    """Lets `left` writes through, then kills."""

    left = 1000

    def create(self, body: Json) -> Json:
        self._spend()
        return super().create(body)

    def change(self, name: str, mutate: Callable[[Json], Json]) -> Json:
        def counted(body: Json) -> Json:
            before = copy.deepcopy(body)
            wanted = mutate(body)
            if wanted != before:
                self._spend()
            return wanted

        return super().change(name, counted)

    def _spend(self) -> None:
        if self.left == 0:
            raise Killed
        self.left -= 1


def released(control: KServeController, folder: Path) -> None:
    """v2 replaces v1, as a rollout does it. Once it is out, the next attempt finishes."""
    if control.routes("net").weights != {"v2": 100}:
        control.deploy(A, folder / "v1")
        if control.routes("net").weights != {"v1": 100}:
            control.set_routes("net", Routes(weights={"v1": 100}))
        control.deploy(B, folder / "v2")
        control.set_routes("net", Routes(weights={"v1": 50, "v2": 50}))
        control.set_routes("net", Routes(weights={"v2": 100}))


def refused(control: KServeController, folder: Path) -> None:
    """v3 is tried alongside v2 with a share, and removed again."""
    control.deploy(B, folder / "v2")
    control.set_routes("net", Routes(weights={"v2": 100}))
    control.deploy(C, folder / "v3")
    control.set_routes("net", Routes(weights={"v2": 80, "v3": 20}))
    control.set_routes("net", Routes(weights={"v2": 100}))
    control.retire(C)


WRITES = {released: 4, refused: 6}
CRASHES = [(run, writes) for run, last in WRITES.items() for writes in range(1, last + 1)]
"""A run, and the writes before it is killed; after the last one it ends."""


@pytest.mark.parametrize(("run", "writes"), CRASHES, ids=lambda value: getattr(value, "__name__", str(value)))
def test_killed_between_any_two_writes_the_next_process_finishes(
    api_server: ApiServer,
    stand_in: KServeStandIn,
    tmp_path: Path,
    run: Callable[[KServeController, Path], None],
    writes: int,
) -> None:
    for name in ("v1", "v2", "v3"):
        engine(tmp_path / name, name=name)
    victim, heir = (made(api_server, stand_in.ingress, tmp_path) for _ in range(2))
    mortal = victim._api = Mortal(NAMESPACE, api_server.client(USER))
    mortal.left = writes
    if writes < WRITES[run]:
        with pytest.raises(Killed):
            run(victim, tmp_path)
        run(heir, tmp_path)
    else:
        run(victim, tmp_path)
        assert mortal.left == 0
    assert heir.routes("net") == Routes(weights={"v2": 100})
    assert heir.deployed("net") == {"v2"}
    assert (service(api_server).release, service(api_server).percent) == ("v2", 100)


def test_a_mirror_ends_with_its_process(
    control: KServeController, api_server: ApiServer, stand_in: KServeStandIn, tmp_path: Path
) -> None:
    for release in (A, B):
        control.deploy(release, engine(tmp_path / release.name / "engine"))
    control.set_routes("net", Routes(weights={"v1": 100}, mirror="v2"))
    assert control.mirror("net") == Endpoint(stand_in.ingress, f"latest-net-predictor.{NAMESPACE}.example.test")
    assert made(api_server, stand_in.ingress, tmp_path).routes("net") == Routes(weights={"v1": 100})


def test_a_dead_server_shows_as_errors_nobody_answered(
    control: KServeController, stand_in: KServeStandIn, tmp_path: Path
) -> None:
    for release in (A, B):
        control.deploy(release, engine(tmp_path / release.name / "engine"))
    control.set_routes("net", Routes(weights={"v1": 50, "v2": 50}))
    process = stand_in.services["net"].revisions["net-predictor-00002"].process
    assert process is not None
    process.kill()
    failed = [r for r in load(control, 60).records if r.failed]
    assert 10 < len(failed) < 50
    assert {(r.status, r.release) for r in failed} == {(503, None)}
    assert control.observe(B).memory_mib == 0
    assert control.deployed("net") == {"v1"}


def test_modes_without_a_canary_are_refused(api_server: ApiServer, tmp_path: Path) -> None:
    plain = KServeStandIn(api_server.client("kserve"), NAMESPACE, tmp_path / "s", TOY_SERVER, mode="Standard")
    try:
        with pytest.raises(InputError, match="deployment mode Standard has no canary"):
            made(api_server, plain.ingress, tmp_path).deploy(A, engine(tmp_path / "v1" / "engine"))
        assert api_server.select(KIND, "")[0] == []
    finally:
        plain.close()


def test_somebody_elses_service_is_left_alone(control: KServeController, api_server: ApiServer, tmp_path: Path) -> None:
    deadline = time.monotonic() + 30
    theirs = {"modelFormat": {"name": "sklearn"}, "storageUri": "s3://theirs/model"}
    api_server.create(KIND, {"metadata": {"name": "net"}, "spec": {"predictor": {"model": theirs}}})
    while "status" not in api_server.get(KIND, "net"):  # KServe sees it too
        assert time.monotonic() < deadline
        time.sleep(0.02)
    with pytest.raises(InputError, match="is not slipstream's"):
        control.deploy(A, engine(tmp_path / "v1" / "engine"))
    assert "slipstream" not in str(api_server.get(KIND, "net"))


def test_it_calls_exactly_what_the_role_grants(
    control: KServeController, api_server: ApiServer, tmp_path: Path
) -> None:
    with pytest.raises(Unavailable):
        control.deploy(A, engine(tmp_path / "broken" / "engine", broken=True))
    control.deploy(A, engine(tmp_path / "v1" / "engine"))
    control.deploy(B, engine(tmp_path / "v2" / "engine"))
    control.observe(B)
    control.deployed("net")
    called = {(verb, resource) for user, verb, resource in api_server.calls if user == USER}
    assert called == {(verb, resource) for _, resource, verbs in ACCESS for verb in verbs}
    api_server.forbidden.add((USER, "update", PLURAL))
    with pytest.raises(InputError, match=r'writing net: not allowed: User "release" cannot update'):
        control.set_routes("net", Routes(weights={"v2": 100}))


def test_without_an_ingress_the_services_own_address_is_used(
    api_server: ApiServer, stand_in: KServeStandIn, tmp_path: Path
) -> None:
    control = made(api_server, None, tmp_path)
    control.deploy(A, engine(tmp_path / "v1" / "engine"))
    assert control.endpoint("net") == Endpoint(f"http://net.{NAMESPACE}.example.test")


def test_a_cluster_that_does_not_answer_is_unavailable(api_server: ApiServer, tmp_path: Path) -> None:
    control = made(api_server, None, tmp_path)
    api_server.close()
    with pytest.raises(Unavailable, match="Kubernetes API, namespace models: reading net: no answer"):
        control.routes("net")


def test_the_traffic_of_a_model_cannot_be_nobodys(control: KServeController) -> None:
    with pytest.raises(RegistryError, match="always routes to a release"):
        control.set_routes("net", Routes(weights={}))


def test_the_environment_must_say_where_engines_go(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLIPSTREAM_RELEASES", raising=False)
    with pytest.raises(InputError, match="SLIPSTREAM_RELEASES"):
        kserve.controller(Home.from_environment())
    monkeypatch.setenv("SLIPSTREAM_RELEASES", "s3://bucket/releases")
    monkeypatch.setenv("KUBECONFIG", str(home / "none"))
    with pytest.raises(InputError, match="set KUBECONFIG, or run in a pod"):
        kserve.controller(Home.from_environment())
