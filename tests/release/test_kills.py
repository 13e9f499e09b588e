"""A kill before any write, or a lost answer after it: the next attempt completes or reverts the move."""

from collections.abc import Callable
from typing import Any

import pytest
from tests.release.killed import Fuse, stopped
from tests.release.ready import BREACH, ERRORS, Ready, measure, ready_in
from tests.steps.stages import WorldMaker, failing

from slipstream.contract import Verdict
from slipstream.errors import GateFailed, RegistryError
from slipstream.release import rejections, watchdog
from slipstream.traffic.fake import FakeController

pytestmark = pytest.mark.usefixtures("dead_at_once")

Make = Callable[[], Ready]
MakeFuse = Callable[[int, Ready], Fuse]


@pytest.fixture(autouse=True)
def verdicts(monkeypatch: pytest.MonkeyPatch) -> list[Verdict]:
    """What the tests of stages 2 and 3 find; they pass unless a test changes the list."""
    found = [ERRORS]
    measure(monkeypatch, lambda: found[0])
    return found


@pytest.fixture
def make(world_maker: WorldMaker, fake: FakeController) -> Make:
    return lambda: ready_in(world_maker(), fake)


def killed(at: int, ready: Ready) -> Fuse:
    return Fuse(at)


def lost(at: int, ready: Ready) -> Fuse:
    return Fuse(at, lost=True)


def sweep(first: int) -> Any:
    """Kills at every third write; slow: lost answers to every third, and kills at each."""
    third, slow = range(first, 1000, 3), pytest.mark.slow
    cases = [
        pytest.param(killed, third, id="killed, every third write"),
        pytest.param(lost, third, marks=slow, id="answer lost, every third write"),
        pytest.param(killed, range(1000), marks=slow, id="killed, each write"),
    ]
    return pytest.mark.parametrize(("fuse", "numbers"), cases)


def look(ready: Ready) -> None:
    watchdog.look(ready.world.model, lambda: ready.fake, ready.world.registry)


@sweep(1)
def test_a_rollout_is_finished_or_begun_again(make: Make, fuse: MakeFuse, numbers: range) -> None:
    for at, _, ready, _ in stopped(make, Ready.rolled_out, fuse, numbers):
        if at % 2:
            look(ready)
            ready.settled()
        output = ready.rolled_out()
        ready.released()
        assert output.details["released"] == ready.new
        assert [v.answer for v in output.verdicts] == ["pass"]


@sweep(0)
def test_a_refused_rollout_stays_refused(make: Make, verdicts: list[Verdict], fuse: MakeFuse, numbers: range) -> None:
    def refused(ready: Ready, controller: Any) -> None:
        verdicts[0] = BREACH
        ready.rolled_out(controller)

    for at, _, ready, _ in stopped(make, refused, fuse, numbers):
        if at % 2:
            look(ready)
            ready.settled()
        if rejections.active(ready.world.registry):
            verdicts[0] = ERRORS  # a second draw might pass
        assert "28 of 500" in failing(ready.rolled_out, GateFailed)
        assert list(rejections.active(ready.world.registry)) == [ready.world.engine("int8").sha256]
        ready.settled()
        assert ready.aliases()[:2] == (ready.old, ready.older)


@sweep(1)
def test_a_trial_leaves_the_traffic_where_it_was(make: Make, fuse: MakeFuse, numbers: range) -> None:
    for at, _, ready, _ in stopped(make, Ready.tried, fuse, numbers):
        if at % 2:
            look(ready)
        else:
            ready.tried()
        ready.reverted(challenger=ready.new)


@sweep(2)
def test_a_refused_trial_stays_refused(make: Make, verdicts: list[Verdict], fuse: MakeFuse, numbers: range) -> None:
    def refused(ready: Ready, controller: Any) -> None:
        verdicts[0] = BREACH
        ready.tried(controller)

    for _, _, ready, _ in stopped(make, refused, fuse, numbers):
        if rejections.active(ready.world.registry):
            verdicts[0] = ERRORS
        assert "28 of 500" in failing(ready.tried, GateFailed)
        ready.settled()
        assert ready.aliases()[:2] == (ready.old, ready.older)


def another(ready: Ready) -> None:
    ready.rolled_back(by="bob")


def scheduled(ready: Ready) -> None:
    """The next run's small-scale test, whose evidence is about the release that is being left."""
    failing(lambda: ready.tried(run_key="run-2"), RegistryError)


@pytest.mark.parametrize("finish", [look, another, scheduled])
@sweep(1)
def test_a_rollback_is_finished_by_whoever_comes(
    make: Make, fuse: MakeFuse, finish: Callable[[Ready], None], numbers: range
) -> None:
    for at, lit, ready, error in stopped(make, Ready.rolled_back, fuse, numbers):
        if at == 0 and fuse is killed:  # nothing was begun
            continue
        if fuse is lost and lit.writes[at] == "deploy":  # a target that does not start: given up, with that error
            assert error is not None
            ready.settled()
            continue
        finish(ready)
        ready.back()
        assert "alice rolled version" in str(ready.rolled_back(by="carol").done)
        ready.back()


def test_select_registers_one_version(make: Make) -> None:
    def first_of_another_run(ready: Ready, controller: Any) -> None:
        ready.selected(controller, "run-2")

    for _, _, ready, _ in stopped(make, first_of_another_run, killed):
        version = ready.selected(run_key="run-2").details["version"]
        assert ready.aliases() == (ready.old, ready.older, version)
        assert len(ready.world.registry.versions_of(ready.world.engine("int8").sha256)) == 2
        ready.settled()
