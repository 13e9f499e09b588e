"""Stages 2 and 3 over KServe: the very functions that drive Envoy, with a real MLflow and toy servers."""

from pathlib import Path

import pytest
from tests.kserve.api_server import ApiServer
from tests.kserve.conftest import NAMESPACE, made
from tests.kserve.kserve_stand_in import KServeStandIn
from tests.steps.stages import World, WorldMaker, failing
from tests.steps.test_live import log_openvino
from tests.traffic.contract import load

from slipstream.contract import StepOutput
from slipstream.errors import GateFailed
from slipstream.release.releases import drift
from slipstream.steps.rollback import rollback
from slipstream.steps.rollout import full_rollout
from slipstream.steps.trial import small_scale_test
from slipstream.store.tracking import fetch
from slipstream.traffic.base import Routes
from slipstream.traffic.guarded import PROBE
from slipstream.traffic.kserve import KServeController

pytestmark = pytest.mark.slow
PATIENT = {"max_p99_ratio": 1000, "max_p99_ms": 20_000, "max_error_rate": 3}
"""A busy machine must not decide these tests."""


@pytest.fixture
def world(world_maker: WorldMaker) -> World:
    return world_maker(guardrails=PATIENT)


def challenged(world: World, name: str = "int8", **behaviour: object) -> tuple[tuple[StepOutput, ...], str, str]:
    """A champion, and the outputs of a run with a challenger: outputs, version of champion and challenger."""
    champion, challenger = world.version("old"), world.version(name, **behaviour)
    world.registry.set_alias("champion", champion)
    world.registry.set_alias("challenger", challenger)
    return (world.built("baseline"), world.built("int8"), world.selected(challenger, champion)), champion, challenger


def test_a_release_from_trial_to_rollback(world: World, control: KServeController) -> None:
    outputs, champion, challenger = challenged(world)
    trial = small_scale_test(world.context("trial", outputs), control)
    figures = trial.details["figures"]
    assert (figures["pairs"], figures["different"], figures["unanswered"]) == (700, 0, 0)
    assert 20 <= figures["canary_answered_by_challenger"] <= 75  # 20 % of 220
    assert control.routes(world.model) == Routes(weights={f"v{champion}": 100})
    output = full_rollout(world.context("rollout", (*outputs, trial)), control)
    assert output.details["released"] == challenger
    assert control.routes(world.model) == Routes(weights={f"v{challenger}": 100})
    assert drift(world.model, control) == []
    rollback(world.model, control, world.tracking.client, "run-2")
    assert control.routes(world.model) == Routes(weights={f"v{champion}": 100})
    assert drift(world.model, control) == []


@pytest.mark.parametrize(
    ("behaviour", "gate"), [({"add": 100.0}, "disagreement"), ({"error_rate": 1.0}, "errors")], ids=["wrong", "fails"]
)
def test_a_bad_challenger_fails_its_trial_and_is_gone(
    world: World, control: KServeController, behaviour: dict[str, object], gate: str
) -> None:
    outputs, champion, _ = challenged(world, f"bad-{gate}", **behaviour)
    assert gate in failing(lambda: small_scale_test(world.context("trial", outputs), control), GateFailed)
    assert control.routes(world.model) == Routes(weights={f"v{champion}": 100})
    assert control.deployed(world.model) == {f"v{champion}"}
    assert (world.registry.champion(), world.registry.alias("challenger")) == (champion, None)


def test_a_server_that_dies_in_the_rollout_is_rolled_back(
    world_maker: WorldMaker, quiet: None, control: KServeController, stand_in: KServeStandIn, api_server: ApiServer
) -> None:
    world = world_maker(guardrails=PATIENT, rollout={"steps": [50, 100], "requests": 800, "rate_per_s": 200})
    outputs, champion, challenger = challenged(world)
    killed = []

    def kill(done: int, total: int, unit: str, **figures: float) -> None:
        if done > PROBE and not killed:
            revisions = stand_in.services[world.model].revisions
            labels = {"slipstream/release": f"v{challenger}"}
            [process] = [r.process for r in revisions.values() if r.template["predictor"]["labels"] == labels]
            assert process is not None
            process.kill()
            killed.append(done)

    context = world.context("rollout", (*outputs, world.tried()))
    context.run.progress = kill  # type: ignore[method-assign]  # the accident, at a known moment
    said = failing(lambda: full_rollout(context, control), GateFailed)
    assert "requests failed" in said or "requests got no answer" in said
    assert killed
    assert control.routes(world.model) == Routes(weights={f"v{champion}": 100})
    assert control.deployed(world.model) == {f"v{champion}"}
    assert (world.registry.champion(), world.registry.alias("previous")) == (champion, None)
    predictor = api_server.get((NAMESPACE, "inferenceservices"), world.model)["spec"]["predictor"]
    assert predictor["labels"] == {"slipstream/release": f"v{champion}"}


def test_a_real_engine_behind_the_real_server(world: World, api_server: ApiServer, tmp_path: Path) -> None:
    """The stand-in runs what the predictor's container names: serving/server.py."""
    log_openvino(world, "real", 1)
    release = world.registry.release(world.version("real"))
    real = KServeStandIn(api_server.client("kserve"), NAMESPACE, tmp_path / "real")
    try:
        control = made(api_server, real.ingress, tmp_path, ready_timeout_s=120)
        control.deploy(release, fetch(world.engine("real")))
        records = load(control, 20, model=world.model, rate=50).records
        assert {(r.status, r.release) for r in records} == {(200, release.name)}
        assert all(0 < (r.server_ms or 0) <= r.latency_ms for r in records)
        observed = control.observe(release)
        assert (observed.requests, observed.errors) == (20, 0)
        assert observed.memory_mib > 10
    finally:
        real.close()
