import threading
from typing import Any

import pytest
from tests.steps.stages import World, failing
from tests.steps.test_rollout import Fuse, Killed

from slipstream import traffic
from slipstream.errors import RegistryError, Unavailable
from slipstream.registry import drift
from slipstream.steps import rollback as step
from slipstream.steps.rollback import JOURNAL, by_hand, rollback
from slipstream.tracking import fetch
from slipstream.traffic.base import Routes
from slipstream.traffic.fake import FakeController
from slipstream.traffic.releases import moving_alone


@pytest.fixture
def two(world: World, fake: FakeController) -> tuple[str, str]:
    """Versions (previous, champion); only the champion is deployed and has the traffic."""
    old, new = world.version("old"), world.version("new")
    world.registry.set_alias("previous", old)
    world.registry.set_alias("champion", new)
    fake.deploy(world.registry.release(new), fetch(world.engine("new")))
    fake.set_routes(world.model, Routes(weights={f"v{new}": 100}))
    return old, new


def back(world: World, fake: FakeController, old: str, new: str) -> None:
    assert (world.registry.champion(), world.registry.alias("previous")) == (old, new)
    assert fake.routes(world.model) == Routes(weights={f"v{old}": 100})
    assert drift(world.model, fake) == []


def test_previous_serves_again_and_can_be_undone(world: World, fake: FakeController, two: tuple[str, str]) -> None:
    old, new = two
    assert rollback(world.model, fake, world.tracking.client, "a person") == {"champion": old, "previous": new}
    back(world, fake, old, new)
    assert world.registry.tags(new)["slipstream.rolled_back_by"] == "a person"
    rollback(world.model, fake, world.tracking.client, "the same person, later")
    back(world, fake, new, old)


def test_the_same_run_does_not_roll_back_twice(world: World, fake: FakeController, two: tuple[str, str]) -> None:
    for _ in range(2):
        rollback(world.model, fake, world.tracking.client, "run-1")
    back(world, fake, *two)


def test_there_must_be_something_to_go_back_to(world: World, fake: FakeController) -> None:
    message = failing(lambda: rollback(world.model, fake, world.tracking.client, "me"), RegistryError)
    assert "no previous release" in message
    world.registry.set_alias("champion", world.version("only"))
    failing(lambda: rollback(world.model, fake, world.tracking.client, "me"), RegistryError)


def test_an_alias_that_was_set_since_counts_more_than_a_rollback_that_never_got_through(
    world: World, fake: FakeController, two: tuple[str, str]
) -> None:
    old, new = two
    broken = world.version("broken")
    world.registry.write_journal(JOURNAL, {"state": "started", "from": new, "to": broken, "by": ["run-1"]})
    rollback(world.model, fake, world.tracking.client, "run-2")
    back(world, fake, old, new)


def test_traffic_that_a_killed_rollout_left_split_is_whole_before_a_third_release_comes(
    world: World, fake: FakeController, two: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = two
    third = world.version("third")
    fake.deploy(world.registry.release(third), fetch(world.engine("third")))
    fake.set_routes(world.model, Routes(weights={f"v{new}": 50, f"v{third}": 50}))
    deploy = fake.deploy

    def at_most_two(*given: Any) -> None:  # as KServe
        assert len(fake.routes(world.model).weights) == 1
        deploy(*given)

    monkeypatch.setattr(fake, "deploy", at_most_two)
    rollback(world.model, fake, world.tracking.client, "me")
    back(world, fake, old, new)


def test_it_waits_for_a_test_or_rollout_under_way(
    world: World, fake: FakeController, two: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    context = world.context("rollback", ())
    monkeypatch.setattr(traffic, "controller", lambda home: fake)
    other = threading.Thread(target=step.run, args=(context,))
    with moving_alone(context.home, world.model):
        other.start()
        other.join(1.0)
        assert other.is_alive()
        assert world.registry.champion() == two[1]
    other.join(20)
    back(world, fake, *two)


def test_one_whose_target_does_not_start_is_given_up_and_stands_in_no_ones_way(
    world: World, fake: FakeController, two: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*given: Any) -> None:
        raise Unavailable("this engine cannot be loaded")

    with monkeypatch.context() as patch:
        patch.setattr(fake, "deploy", broken)
        failing(lambda: rollback(world.model, fake, world.tracking.client, "me"), Unavailable)
    assert world.registry.journal(JOURNAL)["state"] == "given up"
    assert fake.routes(world.model) == Routes(weights={f"v{two[1]}": 100})
    assert world.registry.champion() == two[1]
    rollback(world.model, fake, world.tracking.client, "me")
    back(world, fake, *two)


def test_by_hand_it_does_not_wait_but_says_what_to_do(
    world: World, fake: FakeController, two: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traffic, "controller", lambda home: fake)
    monkeypatch.setattr(step, "connect", lambda home: world.tracking.client)
    home = world.context("rollback", ()).home
    with moving_alone(home, world.model):
        assert "mark that task as failed in Airflow" in failing(lambda: by_hand(world.model, home), Unavailable)
    assert by_hand(world.model, home) == {"champion": two[0], "previous": two[1]}
    back(world, fake, *two)


@pytest.mark.parametrize("writes", [3, 5])
def test_who_was_stopped_half_way_does_not_undo_what_another_finished(
    world: World, fake: FakeController, two: tuple[str, str], writes: int
) -> None:
    fuse = Fuse(writes)
    with pytest.raises(Killed):
        rollback(world.model, fuse.guard(fake), fuse.guard(world.tracking.client), "run-1")
    for who in ("run-2", "run-1", "run-2"):
        rollback(world.model, fake, world.tracking.client, who)
        back(world, fake, *two)


WRITES = 8


@pytest.mark.parametrize("writes", range(WRITES))
def test_killed_between_any_two_writes_the_next_one_finishes(
    world: World, fake: FakeController, two: tuple[str, str], writes: int
) -> None:
    fuse = Fuse(writes)
    with pytest.raises(Killed):
        rollback(world.model, fuse.guard(fake), fuse.guard(world.tracking.client), "run-1")
    # By another: a rollback that is under way is finished, not turned around.
    rollback(world.model, fake, world.tracking.client, "run-2")
    back(world, fake, *two)


def test_every_write_is_covered(world: World, fake: FakeController, two: tuple[str, str]) -> None:
    fuse = Fuse(1000)
    rollback(world.model, fuse.guard(fake), fuse.guard(world.tracking.client), "run-1")
    assert 1000 - fuse.left == WRITES
