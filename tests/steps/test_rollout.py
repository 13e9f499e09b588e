"""Stage 3, with a real MLflow and the fake controller: what it releases, what it refuses, and every crash."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from tests.steps.stages import FAIL, World, WorldMaker, failing

from slipstream.contract import StepOutput
from slipstream.errors import GateFailed, RegistryError, SlipstreamError, Unavailable
from slipstream.registry import drift
from slipstream.steps.base import Context
from slipstream.steps.rollback import rollback
from slipstream.steps.rollout import JOURNAL, full_rollout
from slipstream.tracking import Tracking, fetch
from slipstream.traffic import guarded
from slipstream.traffic.base import Release, Routes
from slipstream.traffic.fake import Behaviour, FakeController
from slipstream.traffic.guarded import Stage


@dataclass
class Ready:
    """A model whose trial has passed: `old` is champion and serves, `older` is previous, `new` is the challenger."""

    world: World
    fake: FakeController
    older: str
    old: str
    new: str
    outputs: tuple[StepOutput, ...]

    def context(self, run_key: str = "run-1") -> Context:
        return self.world.context("rollout", self.outputs, run_key)

    def release(self, version: str) -> Release:
        return self.world.registry.release(version)

    def aliases(self) -> tuple[str | None, ...]:
        return tuple(self.world.registry.alias(a) for a in ("champion", "previous", "challenger"))

    def traffic(self) -> dict[str, int]:
        return self.fake.routes(self.world.model).weights


def ready_in(world: World, fake: FakeController) -> Ready:
    older, old, new = (world.version(n) for n in ("older", "old", "int8"))
    for alias, version in (("champion", old), ("previous", older), ("challenger", new)):
        world.registry.set_alias(alias, version)
    fake.deploy(world.registry.release(older), fetch(world.engine("older")))
    fake.deploy(world.registry.release(old), fetch(world.engine("old")))
    fake.set_routes(world.model, Routes(weights={f"v{old}": 100}))
    outputs = (world.built("baseline"), world.built("int8"), world.selected(new, old), world.tried())
    return Ready(world, fake, older, old, new, outputs)


@pytest.fixture
def ready(world: World, fake: FakeController) -> Ready:
    return ready_in(world, fake)


def released(ready: Ready) -> None:
    """The state after a release: aliases and traffic agree, and rollback has somewhere to go."""
    assert ready.aliases() == (ready.new, ready.old, None)
    assert ready.traffic() == {f"v{ready.new}": 100}
    assert ready.fake.deployed(ready.world.model) == {f"v{ready.new}", f"v{ready.old}"}
    assert ready.world.registry.journal(JOURNAL)["state"] == "done"
    assert drift(ready.world.model, ready.fake) == []


def reverted(ready: Ready) -> None:
    """The state after a refusal: as before, and the challenger is gone."""
    assert ready.aliases() == (ready.old, ready.older, None)
    assert ready.traffic() == {f"v{ready.old}": 100}
    assert f"v{ready.new}" not in ready.fake.deployed(ready.world.model)
    assert drift(ready.world.model, ready.fake) == []


def test_a_good_challenger_is_released(ready: Ready) -> None:
    output = full_rollout(ready.context(), ready.fake)
    released(ready)
    assert (output.details["released"], output.details["previous"]) == (ready.new, ready.old)
    assert {v.gate: v.answer for v in output.verdicts} == {"errors": "pass", "p99_cap": "pass"}
    assert [(p["phase"], p["champion_weight"]) for p in output.details["timeline"]] == [("50%", 50), ("100%", 0)]
    tags = ready.world.registry.tags(ready.new)
    assert tags["slipstream.released_by"] == "run-1"
    assert tags["slipstream.replaced"] == ready.old
    assert tags["slipstream.trial.accuracy"].startswith("pass")
    assert tags["slipstream.rollout.errors"].startswith("pass: 0 of")


def test_the_first_release_leaves_no_baseline_behind(world: World, fake: FakeController) -> None:
    new = world.version("int8")
    outputs = (world.built("baseline"), world.built("int8"), world.selected(new, None), world.tried())
    output = full_rollout(world.context("rollout", outputs), fake)
    assert (output.details["released"], output.details["previous"]) == (new, None)
    assert fake.routes(world.model) == Routes(weights={f"v{new}": 100})
    assert fake.deployed(world.model) == {f"v{new}"}


def test_a_breach_puts_everything_back_and_says_why(ready: Ready) -> None:
    ready.fake.behaviours[f"v{ready.new}"] = Behaviour(error_rate=0.6)
    context = ready.context()
    message = failing(lambda: full_rollout(context, ready.fake), GateFailed)
    assert "errors: " in message
    assert "requests failed" in message
    reverted(ready)
    recorded = ready.world.recorded(context)
    assert recorded.details["released"] is None
    assert [p["phase"] for p in recorded.details["timeline"]] == ["50%"]


def test_too_little_evidence_is_no_release(world_maker: WorldMaker, fake: FakeController) -> None:
    ready = ready_in(world_maker(objective={"confidence": 0.9999}, rollout={"steps": [100], "requests": 50}), fake)
    assert "inconclusive" in failing(lambda: full_rollout(ready.context(), fake), GateFailed)
    reverted(ready)


@pytest.mark.parametrize("verdict", [FAIL, None], ids=["failed", "missing"])
def test_without_a_passed_trial_nothing_moves(ready: Ready, verdict: Any) -> None:
    trial = (ready.world.tried(verdict),) if verdict else ()
    ready.outputs = (*ready.outputs[:-1], *trial)
    failing(lambda: full_rollout(ready.context(), ready.fake), GateFailed)
    assert ready.aliases() == (ready.old, ready.older, ready.new)
    assert ready.traffic() == {f"v{ready.old}": 100}


def test_stale_evidence_is_refused(ready: Ready) -> None:
    ready.world.registry.set_alias("champion", ready.older)
    assert "moved it meanwhile" in failing(lambda: full_rollout(ready.context(), ready.fake), RegistryError)
    assert ready.world.registry.champion() == ready.older


def test_a_champion_moved_during_the_rollout_stops_it(ready: Ready) -> None:
    moved = False

    def move(done: int, total: int, unit: str, **figures: float) -> None:
        nonlocal moved
        if not moved:
            moved = True
            ready.world.registry.set_alias("champion", ready.older)

    context = ready.context()
    context.run.progress = move  # type: ignore[method-assign]  # somebody else, at the worst moment
    failing(lambda: full_rollout(context, ready.fake), RegistryError)
    assert ready.world.registry.champion() == ready.older
    assert f"v{ready.new}" not in ready.traffic()


def test_what_serves_already_is_only_served(ready: Ready) -> None:
    ready.outputs = (*ready.outputs[:2], ready.world.selected(ready.old, ready.old, already=True))
    output = full_rollout(ready.context(), ready.fake)
    assert "serves already" in output.details["skipped"]
    assert ready.aliases() == (ready.old, ready.older, ready.new)


def test_a_finished_rollout_repeated_changes_nothing(ready: Ready) -> None:
    first = full_rollout(ready.context(), ready.fake)
    second = full_rollout(ready.context(), ready.fake)
    released(ready)
    assert second.verdicts == first.verdicts
    assert second.details == first.details


class Killed(BaseException):
    """Stands for kill -9: not an Exception, and after it no write of the dead process reaches anything."""


WRITES = {
    "set_registered_model_alias",
    "delete_registered_model_alias",
    "set_model_version_tag",
    "set_registered_model_tag",
    "log_dict",
    "deploy",
    "retire",
    "set_routes",
}


class Fuse:
    """Lets `left` writes through, then kills."""

    def __init__(self, left: int) -> None:
        self.left = left
        self.blown = False

    def guard(self, subject: Any) -> Any:
        return _Guarded(subject, self)

    def write(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.blown or self.left == 0:
            self.blown = True
            raise Killed
        self.left -= 1
        return call(*args, **kwargs)


class _Guarded:
    def __init__(self, subject: Any, fuse: Fuse) -> None:
        self._subject, self._fuse = subject, fuse

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._subject, name)
        if name not in WRITES:
            return found
        return lambda *args, **kwargs: self._fuse.write(found, *args, **kwargs)


def run_until_killed(ready: Ready, fuse: Fuse) -> None:
    """The step, stopped before the write that the fuse does not let through."""
    context = ready.context()
    tracking = Tracking(ready.world.spec, fuse.guard(context.tracking.client))
    guarded = Context(context.spec, context.inputs, "rollout", context.identity, tracking, context.run, context.home)
    with contextlib.suppress(Killed, GateFailed):  # a `finally` may turn the one into the other, as no kill -9 would
        full_rollout(guarded, fuse.guard(ready.fake))
    assert fuse.blown


LAST_WRITE = 18
"""A whole rollout makes this many writes; `test_every_write_is_covered` keeps the number true."""


def test_every_write_is_covered(ready: Ready) -> None:
    fuse = Fuse(1000)
    context = ready.context()
    tracking = Tracking(ready.world.spec, fuse.guard(context.tracking.client))
    guarded = Context(context.spec, context.inputs, "rollout", context.identity, tracking, context.run, context.home)
    full_rollout(guarded, fuse.guard(ready.fake))
    assert 1000 - fuse.left == LAST_WRITE


@pytest.mark.parametrize("writes", range(LAST_WRITE))
def test_killed_between_any_two_writes_the_next_run_finishes(ready: Ready, writes: int) -> None:
    run_until_killed(ready, Fuse(writes))
    full_rollout(ready.context(), ready.fake)
    released(ready)


RELEASED_BY = 10
"""After this many writes at the latest the champion alias has moved, and a breach comes too late."""


@pytest.mark.parametrize("writes", range(RELEASED_BY + 1))
def test_killed_and_then_a_breach_the_next_run_reverts_or_was_released(ready: Ready, writes: int) -> None:
    run_until_killed(ready, Fuse(writes))
    out = ready.world.registry.champion() == ready.new
    ready.fake.misbehave(ready.release(ready.new), Behaviour(error_rate=0.6))
    if out:  # released by its evidence before the kill: the next run finishes it
        full_rollout(ready.context(), ready.fake)
        released(ready)
    else:
        failing(lambda: full_rollout(ready.context(), ready.fake), GateFailed)
        reverted(ready)


REFUSED_BY = 7
"""After this many writes at the latest a refusal is on record."""


@pytest.mark.parametrize("writes", range(REFUSED_BY, 10))
def test_what_was_refused_is_not_rolled_out_by_the_next_attempt(ready: Ready, writes: int) -> None:
    ready.fake.behaviours[f"v{ready.new}"] = Behaviour(error_rate=0.6)
    run_until_killed(ready, Fuse(writes))
    assert ready.world.registry.journal(JOURNAL)["state"] in ("refused", "reverted")
    ready.fake.misbehave(ready.release(ready.new), Behaviour())  # a second draw might pass
    assert "requests failed" in failing(lambda: full_rollout(ready.context(), ready.fake), GateFailed)
    reverted(ready)


def test_a_rollback_that_was_begun_is_not_crossed(ready: Ready) -> None:
    run_until_killed(ready, Fuse(RELEASED_BY))
    fuse = Fuse(4)  # stopped after the traffic moved and before the aliases did
    with contextlib.suppress(Killed):
        rollback(ready.world.model, fuse.guard(ready.fake), fuse.guard(ready.world.tracking.client), "a person")
    assert (ready.world.registry.champion(), ready.traffic()) == (ready.new, {f"v{ready.old}": 100})
    assert "rollback was begun" in failing(lambda: full_rollout(ready.context(), ready.fake), RegistryError)
    assert ready.traffic() == {f"v{ready.old}": 100}
    rollback(ready.world.model, ready.fake, ready.world.tracking.client, "the same person")
    assert ready.aliases()[:2] == (ready.old, ready.new)


def test_a_refusal_is_final_where_its_evidence_cannot_be_kept(ready: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    ready.fake.behaviours[f"v{ready.new}"] = Behaviour(error_rate=0.6)

    def away(*given: object, **named: object) -> None:
        raise OSError("the artefact store does not answer")

    monkeypatch.setattr(Tracking, "record", away)
    failing(lambda: full_rollout(ready.context(), ready.fake), GateFailed)
    reverted(ready)


def test_a_neighbours_burst_stops_no_rollout_but_a_slow_challenger_does(
    world_maker: WorldMaker, fake: FakeController, quiet: None
) -> None:
    ready = ready_in(world_maker(guardrails={"max_p99_ms": 700}, rollout={"steps": [100], "requests": 230}), fake)
    slow, good = Behaviour(latency_s=1.5), Behaviour()
    ready.fake.behaviours[f"v{ready.new}"] = slow
    once_more = Stage.once_more

    def over(stage: Stage, *given: Any) -> None:
        ready.fake.misbehave(ready.release(ready.new), good)
        once_more(stage, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stage, "once_more", over)
        output = full_rollout(ready.context(), ready.fake)
    released(ready)
    assert any("tested once more, since p99" in note for note in output.details["notes"])


@pytest.mark.parametrize(("broken", "error"), [("set_routes", Unavailable), ("retire", GateFailed)])
def test_a_splitter_that_does_not_answer_turns_no_refusal_into_a_release(
    ready: Ready, monkeypatch: pytest.MonkeyPatch, broken: str, error: type[SlipstreamError]
) -> None:
    ready.fake.behaviours[f"v{ready.new}"] = Behaviour(error_rate=0.6)
    works = getattr(ready.fake, broken)

    def away(*given: Any) -> None:
        if broken == "set_routes" and given[1].weights.get(f"v{ready.new}"):
            return works(*given)  # it fails on the way back
        raise Unavailable("the splitter does not answer")

    with monkeypatch.context() as patch:
        patch.setattr(ready.fake, broken, away)
        patch.setattr(guarded, "PUT_BACK_PAUSE_S", 0.01)
        failing(lambda: full_rollout(ready.context(), ready.fake), error)
    ready.fake.misbehave(ready.release(ready.new), Behaviour())
    failing(lambda: full_rollout(ready.context(), ready.fake), GateFailed)
    reverted(ready)


def test_what_was_rolled_back_meanwhile_is_not_released_again(ready: Ready) -> None:
    run_until_killed(ready, Fuse(RELEASED_BY))
    assert ready.world.registry.champion() == ready.new
    rollback(ready.world.model, ready.fake, ready.world.tracking.client, "a person")
    assert "rolled back at" in failing(lambda: full_rollout(ready.context(), ready.fake), RegistryError)
    assert ready.world.registry.champion() == ready.old
    assert ready.traffic() == {f"v{ready.old}": 100}


def test_a_rollback_since_a_killed_rollout_is_where_the_next_refusal_goes_back_to(ready: Ready) -> None:
    run_until_killed(ready, Fuse(4))
    rollback(ready.world.model, ready.fake, ready.world.tracking.client, "a person")
    assert ready.aliases()[:2] == (ready.older, ready.old)
    another = ready.world.version("another")
    ready.world.registry.set_alias("challenger", another)
    chosen = ready.world.selected(another, ready.older)
    ready.fake.behaviours[f"v{another}"] = Behaviour(error_rate=0.6)
    context = ready.world.context("rollout", (*ready.outputs[:2], chosen, ready.world.tried()), "run-2")
    failing(lambda: full_rollout(context, ready.fake), GateFailed)
    assert ready.aliases() == (ready.older, ready.old, None)
    assert ready.traffic() == {f"v{ready.older}": 100}


@pytest.mark.parametrize("broken", ["set_registered_model_alias", "set_registered_model_tag"])
def test_mlflow_down_in_the_middle_loses_nothing(ready: Ready, broken: str) -> None:
    context = ready.context()

    class Down(_Guarded):
        def __getattr__(self, name: str) -> Any:
            if name == broken:
                from mlflow.exceptions import MlflowException

                def fail(*args: Any, **kwargs: Any) -> None:
                    raise MlflowException("API request failed: connection refused")

                return fail
            return getattr(self._subject, name)

    tracking = Tracking(ready.world.spec, Down(context.tracking.client, Fuse(0)))
    cut_off = Context(context.spec, context.inputs, "rollout", context.identity, tracking, context.run, context.home)
    failing(lambda: full_rollout(cut_off, ready.fake), Unavailable)
    assert ready.world.registry.champion() == ready.old
    assert ready.traffic() == {f"v{ready.old}": 100}
    full_rollout(ready.context(), ready.fake)
    released(ready)
