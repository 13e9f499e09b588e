"""Two at a time, as on a cluster where no lock is shared: a whole rollback, rollout or hand in front of any write."""

import contextlib
from collections.abc import Callable

import pytest
from tests.release.killed import EVERY, Fuse, some, stopped
from tests.release.ready import Ready, ready_in
from tests.steps.stages import WorldMaker

from slipstream.errors import SlipstreamError, Superseded
from slipstream.release import moves, rejections, watchdog
from slipstream.traffic.fake import FakeController

pytestmark = pytest.mark.usefixtures("passing")
Make = Callable[[], Ready]


@pytest.fixture
def make(world_maker: WorldMaker, fake: FakeController) -> Make:
    return lambda: ready_in(world_maker(), fake)


def in_front(disturb: Callable[[Ready], object]) -> Callable[[int, Ready], Fuse]:
    return lambda at, ready: Fuse(at, before=lambda: disturb(ready))


@pytest.mark.parametrize("numbers", [some(2), EVERY])
def test_a_rollback_in_front_of_any_write_of_a_rollout_wins(make: Make, numbers: range) -> None:
    chosen: dict[str, str] = {}

    def rollback(ready: Ready) -> None:
        chosen[ready.world.model] = ready.rolled_back().champion

    for at, fuse, ready, error in stopped(make, Ready.rolled_out, in_front(rollback), numbers):
        where = f"write {at}: {fuse.writes[at]}"
        assert error is not None, f"{where}: exit 0 although it was rolled back"
        assert ready.world.registry.champion() == chosen[ready.world.model], where
        ready.settled()
        with pytest.raises(SlipstreamError):
            ready.rolled_out()
        assert ready.world.registry.champion() == chosen[ready.world.model], where
        ready.settled()


@pytest.mark.parametrize("numbers", [some(0), EVERY])
def test_a_rollback_in_front_of_any_write_of_a_trial_wins(make: Make, numbers: range) -> None:
    for at, fuse, ready, error in stopped(make, Ready.tried, in_front(Ready.rolled_back), numbers):
        assert error is not None, f"write {at}: {fuse.writes[at]}"
        ready.back()


@pytest.mark.parametrize("numbers", [some(1), EVERY])
def test_of_two_rollouts_one_releases(make: Make, monkeypatch: pytest.MonkeyPatch, numbers: range) -> None:
    """The first one sleeps in front of a write for longer than its lease, and goes on when the other is done."""
    monkeypatch.setattr(moves, "LEASE_S", 0.0)
    monkeypatch.setattr(moves, "RENEW_S", 600.0)
    released: dict[str, list[str]] = {}

    def other(ready: Ready) -> None:
        version = ready.world.version("another")
        outputs = (*ready.outputs[:2], ready.world.selected(version, ready.old), ready.world.tried())
        second = Ready(ready.world, ready.fake, ready.older, ready.old, version, outputs)
        with contextlib.suppress(SlipstreamError):
            second.rolled_out(run_key="run-2")
            released.setdefault(ready.world.model, []).append(version)

    for at, fuse, ready, error in stopped(make, Ready.rolled_out, in_front(other), numbers):
        done = [*released.get(ready.world.model, []), *([ready.new] if error is None else [])]
        assert len(done) <= 1, f"write {at} ({fuse.writes[at]}): both report a release"
        ready.settled()
        if done:
            assert ready.aliases()[:2] == (done[0], ready.old)


@pytest.mark.parametrize("numbers", [some(0), EVERY])
def test_an_alias_that_a_person_moves_stays_where_it_was_put(make: Make, numbers: range) -> None:
    begun: set[str] = set()

    def by_hand(ready: Ready) -> None:
        if moves.newest(ready.world.registry) is not None:
            begun.add(ready.world.model)
        ready.world.tracking.client.set_registered_model_alias(ready.world.model, "champion", ready.older)

    for at, fuse, ready, error in stopped(make, Ready.rolled_out, in_front(by_hand), numbers):
        where = f"write {at}: {fuse.writes[at]}"
        if error is None and fuse.writes[at] == "POST /registered-models/alias":
            continue  # within the round trip of this very write; MLflow has no compare-and-swap
        assert error is not None, where
        assert ready.world.registry.champion() == ready.older, where
        if ready.world.model in begun:  # else no traffic has moved, and that it differs is drift
            assert ready.traffic() == {f"v{ready.older}": 100}, where


def test_who_was_superseded_says_by_whom_and_touches_nothing(ready: Ready) -> None:
    registry = ready.world.registry
    with moves.begin(registry, ready.fake, "rollout", "run-1", f"v{ready.old}", to=ready.new) as first:
        with moves.begin(registry, ready.fake, "rollback", "alice", f"v{ready.old}", to=ready.older) as second:
            for write in (lambda: first.set_alias("champion", ready.new), first.check):
                with pytest.raises(Superseded, match=r"a rollback by alice \(token 000000002-"):
                    write()
            second.check()
        assert registry.champion() == ready.old


def test_old_moves_are_forgotten_but_for_the_last_that_changed_the_champion(ready: Ready) -> None:
    ready.rolled_back()
    for number in range(2 * moves.KEEP):
        with moves.begin(ready.world.registry, ready.fake, "serve", f"run-{number}", f"v{ready.older}") as move:
            move.close("done")
    kept = moves.entries(ready.world.registry)
    assert len(kept) == moves.KEEP + 1
    assert moves.last_change(ready.world.registry) == kept[0]
    assert "alice rolled version" in str(ready.rolled_back(by="bob").done)
    assert len(rejections.active(ready.world.registry)) == 1


def test_a_lease_is_renewed_while_its_process_lives(ready: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moves, "RENEW_S", 0.05)
    registry = ready.world.registry
    with moves.begin(registry, ready.fake, "trial", "run-1", f"v{ready.old}") as move:
        first = move.entry.lease_until
        deadline = first + 60
        while (entry := moves.newest(registry)) is not None and entry.lease_until <= first:
            assert entry.lease_until < deadline
        assert watchdog.look(ready.world.model, lambda: ready.fake, registry) is None
