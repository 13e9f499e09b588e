"""A model whose small-scale test has passed, and what serving must look like after each way that a rollout can end."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import pytest
from tests.steps.stages import FAIL, PASS, World, validated

from slipstream.contract import Release, StepOutput, Verdict
from slipstream.contract.handover import RolledBack
from slipstream.release import moves, rejections
from slipstream.release.releases import drift
from slipstream.runner.context import Context
from slipstream.serving import client
from slipstream.steps import champion, rollout, select, trial
from slipstream.steps.rollback import rollback
from slipstream.store.tracking import fetch
from slipstream.traffic import small_scale, stepwise
from slipstream.traffic.base import Routes
from slipstream.traffic.fake import FakeController
from slipstream.traffic.guarded import Stage


@dataclass
class Ready:
    """`old` is champion and serves, `older` is previous, `new` is the challenger."""

    world: World
    fake: FakeController
    older: str
    old: str
    new: str
    outputs: tuple[StepOutput, ...]

    def context(self, run_key: str = "run-1", step: str = "rollout") -> Context:
        return self.world.context(step, self.outputs, run_key)

    def release(self, version: str) -> Release:
        return self.world.registry.release(version)

    def aliases(self) -> tuple[str | None, ...]:
        return tuple(self.world.registry.alias(a) for a in ("champion", "previous", "challenger"))

    def traffic(self) -> dict[str, int]:
        return self.fake.routes(self.world.model).weights

    def rolled_out(self, controller: Any = None, run_key: str = "run-1") -> StepOutput:
        return rollout.full_rollout(self.context(run_key), controller or self.fake)

    def tried(self, controller: Any = None, run_key: str = "run-1") -> StepOutput:
        return trial.small_scale_test(self.context(run_key, "trial"), controller or self.fake)

    def selected(self, controller: Any = None, run_key: str = "run-1") -> StepOutput:
        outputs = (validated("int8"), *self.outputs[:2])
        return select.run(self.world.context("select", outputs, run_key, recipes=["int8"]))

    def rolled_back(self, controller: Any = None, by: str = "alice", **given: Any) -> RolledBack:
        return rollback(self.world.model, controller or self.fake, self.world.tracking.client, by, **given)

    def settled(self) -> None:
        """Aliases, traffic, moves and a live request agree."""
        assert drift(self.world.model, self.fake) == []
        newest = moves.newest(self.world.registry)
        assert newest is None or not newest.open
        champion = self.world.registry.champion()
        assert newest is None or newest.decided[0] == champion
        previous = self.world.registry.alias("previous")
        rejected = {self.world.registry.tags(v)["slipstream.sha256"] for v in (champion, previous) if v} & set(
            rejections.active(self.world.registry)
        )
        assert not rejected
        body = client.body(np.zeros((1, 10), np.float32))
        url = self.fake.endpoint(self.world.model).url + client.infer_path(self.world.model)
        answers = [httpx.post(url, content=body, headers={"content-type": "application/json"}) for _ in range(3)]
        assert {(a.status_code, a.headers[client.RELEASE]) for a in answers} == {(200, f"v{champion}")}

    def released(self) -> None:
        """The state after a release: rollback has somewhere to go."""
        self.settled()
        assert self.aliases() == (self.new, self.old, None)
        assert self.fake.deployed(self.world.model) >= {f"v{self.new}", f"v{self.old}"}
        tags = self.world.registry.tags(self.new)
        assert tags["slipstream.released_by"] == "run-1"
        assert tags["slipstream.replaced"] == self.old
        assert tags["slipstream.rollout.errors"].startswith("pass")
        assert tags["slipstream.trial.accuracy"].startswith("pass")

    def reverted(self, challenger: str | None = None) -> None:
        """The state after a refusal, or as before a test."""
        self.settled()
        assert self.aliases() == (self.old, self.older, challenger)
        if challenger is None:
            assert f"v{self.new}" not in self.fake.deployed(self.world.model)

    def back(self) -> None:
        """The state after the first release was rolled back."""
        self.settled()
        assert self.aliases()[:2] == (self.older, None)
        assert list(rejections.active(self.world.registry)) == [self.world.engine("old").sha256]


def ready_in(world: World, fake: FakeController) -> Ready:
    older, old, new = (world.version(n) for n in ("older", "old", "int8"))
    for alias, version in (("champion", old), ("previous", older), ("challenger", new)):
        world.registry.set_alias(alias, version)
    fake.deploy(world.registry.release(older), fetch(world.engine("older")))
    fake.deploy(world.registry.release(old), fetch(world.engine("old")))
    fake.set_routes(world.model, Routes(weights={f"v{old}": 100}))
    outputs = (world.built("baseline"), world.built("int8"), world.selected(new, old), world.tried())
    return Ready(world, fake, older, old, new, outputs)


ERRORS = PASS.model_copy(update={"gate": "errors"})
BREACH = FAIL.model_copy(update={"gate": "errors", "reason": "28 of 500 requests failed"})


def measure(patch: pytest.MonkeyPatch, verdict: Callable[[], Verdict]) -> None:
    """Stages 2 and 3 change the traffic as ever, and find this verdict instead of sending requests."""

    def steps(stage: Stage) -> tuple[Verdict, ...]:
        for share in (50, 100):
            stage.controller.set_routes(stage.model, stage.weights(share))
            stage.controller.observe(stage.challenger)
        return (verdict(),)

    def test(stage: Stage) -> tuple[tuple[Verdict, ...], dict[str, Any]]:
        for routes in (stage.weights(0, mirror=stage.challenger), stage.weights(5)):
            stage.controller.set_routes(stage.model, routes)
            stage.controller.observe(stage.challenger)
        return (verdict(),), {"figures": {}, "notes": []}

    patch.setattr(champion, "compare", lambda context, registry, version, rows: rows)  # nothing loads these engines
    patch.setattr(stepwise, "measure", steps)
    patch.setattr(small_scale, "measure", test)
