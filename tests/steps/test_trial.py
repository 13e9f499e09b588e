import datetime
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from mlflow.exceptions import MlflowException
from tests.steps.stages import World, WorldMaker, failing

from slipstream.contract import Release, StepOutput, Verdict
from slipstream.errors import EXIT_RETRY, DataError, GateFailed, RegistryError, Unavailable, Undecided
from slipstream.runner import run as runner
from slipstream.runner.context import Context
from slipstream.steps.trial import small_scale_test
from slipstream.store.tracking import Tracking
from slipstream.traffic import answers, guarded
from slipstream.traffic.base import Routes
from slipstream.traffic.fake import Behaviour, FakeController


def upstream(world: World, champion: str | None, already: bool = False, name: str = "int8") -> tuple[StepOutput, ...]:
    version = champion if already and champion else world.version(name)
    world.registry.set_alias("challenger", None if already else version)
    return (world.built("baseline"), world.built("int8"), world.selected(version, champion, already))


def with_champion(world: World, fake: FakeController) -> tuple[tuple[StepOutput, ...], Release, Release]:
    """Outputs of select when a champion serves; champion's and challenger's release."""
    champion = world.version("old")
    world.registry.set_alias("champion", champion)
    outputs = upstream(world, champion)
    return outputs, world.registry.release(champion), world.registry.release(outputs[-1].details["version"])


def at_rest(world: World, fake: FakeController, release: Release) -> bool:
    return fake.routes(world.model) == Routes(weights={release.name: 100})


def test_a_good_challenger_passes_and_the_traffic_is_as_before(world: World, fake: FakeController) -> None:
    outputs, champion, challenger = with_champion(world, fake)
    output = small_scale_test(world.context("trial", outputs), fake)
    gates = ("errors", "disagreement", "accuracy", "p99_ratio", "p99_cap", "memory")
    assert {v.gate: v.answer for v in output.verdicts} == dict.fromkeys(gates, "pass")
    assert at_rest(world, fake, champion)
    assert world.registry.alias("challenger") == challenger.name.removeprefix("v")
    assert fake.deployed(world.model) == {champion.name, challenger.name}
    figures = output.details["figures"]
    assert (figures["pairs"], figures["different"], figures["canary_requests"]) == (700, 0, 220)
    assert 20 <= figures["canary_answered_by_challenger"] <= 75  # 20 % of 220
    assert figures["champion_quality"] == figures["challenger_quality"] == 100
    assert [(p["phase"], p["challenger_weight"], p["requests"]) for p in output.details["timeline"]] == [
        ("shadow", 0, 500),
        ("shadow", 0, 200),
        ("canary", 20, 220),
    ]
    assert output.details["champion_release"] == champion.name


def test_answers_that_the_logs_hold_only_in_part_are_compared_part_by_part(
    world: World, fake: FakeController, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Segmentation maps of 2,500 requests take three times the room of a log, and ended the test after four minutes."""
    monkeypatch.setattr(answers, "LIMIT_BYTES", 30_000)
    fake.log_bytes = 30_000
    outputs, champion, _ = with_champion(world, fake)
    output = small_scale_test(world.context("trial", outputs), fake)
    assert all(v.passed for v in output.verdicts) and at_rest(world, fake, champion)
    phases = {p["phase"]: p["requests"] for p in output.details["timeline"]}
    assert {"shadow", "shadow.2", "canary"} <= set(phases)
    assert sum(n for phase, n in phases.items() if phase.startswith("shadow")) == 700
    assert (output.details["figures"]["pairs"], output.details["figures"]["different"]) == (700, 0)


def test_the_first_release_is_compared_with_the_baseline(world: World, fake: FakeController) -> None:
    output = small_scale_test(world.context("trial", upstream(world, None)), fake)
    name = f"baseline-{world.engine('baseline').sha256[:8]}"
    assert output.details["champion"] is None
    assert output.details["champion_release"] == name
    assert fake.routes(world.model) == Routes(weights={name: 100})


BAD = {
    "fails": (Behaviour(error_rate=0.5), "errors", {}),
    "says something else": (Behaviour(answer=lambda b: -np.asarray(b)[:, :10]), "disagreement", {}),
    "answers NaN": (Behaviour(answer=lambda b: np.full((1, 10), np.nan)), "disagreement", {}),
    "is slow": (Behaviour(latency_s=1.5), "p99_", {"max_p99_ms": 700, "max_p99_ratio": 5}),
    "holds too much memory": (Behaviour(memory_mib=9000), "memory", {}),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_challenger_fails_and_is_gone(
    world_maker: WorldMaker, fake: FakeController, quiet: None, case: str
) -> None:
    behaviour, gate, limits = BAD[case]
    world = world_maker(guardrails=limits)
    outputs, champion, challenger = with_champion(world, fake)
    fake.behaviours[challenger.name] = behaviour
    context = world.context("trial", outputs)
    message = failing(lambda: small_scale_test(context, fake), GateFailed)
    assert gate in message
    assert at_rest(world, fake, champion)
    assert fake.deployed(world.model) == {champion.name}
    assert world.registry.alias("challenger") is None
    assert world.registry.champion() == champion.name.removeprefix("v")
    recorded = world.recorded(context)
    # A busy machine turns a slow challenger's "fail" into "inconclusive", which is no pass either.
    answers = ("fail", "inconclusive") if gate == "p99_" else ("fail",)
    assert any(v.gate.startswith(gate) and v.answer in answers for v in recorded.verdicts)
    assert recorded.details["timeline"]
    assert not any(p["phase"].startswith("canary") for p in recorded.details["timeline"])  # no user met it


def test_a_no_stays_a_no_where_cleaning_up_fails(
    world: World, fake: FakeController, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs, champion, challenger = with_champion(world, fake)
    fake.behaviours[challenger.name] = Behaviour(error_rate=1.0)

    def away(release: Release) -> None:
        raise Unavailable("the splitter does not answer")

    monkeypatch.setattr(fake, "retire", away)
    assert "errors: " in failing(lambda: small_scale_test(world.context("trial", outputs), fake), GateFailed)
    assert at_rest(world, fake, champion)


def test_a_no_stays_a_no_where_the_traffic_cannot_be_put_back(
    world: World, fake: FakeController, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs, champion, challenger = with_champion(world, fake)
    fake.behaviours[challenger.name] = Behaviour(error_rate=1.0)
    works, monkey = fake.set_routes, {"left": 1}

    def away(model: str, routes: Routes) -> None:
        if routes.mirror is None and fake.routes(model).mirror is not None and monkey["left"]:
            monkey["left"] -= 1  # once; the second try gets through
            raise Unavailable("the splitter does not answer")
        works(model, routes)

    monkeypatch.setattr(fake, "set_routes", away)
    monkeypatch.setattr(guarded, "PUT_BACK_PAUSE_S", 0.01)
    failing(lambda: small_scale_test(world.context("trial", outputs), fake), GateFailed)
    assert at_rest(world, fake, champion)
    monkey["left"] = 99
    outputs = upstream(world, champion.name[1:], name="other")
    fake.behaviours[world.registry.release(outputs[-1].details["version"]).name] = Behaviour(error_rate=1.0)
    failing(lambda: small_scale_test(world.context("trial", outputs, "run-2"), fake), Unavailable)
    monkey["left"] = 0
    failing(lambda: small_scale_test(world.context("trial", outputs, "run-2"), fake), GateFailed)
    assert at_rest(world, fake, champion)


def test_a_neighbours_burst_fails_no_challenger(
    world_maker: WorldMaker, fake: FakeController, quiet: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = world_maker(guardrails={"max_p99_ms": 2500})  # more than a busy machine makes of a toy server's answers
    outputs, champion, _ = with_champion(world, fake)
    probe, retest, over = guarded.Stage.probe, guarded.Stage.retest, []

    def then_it_begins(stage: guarded.Stage, rate_per_s: float) -> None:
        probe(stage, rate_per_s)
        if not over:
            fake.misbehave(champion, Behaviour(latency_s=5))

    def and_is_over(stage: guarded.Stage, breach: Verdict, rate_per_s: float) -> bool:
        assert (breach.gate, breach.answer) == ("p99_cap", "inconclusive")  # the champion's answers
        over.append(True)
        fake.misbehave(champion, Behaviour())
        return retest(stage, breach, rate_per_s)

    monkeypatch.setattr(guarded.Stage, "probe", then_it_begins)
    monkeypatch.setattr(guarded.Stage, "retest", and_is_over)
    output = small_scale_test(world.context("trial", outputs), fake)
    assert {v.answer for v in output.verdicts} == {"pass"}
    assert any("tested again, since p99" in note for note in output.details["notes"])


def test_an_overloaded_machine_decides_nothing_and_is_tried_again(
    world_maker: WorldMaker, fake: FakeController, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies are lost while everything waits for a processor: no rejection, exit 1, the same challenger next time."""
    monkeypatch.setattr(guarded.Stage, "crowd", lambda stage, records: "processes waited 97 % of the time")
    world = world_maker(small_scale_test={"shadow": 300})
    outputs, champion, challenger = with_champion(world, fake)
    fake.behaviours[challenger.name] = Behaviour(refuse_rate=0.5)
    context = world.context("trial", outputs)
    message = failing(lambda: small_scale_test(context, fake), Undecided)
    assert "processes waited 97 % of the time" in message
    assert Undecided.exit_code == EXIT_RETRY
    assert at_rest(world, fake, champion)
    assert world.registry.alias("challenger") == challenger.name.removeprefix("v")
    assert {v.gate: v.answer for v in world.recorded(context).verdicts}["errors"] == "inconclusive"
    fake.misbehave(challenger, Behaviour())
    assert small_scale_test(world.context("trial", outputs), fake).verdicts


TODAY = datetime.datetime.now(datetime.UTC).date()
DAY = datetime.timedelta(days=1)


@pytest.mark.parametrize(("until", "passes"), [(TODAY + DAY, True), (TODAY - DAY, False)])
def test_a_limit_that_cannot_be_judged_needs_a_persons_word(
    world_maker: WorldMaker, fake: FakeController, monkeypatch: pytest.MonkeyPatch, until: datetime.date, passes: bool
) -> None:
    monkeypatch.setattr(guarded.Stage, "crowd", lambda stage, records: "processes waited 97 % of the time")
    word = {"gate": "latency", "by": "Ann Smith", "reason": "measured on the target host", "until": until.isoformat()}
    world = world_maker(objective={"latency_p99_ms": 0.01}, guardrails={"waivers": [word]})
    outputs, _, _ = with_champion(world, fake)
    context = world.context("trial", outputs)
    if passes:
        output = small_scale_test(context, fake)
        [waived] = [v for v in output.verdicts if v.gate == "latency"]
        assert waived.passed
        assert waived.reason.startswith(f"waived by Ann Smith until {until} (measured on the target host); not judged")
    else:
        assert "latency" in failing(lambda: small_scale_test(context, fake), Undecided)


def test_a_no_stays_a_no_where_mlflow_cannot_be_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refuses:
        @staticmethod
        def run(context: Context) -> StepOutput:
            raise GateFailed("small-scale test: fail")

    def away(*given: object) -> None:
        raise MlflowException("API request failed: connection refused")

    monkeypatch.setattr(Tracking, "fail", away)
    context = world.context("trial", ())
    assert failing(lambda: runner._recorded(cast(Any, Refuses), {}, context), GateFailed) == "small-scale test: fail"


def test_a_breach_stops_at_once(world: World, fake: FakeController) -> None:
    outputs, _, challenger = with_champion(world, fake)
    fake.behaviours[challenger.name] = Behaviour(error_rate=1.0)
    context = world.context("trial", outputs)
    failing(lambda: small_scale_test(context, fake), GateFailed)
    [point] = world.recorded(context).details["timeline"]
    assert point["phase"] == "shadow"
    assert point["requests"] < 700


def test_too_few_requests_are_inconclusive_and_no_pass(
    world_maker: WorldMaker, fake: FakeController, quiet: None
) -> None:
    few = {"shadow": 50, "requests": 50, "rate_per_s": 400}
    world = world_maker(small_scale_test=few, objective={"confidence": 0.999}, guardrails={"max_p99_ratio": 1.01})
    outputs, champion, _ = with_champion(world, fake)
    context = world.context("trial", outputs)
    message = failing(lambda: small_scale_test(context, fake), GateFailed)
    assert "inconclusive" in message
    assert "p99_ratio: p99" in message
    assert at_rest(world, fake, champion)
    phases = [p["phase"] for p in world.recorded(context).details["timeline"]]
    assert phases == ["shadow", "shadow-2", "shadow-3", "shadow-4"]


def test_what_serves_already_is_not_tested_but_served(world: World, fake: FakeController) -> None:
    champion = world.version("int8")
    world.registry.set_alias("champion", champion)
    output = small_scale_test(world.context("trial", upstream(world, champion, already=True)), fake)
    assert "serves already" in output.details["skipped"]
    assert at_rest(world, fake, world.registry.release(champion))


def test_a_killed_attempt_is_put_right_first(world: World, fake: FakeController, tmp_path: Path) -> None:
    outputs, champion, challenger = with_champion(world, fake)
    small_scale_test(world.context("trial", outputs), fake)
    fake.set_routes(world.model, Routes(weights={champion.name: 95, challenger.name: 5}, mirror=challenger.name))
    small_scale_test(world.context("trial", outputs), fake)
    assert at_rest(world, fake, champion)


def test_an_unreachable_splitter_is_retried_and_leaves_the_champion(world: World, fake: FakeController) -> None:
    outputs, champion, challenger = with_champion(world, fake)

    def observe(release: Release) -> None:
        raise Unavailable("Envoy's admin interface does not answer")

    fake.observe = observe  # type: ignore[assignment,method-assign]  # the outage
    failing(lambda: small_scale_test(world.context("trial", outputs), fake), Unavailable)
    assert at_rest(world, fake, champion)
    assert world.registry.alias("challenger") == challenger.name.removeprefix("v")


def test_stale_evidence_is_refused_before_anything_is_touched(world: World, fake: FakeController) -> None:
    outputs, _, _ = with_champion(world, fake)
    world.registry.set_alias("champion", world.version("other"))
    failing(lambda: small_scale_test(world.context("trial", outputs), fake), RegistryError)
    assert fake.deployed(world.model) == set()


def test_without_select_there_is_nothing_to_test(world: World, fake: FakeController) -> None:
    failing(lambda: small_scale_test(world.context("trial", ()), fake), DataError)


TERMINATED = """
import sys, time
from slipstream.traffic.termination import sigterm_as_exit
with sigterm_as_exit():
    try:
        print("moved", flush=True)
        time.sleep(30)
    finally:
        print("put back", flush=True)
"""


def test_sigterm_puts_the_traffic_back() -> None:
    process = subprocess.Popen([sys.executable, "-c", TERMINATED], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "moved\n"
    time.sleep(0.1)
    process.terminate()
    assert process.stdout.readline() == "put back\n"
    assert process.wait(10) == 143
