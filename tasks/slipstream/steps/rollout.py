"""rollout (stage 3): the traffic moves step by step under guardrails; then the registry follows.

Unfinished work of an earlier step is settled first (release/settle.py). Then the order of writes, each of which can
be the last before a crash:

    1. the move is recorded: where the traffic comes from, and which version `previous` named
    2. traffic 25 → 50 → 100 %, each step observed
    3. evidence and verdicts in MLflow; the move is `promoting`
    4. alias `previous` to the old champion
    5. alias `champion` to the challenger                   ← from here on the release is out
    6. audit tags, alias `challenger` removed, the move is `done`
    7. servers that no alias names are retired

Recovery, by the next attempt, another step or the watchdog, starts by reading the champion. If it is the challenger,
the rollout is completed from 6; if it is still the old one, the traffic goes back. So champion and traffic agree in
both cases. Before and after each write the token is compared (release/moves.py): a rollback in between wins.

A breach restores the traffic, rejects the engine by its digest, and then cleans up.

Details: `handover.Rollout`.
"""

import logging
from dataclasses import dataclass
from typing import NoReturn

from slipstream import traffic
from slipstream.contract import Json, Release, StepInput, StepOutput, Verdict, combine
from slipstream.contract.handover import Rollout
from slipstream.errors import GateFailed, SlipstreamError, Superseded
from slipstream.plugins import TRIAL
from slipstream.release import moves, rejections, settle
from slipstream.release.moves import Move
from slipstream.release.releases import Incumbent, incumbent, keep_serving, selected, serve, traffic_lock
from slipstream.runner.context import Context, require_pass
from slipstream.spec import Spec
from slipstream.store.registry import CHAMPION, PREVIOUS, RELEASED_BY, REPLACED, ROLLOUT_RUN, Registry, verdict_tags
from slipstream.store.tracking import fetch
from slipstream.traffic import stepwise
from slipstream.traffic.base import TrafficController
from slipstream.traffic.guarded import Stage, put_back_if_possible
from slipstream.traffic.termination import sigterm_as_exit

log = logging.getLogger(__name__)


def settings(spec: Spec, inputs: StepInput) -> Json:
    """Return what determines the result."""
    return {
        "rollout": spec.rollout.model_dump(mode="json"),
        "guardrails": spec.guardrails.model_dump(mode="json"),
        "run": inputs.run_key,
        "version": selected(inputs).version,
    }


def run(context: Context) -> StepOutput:
    """Roll the challenger out. Raise GateFailed after everything was restored, RegistryError on stale evidence."""
    with traffic_lock(context.home, context.spec.model.name):
        return full_rollout(context, traffic.controller(context.home))


def full_rollout(context: Context, controller: TrafficController) -> StepOutput:
    """Do the same with the given controller."""
    chosen, inputs = selected(context.inputs), context.inputs
    version, registry = str(chosen.version), Registry(context.spec.model.name, context.tracking.client)
    settle.settle(registry, lambda: controller)
    if chosen.already_champion:
        registry.expect_champion(chosen.champion)
        keep_serving(registry, controller, incumbent(registry, inputs, str(chosen.winner)), inputs.run_key)
        return context.output(details=Rollout(skipped=f"version {version} is this engine and serves already"))
    trial = _passed_trial(inputs)
    if registry.champion() == version and registry.tags(version).get(RELEASED_BY) == inputs.run_key:
        log.info("rollout: version %s was released by an earlier attempt of this run", version)
        return _released(context, registry, version)
    _require_not_refused(registry, version, context.run.run_id)
    registry.expect_champion(chosen.champion)
    old = incumbent(registry, inputs, str(chosen.winner))
    facts = {"to": version, "then_previous": old.version, "run_id": context.run.run_id}
    with (
        sigterm_as_exit(),
        moves.begin(registry, controller, "rollout", inputs.run_key, old.release.name, **facts) as move,
    ):
        _Rollout(context, move, old, trial.verdicts).run()
    return _released(context, registry, version)


def _released(context: Context, registry: Registry, version: str) -> StepOutput:
    """Return the output, from the evidence that was recorded before the release."""
    tags = registry.tags(version)
    recorded = context.tracking.output(tags[ROLLOUT_RUN])
    details = Rollout.of(recorded).model_copy(update={"released": version, "previous": tags.get(REPLACED) or None})
    return context.output(verdicts=recorded.verdicts, details=details)


def _require_not_refused(registry: Registry, version: str, run_id: str) -> None:
    """Raise if an earlier attempt refused the challenger, by a verdict or for lack of evidence."""
    for move in moves.entries(registry):
        if move.run_id == run_id and move.to == version and move.state == "reverted":
            require_pass("rollout", move.verdicts)
    rejections.require_allowed(registry, version)


@dataclass
class _Rollout:
    context: Context
    move: Move
    old: Incumbent
    trial: tuple[Verdict, ...]
    promoting: bool = False
    """Whether the champion alias may have moved: until then the registry need not be queried when reverting."""

    @property
    def registry(self) -> Registry:
        return self.move.registry

    @property
    def version(self) -> str:
        """The challenger's version."""
        return str(self.move.entry.to)

    @property
    def release(self) -> Release:
        """The challenger's release."""
        return self.registry.release(self.version)

    def run(self) -> None:
        """Run everything between the first and the last write. Raise GateFailed, RegistryError, Superseded."""
        stage = self._stage()
        try:
            self._still_champion()
            serve(self.move.controller, self.old)
            artifact = self.registry.artifact(self.version)
            self.move.controller.deploy(self.release, fetch(artifact), artifact.sha256)
            verdicts = stepwise.measure(stage)
            if passed := combine(verdicts) == "pass":
                self._promote(stage, verdicts)
        except Superseded:
            raise  # the traffic belongs to another move now
        except BaseException:
            self._go_back(stage)
            raise
        if not passed:
            if combine(verdicts) == "inconclusive" and (reason := stage.transient()) is not None:
                self._leave_open(stage, verdicts, reason)
            self._refuse(stage, verdicts)
        settle.finish_release(self.move)

    def _stage(self) -> Stage:
        return Stage(
            spec=self.context.spec,
            controller=self.move.controller,
            split=self.context.data.test,
            champion=self.old.release,
            challenger=self.release,
            run_key=self.context.inputs.run_key,
            progress=self.context.run.progress,
        )

    def _promote(self, stage: Stage, verdicts: tuple[Verdict, ...]) -> None:
        """Do writes 3 to 5. The evidence comes first: completing the release needs nothing of this process."""
        self._record(stage, verdicts)
        tags = {**verdict_tags("trial", self.trial), **verdict_tags("rollout", verdicts)}
        self.move.tag(self.version, {**tags, ROLLOUT_RUN: self.context.run.run_id})
        self.move.update(state="promoting")
        self._still_champion()
        if self.old.version is not None:
            self.move.set_alias(PREVIOUS, self.old.version)
        self._still_champion()
        self.promoting = True
        self.move.set_alias(CHAMPION, self.version)

    def _still_champion(self) -> None:
        """Check the champion right before the write, since MLflow has no compare-and-swap."""
        self.registry.expect_champion(self.old.version)

    def _go_back(self, stage: Stage) -> None:
        """After an error, send the traffic where the champion alias points, and end the move."""
        if self.promoting and self._is_out():
            return  # the next attempt, or the watchdog, completes the release
        settle.abort(self.move, stage)

    def _is_out(self) -> bool:
        """Return whether write 5 succeeded, after an error around it."""
        try:
            return self.registry.champion() == self.version
        except SlipstreamError as error:
            log.warning("rollout: the registry does not say who is champion (%s); the next attempt will see", error)
            return False

    def _leave_open(self, stage: Stage, verdicts: tuple[Verdict, ...], reason: str) -> NoReturn:
        """On an outage or an overloaded machine, restore the traffic and reject nothing; the next attempt starts
        over."""
        put_back_if_possible(stage)
        self._record(stage, verdicts)
        settle.put_back(self.move)
        require_pass("rollout", verdicts, reason)
        raise AssertionError("unreachable: what passes is not left open")

    def _refuse(self, stage: Stage, verdicts: tuple[Verdict, ...]) -> NoReturn:
        """On a breach, restore the traffic first, then reject, then do everything else. Raise GateFailed."""
        put_back_if_possible(stage)
        settle.refuse(self.move, verdicts, lambda: self._record(stage, verdicts))
        require_pass("rollout", verdicts)
        raise AssertionError("unreachable: what passes is not refused")

    def _record(self, stage: Stage, verdicts: tuple[Verdict, ...]) -> None:
        """Write the evidence into this step's MLflow run; nothing is released yet."""
        details = Rollout(timeline=tuple(stage.timeline), notes=tuple(stage.notes))
        output = self.context.output(verdicts=verdicts, details=details)
        self.context.tracking.record(self.context.run, output)


def _passed_trial(inputs: StepInput) -> StepOutput:
    """Return the small-scale test's output. Raise GateFailed if there is none, or it did not pass."""
    trial = inputs.output_of(TRIAL)
    if trial is None:
        raise GateFailed("rollout: there is no evidence of the small-scale test; run it first")
    require_pass("rollout: small-scale test", trial.verdicts)
    return trial
