"""A process that dies, or that lives on after its lease: the traffic is restored, and stays so."""

import time
from typing import Any

import pytest
from tests.release.killed import Fuse, Killed
from tests.release.ready import ERRORS, Ready
from tests.steps.stages import failing

from slipstream.errors import Superseded, Unavailable
from slipstream.release import moves, watchdog
from slipstream.traffic import stepwise
from slipstream.traffic.guarded import Stage


def look(ready: Ready, later_s: float = 0.0) -> str | None:
    return watchdog.look(ready.world.model, lambda: ready.fake, ready.world.registry, time.time() + later_s)


def split_and_killed(ready: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rollout that was killed with half of the traffic on the challenger."""
    fuse = Fuse()

    def steps(stage: Stage) -> Any:
        stage.controller.set_routes(stage.model, stage.weights(50))
        fuse.dead = True
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(moves, "RENEW_S", 600.0)
        patch.setattr(stepwise, "measure", steps)
        with fuse.watching(ready.fake) as controller, pytest.raises(Killed):
            ready.rolled_out(controller)
    assert ready.traffic() == {f"v{ready.old}": 50, f"v{ready.new}": 50}


@pytest.mark.usefixtures("passing")
def test_a_killed_rollout_has_its_traffic_back_once_the_lease_is_over(
    ready: Ready, monkeypatch: pytest.MonkeyPatch
) -> None:
    split_and_killed(ready, monkeypatch)
    assert look(ready) is None, "the process might live"
    sentence = look(ready, moves.LEASE_S + 1)
    assert sentence is not None
    assert "the rollout by run-1 stopped renewing its lease (started)" in sentence
    ready.reverted(challenger=ready.new)
    assert look(ready, 3600) is None
    ready.rolled_out()
    ready.released()


def test_an_owner_that_slept_through_its_lease_stops(ready: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    def steps(stage: Stage) -> Any:
        stage.controller.set_routes(stage.model, stage.weights(50))
        assert look(ready, 60) is not None
        stage.controller.set_routes(stage.model, stage.weights(100))
        return (ERRORS,)

    monkeypatch.setattr(stepwise, "measure", steps)
    assert "superseded" in failing(ready.rolled_out, Superseded)
    ready.reverted(challenger=ready.new)


def test_a_guard_learns_from_the_renewing_thread_that_it_was_superseded(
    ready: Ready, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moves, "RENEW_S", 0.05)

    def steps(stage: Stage) -> Any:
        assert look(ready, 60) is not None
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            stage.controller.observe(stage.challenger)
        raise AssertionError("not told")

    monkeypatch.setattr(stepwise, "measure", steps)
    failing(ready.rolled_out, Superseded)
    ready.reverted(challenger=ready.new)


def test_a_process_that_hangs_with_split_traffic_is_not_renewed(ready: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moves, "RENEW_S", 0.01)
    monkeypatch.setattr(moves, "STUCK_S", 0.0)

    def steps(stage: Stage) -> Any:
        stage.controller.set_routes(stage.model, stage.weights(50))
        time.sleep(0.1)  # a renewal that was under way
        until = moves.entries(ready.world.registry)[-1].lease_until
        time.sleep(0.3)
        assert moves.entries(ready.world.registry)[-1].lease_until == until
        assert look(ready, moves.LEASE_S + 1) is not None
        stage.controller.set_routes(stage.model, stage.weights(100))

    monkeypatch.setattr(stepwise, "measure", steps)
    failing(ready.rolled_out, Superseded)
    ready.reverted(challenger=ready.new)


@pytest.mark.usefixtures("passing")
def test_while_a_person_is_asked_no_traffic_is_split_and_no_lease_runs(ready: Ready) -> None:
    ready.tried()
    ready.reverted(challenger=ready.new)
    assert look(ready, 86_400) is None
    ready.rolled_out()
    ready.released()


@pytest.mark.usefixtures("passing")
def test_an_error_at_one_model_stops_no_other(ready: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moves, "LEASE_S", 0.0)
    split_and_killed(ready, monkeypatch)
    client = ready.world.tracking.client
    connections = iter([Unavailable("no Envoy"), ready.fake])

    def connect() -> Any:
        found = next(connections)
        if isinstance(found, Exception):
            raise found
        return found

    models = [ready.world.model, "no-such-model", ready.world.model]
    assert list(watchdog.look_at_all(models, connect, client)) == [ready.world.model]
    ready.reverted(challenger=ready.new)
