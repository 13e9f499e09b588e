"""What stage 2 measures: rounds of shadow and canary until every verdict is conclusive. Moves no alias."""

import logging
from typing import Any

from slipstream.contract import Verdict, combine
from slipstream.measure import gates
from slipstream.traffic import answers
from slipstream.traffic.guarded import CAP, Phase, Stage
from slipstream.traffic.judging import Evidence

log = logging.getLogger(__name__)

ROUNDS = 2
"""Shadow and canary are repeated while a verdict is inconclusive, at most this often in all."""


def measure(stage: Stage) -> tuple[tuple[Verdict, ...], dict[str, Any]]:
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
