import threading
from typing import Any

import pytest
from tests.steps.stages import World, failing

from slipstream import traffic
from slipstream.contract.handover import RolledBack
from slipstream.errors import RegistryError, Unavailable
from slipstream.release import moves, rejections
from slipstream.release.releases import drift, traffic_lock
from slipstream.steps import rollback as step
from slipstream.steps.rollback import by_hand, rollback
from slipstream.store.tracking import fetch
from slipstream.traffic.base import Routes
from slipstream.traffic.fake import FakeController


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
    """`old` serves, `new` is rejected and no rollback's target."""
    assert (world.registry.champion(), world.registry.alias("previous")) == (old, None)
    assert list(rejections.active(world.registry)) == [world.registry.artifact(new).sha256]
    assert fake.routes(world.model) == Routes(weights={f"v{old}": 100})
    assert drift(world.model, fake) == []


def test_the_last_release_serves_again_and_what_is_left_is_rejected(
    world: World, fake: FakeController, two: tuple[str, str]
) -> None:
    old, new = two
    done = rollback(world.model, fake, world.tracking.client, "alice", reason="customers complain")
    assert done == RolledBack(champion=old, previous=None, left=new)
    back(world, fake, old, new)
    tags = world.registry.tags(new)
    assert tags["slipstream.rolled_back_by"] == "alice"
    assert tags["slipstream.rejected"] == "yes: customers complain"


@pytest.mark.parametrize("others", [("alice", "bob"), ("run-1", "run-1")])
def test_pressed_twice_by_whoever_it_changes_nothing_and_says_so(
    world: World, fake: FakeController, two: tuple[str, str], others: tuple[str, str]
) -> None:
    first, second = others
    rollback(world.model, fake, world.tracking.client, first)
    done = rollback(world.model, fake, world.tracking.client, second)
    assert str(done.done).startswith(f"{first} rolled version {two[1]} back at ")
    back(world, fake, *two)


def test_two_at_once_go_back_once(world: World, fake: FakeController, two: tuple[str, str]) -> None:
    done: list[dict[str, Any]] = []

    def press(who: str) -> None:
        done.append(rollback(world.model, fake, world.tracking.client, who))

    threads = [threading.Thread(target=press, args=(who,)) for who in ("alice", "bob", "carol")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert [d.champion for d in done] == [two[0]] * 3
    back(world, fake, *two)


def test_the_next_bad_release_goes_back_to_the_last_good_one(world: World, fake: FakeController) -> None:
    v1, v2, v3, v4 = (world.version(n) for n in ("one", "two", "three", "four"))
    registry = world.registry
    for version, replaced in ((v2, v1), (v3, v2)):
        registry.tag(version, {"slipstream.replaced": replaced})
    registry.set_alias("champion", v3)
    registry.set_alias("previous", v2)
    rollback(world.model, fake, world.tracking.client, "alice")
    assert (registry.champion(), registry.alias("previous")) == (v2, v1)
    registry.tag(v4, {"slipstream.replaced": v2})  # as a rollout of v4 leaves it
    registry.set_alias("champion", v4)
    registry.set_alias("previous", v2)
    assert rollback(world.model, fake, world.tracking.client, "alice").champion == v2
    assert registry.alias("previous") == v1
    left = rollback(world.model, fake, world.tracking.client, "alice", leave=v2)
    assert (left.champion, left.previous) == (v1, None)
    assert "does not serve" in str(rollback(world.model, fake, world.tracking.client, "alice", leave=v4).done)
    assert registry.champion() == v1
    failing(lambda: rollback(world.model, fake, world.tracking.client, "alice", leave=v1), RegistryError)


def test_an_alias_that_names_a_rejected_release_is_no_target(
    world: World, fake: FakeController, two: tuple[str, str]
) -> None:
    rejections.reject(world.registry, two[0], "rollback", "bad", "alice")
    assert "no previous release" in failing(
        lambda: rollback(world.model, fake, world.tracking.client, "me"), RegistryError
    )
    assert fake.routes(world.model) == Routes(weights={f"v{two[1]}": 100})


def test_there_must_be_something_to_go_back_to(world: World, fake: FakeController) -> None:
    message = failing(lambda: rollback(world.model, fake, world.tracking.client, "me"), RegistryError)
    assert "no previous release" in message
    world.registry.set_alias("champion", world.version("only"))
    failing(lambda: rollback(world.model, fake, world.tracking.client, "me"), RegistryError)


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
    with traffic_lock(context.home, world.model):
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
    assert [e.state for e in moves.entries(world.registry)] == ["given up"]
    assert rejections.all_of(world.registry) == []
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
    with traffic_lock(home, world.model):
        assert "mark that task as failed in Airflow" in failing(lambda: by_hand(world.model, home), Unavailable)
    assert by_hand(world.model, home) == RolledBack(champion=two[0], previous=None, left=two[1])
    back(world, fake, *two)
