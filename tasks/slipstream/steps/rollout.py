"""rollout (stage 3): the traffic moves step by step, guarded; then the registry follows.

The order of writes, each of which can be the last before a crash:

    1. journal `started`: where the traffic comes from, and which version `previous` named
    2. traffic 25 → 50 → 100 %, each step observed
    3. alias `previous` to the old champion
    4. alias `champion` to the challenger                   ← from here on the release is out
    5. audit tags, alias `challenger` removed, journal `done`
    6. servers that no alias names are retired

A step that is tried again reads the champion first. Is it the challenger, the rollout finishes from 5. Is it still
the old one, the traffic goes back, and the rollout starts anew. So champion and traffic agree after either.

A breach puts the traffic back, and then makes the journal `refused`, from which a later attempt does not roll out but
finishes the refusal. A version that was released and rolled back meanwhile is not released again.

Details: `timeline`, `notes`, `released` (version), `previous` (version or None); or `skipped` with the reason.
"""

import datetime
import logging
from dataclasses import dataclass
from typing import Any, NoReturn

from slipstream import traffic
from slipstream.contract import StepInput, StepOutput, Verdict, combine
from slipstream.errors import GateFailed, RegistryError, SlipstreamError
from slipstream.registry import CHALLENGER, CHAMPION, PREVIOUS, ROLLED_BACK, Registry, verdict_tags
from slipstream.spec import Spec
from slipstream.steps import rollback
from slipstream.steps.base import Context, require_pass
from slipstream.tracking import fetch
from slipstream.traffic import stepwise
from slipstream.traffic.base import Release, Routes, TrafficController
from slipstream.traffic.guarded import Stage
from slipstream.traffic.releases import Incumbent, incumbent, moving_alone, selected, serve, sweep
from slipstream.traffic.termination import terminable

log = logging.getLogger(__name__)

JOURNAL = "rollout"
STARTED, REFUSED, REVERTED, DONE = "started", "refused", "reverted", "done"
"""What the journal says under `state`."""


def settings(spec: Spec, inputs: StepInput) -> dict[str, Any]:
    """What decides the result."""
    return {
        "rollout": spec.rollout.model_dump(mode="json"),
        "guardrails": spec.guardrails.model_dump(mode="json"),
        "run": inputs.run_key,
        "version": selected(inputs)["version"],
    }


def run(context: Context) -> StepOutput:
    """Roll the challenger out. Raises GateFailed after everything was put back, RegistryError on stale evidence."""
    with moving_alone(context.home, context.spec.model.name):
        return full_rollout(context, traffic.controller(context.home))


def full_rollout(context: Context, controller: TrafficController) -> StepOutput:
    """The same, with the controller given."""
    chosen = selected(context.inputs)
    rollout = _Rollout(context, controller, Registry(context.spec.model.name, context.tracking.client), chosen)
    if chosen["already_champion"]:
        rollout.registry.expect_champion(chosen["champion"])
        serve(controller, rollout.incumbent())
        return context.output(details={"skipped": f"version {chosen['version']} is this engine and serves already"})
    trial = _passed_trial(context.inputs)
    with terminable():
        moved = rollout.move()
        rollout.finish(trial.verdicts, moved.verdicts)
    done = {"released": rollout.version, "previous": rollout.registry.alias(PREVIOUS)}
    return context.output(verdicts=moved.verdicts, details=moved.details | done)


@dataclass
class _Rollout:
    context: Context
    controller: TrafficController
    registry: Registry
    chosen: dict[str, Any]
    promoting: bool = False
    """Whether the champion alias may have moved: until then the registry need not be asked on the way back."""

    @property
    def version(self) -> str:
        """The challenger's version."""
        return str(self.chosen["version"])

    @property
    def release(self) -> Release:
        """The challenger's release."""
        return self.registry.release(self.version)

    def _deploy(self) -> None:
        """Serve the engine that stage 1 judged and registered, and no other bytes."""
        artifact = self.registry.artifact(self.version)
        self.controller.deploy(self.release, fetch(artifact), artifact.sha256)

    def incumbent(self) -> Incumbent:
        """What serves now."""
        return incumbent(self.registry, self.context.inputs, self.chosen["winner"])

    def move(self) -> StepOutput:
        """Writes 1 to 4, and the evidence; that of an earlier attempt when it got that far."""
        self._require_no_rollback()
        journal = self.registry.journal(JOURNAL)
        if journal.get("to") == self.version == self.registry.champion():
            log.info("rollout: %s is champion already; an earlier attempt was stopped after that", self.release.key)
            return self.context.tracking.output(journal["run_id"])
        self._require_not_rolled_back()
        self.registry.expect_champion(self.chosen["champion"])
        old = self.incumbent()
        serve(self.controller, old)
        if journal.get("run_id") == self.context.run.run_id and journal["state"] in (REFUSED, REVERTED):
            self._revert(tuple(Verdict.model_validate(v) for v in journal["verdicts"]))
        self._begin(old)
        self._deploy()
        stage = self._stage(old)
        try:
            verdicts = stepwise.measure(stage)
            if combine(verdicts) == "pass":
                return self._promote(old, stage, verdicts)
        except BaseException:
            if not (self.promoting and self._is_out()):
                stage.put_back()
            raise
        self._refuse(stage, verdicts)

    def finish(self, trial: tuple[Verdict, ...], verdicts: tuple[Verdict, ...]) -> None:
        """Writes 5 and 6."""
        self._require_no_rollback()
        self.registry.expect_champion(self.version)
        wanted = Routes(weights={self.release.name: 100})
        self._deploy()
        if self.controller.routes(self.release.model) != wanted:
            self.controller.set_routes(self.release.model, wanted)
        self.registry.tag(
            self.version,
            {
                **verdict_tags("trial", trial),
                **verdict_tags("rollout", verdicts),
                "slipstream.released_by": self.context.inputs.run_key,
                "slipstream.released_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "slipstream.replaced": str(self.registry.alias(PREVIOUS) or ""),
            },
        )
        self.registry.set_alias(CHALLENGER, None)
        self.registry.write_journal(JOURNAL, self.registry.journal(JOURNAL) | {"state": DONE})
        sweep(self.controller, self.registry)

    def _begin(self, old: Incumbent) -> None:
        """Write 1. What `previous` named before an attempt that was stopped is kept: 3 may have overwritten it."""
        journal = self.registry.journal(JOURNAL)
        # An attempt that was stopped counts only where it came from what serves now: not before a rollback since.
        stopped = journal.get("state") in (STARTED, REFUSED) and journal["from"] == old.release.name
        previous = journal["previous"] if stopped else self.registry.alias(PREVIOUS)
        entry = {"state": STARTED, "to": self.version, "from": old.release.name, "previous": previous}
        entry["run_id"] = self.context.run.run_id
        self.registry.write_journal(JOURNAL, entry)

    def _stage(self, old: Incumbent) -> Stage:
        return Stage(
            spec=self.context.spec,
            controller=self.controller,
            split=self.context.data.test,
            champion=old.release,
            challenger=self.release,
            run_key=self.context.inputs.run_key,
            progress=self.context.run.progress,
        )

    def _promote(self, old: Incumbent, stage: Stage, verdicts: tuple[Verdict, ...]) -> StepOutput:
        """Writes 3 and 4. Before them the evidence is recorded, for an attempt that only has to finish."""
        evidence = self._record(stage, verdicts)
        self._require_no_rollback()
        self.registry.expect_champion(old.version)
        if old.version is not None:
            self.registry.set_alias(PREVIOUS, old.version)
        self.promoting = True
        self.registry.set_alias(CHAMPION, self.version)
        return evidence

    def _is_out(self) -> bool:
        """After an error around write 4: whether it got through. The traffic goes where the champion alias points."""
        try:
            return self.registry.champion() == self.version
        except SlipstreamError as error:
            log.warning("rollout: the registry does not say who is champion (%s); the next attempt will see", error)
            return False

    def _refuse(self, stage: Stage, verdicts: tuple[Verdict, ...]) -> NoReturn:
        """A breach: traffic first, then what a later attempt goes by. Raises GateFailed."""
        try:
            stage.put_back()
        finally:  # also when the splitter does not answer: what was refused must not be rolled out by the next attempt
            refused = [{"gate": v.gate, "answer": v.answer, "reason": v.reason[:500]} for v in verdicts]
            journal = self.registry.journal(JOURNAL)
            self.registry.write_journal(JOURNAL, journal | {"state": REFUSED, "verdicts": refused})
        try:
            self._record(stage, verdicts)
        finally:
            self._revert(verdicts)

    def _revert(self, verdicts: tuple[Verdict, ...]) -> NoReturn:
        """The rest of a refusal: aliases, then the server. Raises GateFailed."""
        journal = self.registry.journal(JOURNAL)
        self.registry.set_alias(PREVIOUS, journal["previous"])
        self.registry.set_alias(CHALLENGER, None)
        self.registry.write_journal(JOURNAL, journal | {"state": REVERTED})
        try:
            self.controller.retire(self.release)
        finally:  # a server that stays is retired by the next run; the no is final
            require_pass("rollout", verdicts)
        raise AssertionError("unreachable: what passes is not refused")

    def _require_no_rollback(self) -> None:
        """What is being rolled back goes on going back. On a cluster a rollout may live on without its pool's slot."""
        if self.registry.journal(rollback.JOURNAL).get("state") == rollback.STARTED:
            raise RegistryError(
                f"{self.registry.model}: a rollback was begun and is not done; let it finish, or ask for it again"
            )

    def _require_not_rolled_back(self) -> None:
        """An attempt that was stopped after it had released, and was then rolled back, must not release again."""
        at = self.registry.tags(self.version).get(ROLLED_BACK)
        if at is not None:
            raise RegistryError(
                f"{self.registry.model} version {self.version} was released and rolled back at {at}; start a new run "
                "to release anything else"
            )

    def _record(self, stage: Stage, verdicts: tuple[Verdict, ...]) -> StepOutput:
        """Write the evidence into this step's MLflow run; nothing is released yet."""
        details = {"timeline": stage.timeline, "notes": stage.adapted(), "released": None}
        output = self.context.output(verdicts=verdicts, details=details)
        self.context.tracking.record(self.context.run, output)
        return output


def _passed_trial(inputs: StepInput) -> StepOutput:
    """The small-scale test's output. Raises GateFailed when there is none, or it did not pass."""
    trial = inputs.output_of("trial")
    if trial is None:
        raise GateFailed("rollout: there is no evidence of the small-scale test; run it first")
    require_pass("rollout: small-scale test", trial.verdicts)
    return trial
