"""trial (stage 2): champion and challenger side by side, first in shadow, then with a small share of the traffic.

Whatever happens, the traffic ends where it was: all of it on the champion, no mirror. Also after a SIGTERM; and
after a SIGKILL as soon as the step is tried again.

Details: `timeline` (a point for each window of requests), `champion` (version or None), `champion_release`,
`challenger` (version), `figures`, `notes`; or `skipped` with the reason.
"""

import logging
from typing import Any

from slipstream import traffic
from slipstream.contract import StepInput, StepOutput, Verdict, combine
from slipstream.measure import gates
from slipstream.registry import CHALLENGER, Registry
from slipstream.spec import Spec
from slipstream.steps.base import Context, require_pass
from slipstream.tracking import fetch
from slipstream.traffic import answers
from slipstream.traffic.base import TrafficController
from slipstream.traffic.guarded import CAP, Phase, Stage
from slipstream.traffic.judging import Evidence
from slipstream.traffic.releases import incumbent, moving_alone, selected, serve, sweep
from slipstream.traffic.termination import terminable

log = logging.getLogger(__name__)

ROUNDS = 2
"""Shadow and canary are repeated while a verdict is inconclusive, at most this often in all."""


def settings(spec: Spec, inputs: StepInput) -> dict[str, Any]:
    """What decides the result."""
    return {
        "small_scale_test": spec.small_scale_test.model_dump(mode="json"),
        "guardrails": spec.guardrails.model_dump(mode="json"),
        "objective": spec.objective.model_dump(mode="json"),
        "run": inputs.run_key,
        "version": selected(inputs)["version"],
    }


def run(context: Context) -> StepOutput:
    """Run the small-scale test. Raises GateFailed when it fails or stays inconclusive."""
    with moving_alone(context.home, context.spec.model.name):
        return small_scale_test(context, traffic.controller(context.home))


def small_scale_test(context: Context, controller: TrafficController) -> StepOutput:
    """The same, with the controller given."""
    chosen = selected(context.inputs)
    registry = Registry(context.spec.model.name, context.tracking.client)
    registry.expect_champion(chosen["champion"])
    champion = incumbent(registry, context.inputs, chosen["winner"])
    if chosen["already_champion"]:
        serve(controller, champion)
        return context.output(details={"skipped": f"version {chosen['version']} is this engine and serves already"})
    stage = Stage(
        spec=context.spec,
        controller=controller,
        split=context.data.test,
        champion=champion.release,
        challenger=registry.release(chosen["version"]),
        run_key=context.inputs.run_key,
        progress=context.run.progress,
    )
    facts = {"champion": champion.version, "champion_release": champion.release.name, "challenger": chosen["version"]}
    with terminable():
        serve(controller, champion)  # also puts right what a killed attempt left
        controller.deploy(stage.challenger, fetch(registry.artifact(chosen["version"])))
        sweep(controller, registry, stage.champion, stage.challenger)
        try:
            verdicts, found = _test(stage)
        except BaseException:
            stage.put_back()
            raise
        output = context.output(verdicts=verdicts, details={"timeline": stage.timeline, **facts, **found})
        try:
            stage.put_back()
            if combine(verdicts) != "pass":
                context.tracking.record(context.run, output)
                registry.set_alias(CHALLENGER, None)
                controller.retire(stage.challenger)
        finally:  # a no stays a no, also where cleaning up fails: the next run does that
            require_pass("small-scale test", verdicts)
    return output


def _test(stage: Stage) -> tuple[tuple[Verdict, ...], dict[str, Any]]:
    """Rounds of shadow and canary until every verdict is conclusive; a breach ends it at once, the cap's the round."""
    stage.probe(stage.spec.small_scale_test.rate_per_s)
    evidence = Evidence(stage.spec, stage.split, stage.challenger, stage.cap_ms())
    verdicts: tuple[Verdict, ...] = ()
    for number in range(1, ROUNDS + 1):
        suffix = "" if number == 1 else f"-{number}"
        phase = _shadow(stage, evidence, f"shadow{suffix}")
        if phase.breach is None:
            phase = _canary(stage, evidence, f"canary{suffix}")
        if phase.breach is not None and phase.breach.gate == CAP and number < ROUNDS:
            stage.once_more(phase.breach, stage.spec.small_scale_test.rate_per_s)
            evidence = Evidence(stage.spec, stage.split, stage.challenger, stage.cap_ms())
            continue
        if phase.breach is not None:
            notes = [*stage.adapted(), f"stopped in {phase.name}"]
            return (phase.breach,), {"figures": evidence.figures(), "notes": notes}
        evidence.noisy = evidence.noisy or stage.noisy()
        evidence.cap_ms = stage.cap_ms()
        verdicts = evidence.verdicts()
        if combine(verdicts) != "inconclusive":
            break
        open_ones = ", ".join(v.gate for v in verdicts if v.answer == "inconclusive")
        log.info("trial: round %d of %d leaves %s inconclusive", number, ROUNDS, open_ones)
    verdicts, notes = gates.settle(verdicts, noisy=evidence.noisy, ratio="p99_ratio")
    return verdicts, {"figures": evidence.figures(), "notes": [*stage.adapted(), *notes]}


def _shadow(stage: Stage, evidence: Evidence, name: str) -> Phase:
    """Mirror every request to the challenger, and pair the answers by request id."""
    settings = stage.spec.small_scale_test
    pairing = answers.pairing(stage.controller, stage.champion, stage.challenger)
    phase = stage.phase(name, stage.weights(0, mirror=True), settings.shadow, settings.rate_per_s)
    if phase.breach is None:
        pairs, unanswered = pairing.pairs(phase.records)
        evidence.pairs += pairs
        evidence.unanswered += unanswered
    return phase


def _canary(stage: Stage, evidence: Evidence, name: str) -> Phase:
    """Let the challenger answer a small share of the requests."""
    settings = stage.spec.small_scale_test
    share = max(1, round(settings.share))
    phase = stage.phase(name, stage.weights(share), settings.requests, settings.rate_per_s)
    evidence.canary += phase.records
    evidence.canary_count += phase.count
    return phase
