"""Stage 3, with a real MLflow and the fake controller: what it releases, what it refuses, and every crash."""

from typing import Any, cast

import pytest
from mlflow.exceptions import MlflowException
from tests.release.ready import Ready, ready_in
from tests.steps.stages import FAIL, World, WorldMaker, failing

from slipstream.contract import Verdict
from slipstream.errors import GateFailed, RegistryError, SlipstreamError, Unavailable, Undecided
from slipstream.runner.context import Context
from slipstream.steps.rollout import full_rollout
from slipstream.store.tracking import Tracking
from slipstream.traffic import guarded
from slipstream.traffic.base import Routes
from slipstream.traffic.fake import Behaviour, FakeController
from slipstream.traffic.guarded import Stage


@pytest.fixture
def ready(world: World, fake: FakeController) -> Ready:
    return ready_in(world, fake)


def test_a_good_challenger_is_released(ready: Ready) -> None:
    output = full_rollout(ready.context(), ready.fake)
    ready.released()
    assert (output.details["released"], output.details["previous"]) == (ready.new, ready.old)
    gates = ("errors", "p99_ratio", "p99_cap", "memory")
    assert {v.gate: v.answer for v in output.verdicts} == dict.fromkeys(gates, "pass")
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
    ready.reverted()
    recorded = ready.world.recorded(context)
    assert recorded.details["released"] is None
    assert [p["phase"] for p in recorded.details["timeline"]] == ["50%"]


def test_too_little_evidence_is_no_release(world_maker: WorldMaker, fake: FakeController, quiet: None) -> None:
    ready = ready_in(world_maker(objective={"confidence": 0.9999}, rollout={"steps": [100], "requests": 60}), fake)
    assert "inconclusive" in failing(lambda: full_rollout(ready.context(), fake), GateFailed)
    ready.reverted()


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
    context.run.progress = move  # type: ignore[method-assign]  # another process, at the worst moment
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
    ready.released()
    assert second.verdicts == first.verdicts
    assert second.details == first.details


def test_a_refusal_is_final_where_its_evidence_cannot_be_kept(ready: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    ready.fake.behaviours[f"v{ready.new}"] = Behaviour(error_rate=0.6)

    def away(*given: object, **named: object) -> None:
        raise OSError("the artifact store does not answer")

    monkeypatch.setattr(Tracking, "record", away)
    failing(lambda: full_rollout(ready.context(), ready.fake), GateFailed)
    ready.reverted()


def test_a_burst_that_is_over_at_the_second_try_stops_no_rollout(
    world_maker: WorldMaker, fake: FakeController, quiet: None
) -> None:
    # Far apart: a machine that stalls for a second, as CI's do, is no slow challenger.
    rollout = {"steps": [100], "requests": 700, "rate_per_s": 100}
    ready = ready_in(world_maker(guardrails={"max_p99_ms": 3000}, rollout=rollout), fake)
    ready.fake.behaviours[f"v{ready.new}"] = Behaviour(latency_s=4)
    retest = Stage.retest

    def over(stage: Stage, breach: Verdict, rate_per_s: float) -> bool:
        assert breach.gate == "p99_cap"
        ready.fake.misbehave(ready.release(ready.new), Behaviour())
        return retest(stage, breach, rate_per_s)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stage, "retest", over)
        output = full_rollout(ready.context(), ready.fake)
    ready.released()
    assert any("tested again, since p99" in note for note in output.details["notes"])


def test_a_challenger_that_really_is_slow_breaks_the_cap_twice(
    world_maker: WorldMaker, fake: FakeController, quiet: None
) -> None:
    ready = ready_in(world_maker(guardrails={"max_p99_ms": 300}, rollout={"steps": [100], "requests": 700}), fake)
    ready.fake.behaviours[f"v{ready.new}"] = Behaviour(latency_s=0.6)
    assert "p99_cap: " in failing(lambda: full_rollout(ready.context(), fake), GateFailed)
    ready.reverted()


def test_an_overloaded_machine_refuses_nothing(ready: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    """The traffic goes back, the aliases stay, and the next attempt begins again."""
    monkeypatch.setattr(Stage, "crowd", lambda stage, records: "processes waited 97 % of the time")
    ready.fake.behaviours[f"v{ready.new}"] = Behaviour(refuse_rate=0.6, hang_rate=0.2)
    failing(lambda: full_rollout(ready.context(), ready.fake), Undecided)
    assert ready.aliases() == (ready.old, ready.older, ready.new)
    assert ready.traffic() == {f"v{ready.old}": 100}
    ready.fake.misbehave(ready.release(ready.new), Behaviour())
    full_rollout(ready.context(), ready.fake)
    ready.released()


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
    assert (ready.aliases(), ready.traffic()) == ((ready.old, ready.older, None), {f"v{ready.old}": 100})
    assert (f"v{ready.new}" in ready.fake.deployed(ready.world.model)) == (broken == "retire")  # the next run's to do


@pytest.mark.parametrize("broken", ["set_registered_model_alias", "set_registered_model_tag"])
def test_mlflow_down_in_the_middle_loses_nothing(ready: Ready, broken: str) -> None:
    context = ready.context()

    class Down:
        def __getattr__(self, name: str) -> Any:
            if name == broken:

                def fail(*args: Any, **kwargs: Any) -> None:
                    raise MlflowException("API request failed: connection refused")

                return fail
            return getattr(context.tracking.client, name)

    tracking = Tracking(ready.world.spec, cast(Any, Down()))
    cut_off = Context(context.spec, context.inputs, "rollout", context.identity, tracking, context.run, context.home)
    failing(lambda: full_rollout(cut_off, ready.fake), Unavailable)
    assert ready.world.registry.champion() == ready.old
    assert ready.traffic() == {f"v{ready.old}": 100}
    full_rollout(ready.context(), ready.fake)
    ready.released()
