"""A release whose server is dead or frozen: the fallback answers, and the guardrails see whose failure it was."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.traffic.contract import A, B, engine, load, shares

from slipstream.contract import Release
from slipstream.home import Home
from slipstream.platform import health, supervisor
from slipstream.platform.addresses import Addresses
from slipstream.traffic import envoy_config
from slipstream.traffic.base import Routes
from slipstream.traffic.envoy import EnvoyController
from slipstream.traffic.envoy_admin import Admin
from slipstream.traffic.load import Sent

C = Release(model="net", name="v3")
NOWHERE = "http://127.0.0.1:1"
NOTHING_ELSE = Addresses(airflow=NOWHERE, mlflow=NOWHERE, envoy=NOWHERE, triggers=NOWHERE)


@pytest.fixture
def released(toy_envoy: EnvoyController, tmp_path: Path) -> EnvoyController:
    """v1 had all the traffic, and v2 has it now, as after a rollout."""
    for release in (A, B):
        toy_envoy.deploy(release, engine(tmp_path / release.name / "engine"))
        toy_envoy.set_routes("net", Routes(weights={release.name: 100}))
    return toy_envoy


def kill(home: Home, release: Release) -> None:
    """kill -9, and never again: supervisord finds an engine that cannot be loaded."""
    (home.releases / release.key / "engine" / "behaviour.json").write_text('{"broken": true}')
    os.kill(pid(home, release), signal.SIGKILL)


def pid(home: Home, release: Release) -> int:
    found = supervisor.state(home, f"server-{release.key}").pid
    assert found is not None
    return found


@contextmanager
def frozen(home: Home, release: Release) -> Iterator[None]:
    process = pid(home, release)
    os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process, signal.SIGCONT)


def statuses(sent: Sent) -> set[int]:
    return {r.status for r in sent.records}


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_killed_champion_costs_no_request(released: EnvoyController, envoy_home: tuple[Home, str]) -> None:
    assert shares(load(released, 20)) == {"v2": 100}
    kill(envoy_home[0], B)
    sent = load(released, 60, rate=30)
    assert statuses(sent) == {200}
    assert shares(sent) == {"v1": 100}


def test_a_frozen_champion_costs_no_request_and_serves_again_afterwards(
    released: EnvoyController, envoy_home: tuple[Home, str]
) -> None:
    load(released, 5)
    with frozen(envoy_home[0], B):
        sent = load(released, 90, rate=30)
        ejected = Admin(envoy_home[0].envoy).ejected()
        found = {s.name: s for s in health.status(envoy_home[0], NOTHING_ELSE)}["server-net--v2"]
    assert statuses(sent) == {200}
    assert shares(sent)["v1"] > 90  # a few were answered before the stop
    assert ejected == {B.key: "v1"}
    assert (found.healthy, found.note) == (False, "ejected by Envoy: v1 answers its requests")
    until(lambda: not Admin(envoy_home[0].envoy).ejected())
    until(lambda: shares(load(released, 5)) == {"v2": 100})


def test_an_ejected_release_without_a_fallback_is_still_asked(
    toy_envoy: EnvoyController, envoy_home: tuple[Home, str], tmp_path: Path
) -> None:
    """A false alarm on an overloaded machine must not be an outage."""
    toy_envoy.deploy(A, engine(tmp_path / "v1" / "engine"))
    toy_envoy.set_routes("net", Routes(weights={"v1": 100}))
    with frozen(envoy_home[0], A):
        until(lambda: Admin(envoy_home[0].envoy).ejected() == {A.key: None})
    assert statuses(load(toy_envoy, 5)) == {200}  # at once, before a health check has passed


def test_what_was_rolled_back_is_no_fallback(released: EnvoyController, envoy_home: tuple[Home, str]) -> None:
    released.set_routes("net", Routes(weights={"v1": 100}))
    kill(envoy_home[0], A)
    sent = load(released, 10, rate=20)
    assert statuses(sent) == {503}
    assert shares(sent) == {"v1": 100}


def test_a_dead_challenger_is_its_own_failure_and_nobody_elses(
    released: EnvoyController, envoy_home: tuple[Home, str], tmp_path: Path
) -> None:
    released.deploy(C, engine(tmp_path / C.name / "engine"))
    released.set_routes("net", Routes(weights={"v2": 50, "v3": 50}))
    assert set(shares(load(released, 40))) == {"v2", "v3"}
    before = {r: released.observe(r) for r in (B, C)}
    assert [o.errors for o in before.values()] == [0, 0]
    kill(envoy_home[0], C)
    # More than the health checks let through: those that are answered without being tried at v3 count as well.
    sent = load(released, 120, rate=30)
    assert statuses(sent) == {200}
    assert shares(sent) == {"v2": 100}
    after = {r: released.observe(r) for r in (B, C)}
    requests = {r: after[r].requests - before[r].requests for r in (B, C)}
    assert requests[B] + requests[C] == 120
    assert 30 < requests[C] < 90
    assert after[C].errors == requests[C]
    assert after[B].errors == 0


def test_a_challenger_that_answers_500_is_not_hidden(released: EnvoyController, tmp_path: Path) -> None:
    released.deploy(C, engine(tmp_path / C.name / "engine", error_rate=1.0))
    released.set_routes("net", Routes(weights={"v2": 50, "v3": 50}))
    load(released, 80, rate=100)
    found = released.observe(C)
    assert found.errors == found.requests > 20
    assert released.observe(B).errors == 0


def test_a_retired_release_is_no_fallback(released: EnvoyController) -> None:
    released.retire(A)
    routes = (released._home.envoy / "dynamic" / "routes.json").read_text()
    assert "v1" not in routes
    assert shares(load(released, 10)) == {"v2": 100}


@pytest.mark.parametrize(
    ("moves", "history"),
    [
        ([{"v1": 100}], ("v1",)),
        ([{"v1": 100}, {"v1": 75, "v2": 25}], ("v1",)),
        ([{"v1": 100}, {"v1": 75, "v2": 25}, {"v2": 100}], ("v1", "v2")),
        ([{"v1": 100}, {"v2": 100}, {"v1": 100}], ("v1",)),
        ([{"v1": 100}, {"v2": 100}, {"v1": 100}, {"v3": 100}], ("v1", "v3")),
        ([{"v1": 100}, {"v2": 100}, {"v2": 100}], ("v1", "v2")),
        ([{"v1": 100}, {}], ("v1",)),
    ],
    ids=str,
)
def test_history(moves: list[dict[str, int]], history: tuple[str, ...]) -> None:
    found: tuple[str, ...] = ()
    for weights in moves:
        found = envoy_config.settled(found, weights)
    assert found == history


@pytest.mark.parametrize(
    ("name", "history", "expected"),
    [("v2", ("v0", "v1", "v2"), "v1"), ("v1", ("v1",), None), ("v3", ("v1", "v2"), "v2"), ("v1", (), None)],
)
def test_fallback(name: str, history: tuple[str, ...], expected: str | None) -> None:
    assert envoy_config.fallback(name, history) == expected
