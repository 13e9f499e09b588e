"""A rollout whose process is really killed, with a real Envoy, real model servers and a real MLflow."""

import os
import signal
import time

import pytest
from tests.steps.stages import World, WorldMaker
from tests.steps.test_live import PATIENT, platform, released_then_challenged
from tests.traffic.conftest import TOY_SERVER

from slipstream.home import Home
from slipstream.release import rejections, watchdog
from slipstream.release.releases import drift
from slipstream.steps.rollback import rollback
from slipstream.steps.rollout import full_rollout
from slipstream.traffic.base import Routes
from slipstream.traffic.envoy import EnvoyController

__all__ = ["platform"]
pytestmark = pytest.mark.slow
BACK_WITHIN_S = 30.0


def rolled_out_by_a_child(world: World, at: tuple[Home, str], outputs: tuple) -> int:
    """Process id of a child that rolls the challenger out."""
    child = os.fork()
    if child == 0:
        control = EnvoyController(*at, server=TOY_SERVER)
        try:
            full_rollout(world.context("rollout", (*outputs, world.tried())), control)
        finally:
            os._exit(1)
    return child


def test_a_killed_rollout_has_its_traffic_back_within_30_s(world_maker: WorldMaker, platform: tuple[Home, str]) -> None:
    slow = {"steps": [50, 100], "requests": 5000, "rate_per_s": 20}
    world = world_maker(guardrails=PATIENT, rollout=slow)
    control = EnvoyController(*platform, server=TOY_SERVER)
    outputs, champion, _ = released_then_challenged(world)
    child = rolled_out_by_a_child(world, platform, outputs)
    try:
        while len(control.routes(world.model).weights) < 2:
            assert os.waitpid(child, os.WNOHANG) == (0, 0), "the rollout ended before it split the traffic"
            time.sleep(0.1)
        time.sleep(2)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    killed = time.monotonic()
    assert len(control.routes(world.model).weights) == 2, "nobody has put it back yet"
    while control.routes(world.model) != Routes(weights={f"v{champion}": 100}):
        assert time.monotonic() - killed < 10 * BACK_WITHIN_S
        sentences = watchdog.look_at_all([world.model], lambda: control, world.tracking.client)
        print(f"{time.monotonic() - killed:.1f} s after SIGKILL: {sentences or 'the lease is still valid'}")
        time.sleep(0 if sentences else watchdog.INTERVAL_S)
    assert time.monotonic() - killed < BACK_WITHIN_S
    assert world.registry.champion() == champion
    world.registry.set_alias("previous", world.version("older"))
    for who in ("alice", "bob"):
        print(who, rollback(world.model, control, world.tracking.client, who))
    assert control.routes(world.model) == Routes(weights={f"v{world.registry.champion()}": 100})
    assert drift(world.model, control) == []
    print(*[r.sentence() for r in rejections.all_of(world.registry)], sep="\n")
