"""Measurements of stage 2: shadow until the evidence decides, then a canary. Moves no alias.

The shadow, which no user sees, provides most of the evidence. While that is inconclusive, it continues, up to four
times the plan; a rejected or undecided engine never reaches users.
"""

import datetime
import logging

from slipstream.contract import Json, Verdict, combine
from slipstream.measure.waivers import waive
from slipstream.traffic.guarded import Phase, Stage
from slipstream.traffic.judging import Evidence

log = logging.getLogger(__name__)

ROUNDS = 4
"""Shadow and canary are each repeated while a verdict is inconclusive, at most this often in total."""


def measure(stage: Stage) -> tuple[tuple[Verdict, ...], Json]:
    """Return verdicts of the small-scale test, and the figures behind them. A breach ends it at once."""
    rate_per_s = stage.spec.small_scale_test.rate_per_s
    stage.probe(rate_per_s)
    evidence = Evidence(stage)
    breach = _test(stage, evidence)
    if breach is not None and stage.retest(breach, rate_per_s):
        evidence = Evidence(stage)
        breach = _test(stage, evidence)
    verdicts = (breach,) if breach is not None else _waived(stage, evidence)
    return verdicts, evidence.figures()


def _test(stage: Stage, evidence: Evidence) -> Verdict | None:
    """Gather evidence until it decides; return the guardrail that stopped it, if any."""
    for run in (_shadow, _canary):
        for number in range(1, ROUNDS + 1):
            phase = run(stage, evidence, "" if number == 1 else f"-{number}")
            if phase.breach is not None:
                stage.notes.append(f"stopped in {phase.name}")
                return phase.breach
            verdicts = _waived(stage, evidence)
            if combine(verdicts) != "inconclusive":
                break
            open_ones = ", ".join(v.gate for v in verdicts if v.answer == "inconclusive")
            log.info("trial: %s leaves %s inconclusive", phase.name, open_ones)
        if combine(verdicts) != "pass":
            break
    return None


def _waived(stage: Stage, evidence: Evidence) -> tuple[Verdict, ...]:
    today = datetime.datetime.now(datetime.UTC).date()
    return waive(evidence.verdicts(), stage.spec.guardrails.waivers, today)


def _shadow(stage: Stage, evidence: Evidence, suffix: str) -> Phase:
    """Mirror every request to the challenger, and pair the answers by request id."""
    settings, tally = stage.spec.small_scale_test, stage.seen.tally
    routes, errors = stage.weights(0, mirror=stage.challenger), tally.challenger_errors
    for phase, pairs, unanswered in stage.compared(f"shadow{suffix}", routes, settings.shadow, settings.rate_per_s):
        if phase.breach is None:
            tally.add_missing(unanswered - (tally.challenger_errors - errors))
            evidence.add_pairs(pairs, unanswered)
            errors = tally.challenger_errors
    evidence.looks += 1
    return phase


def _canary(stage: Stage, evidence: Evidence, suffix: str) -> Phase:
    """Let the challenger answer a small share of the requests."""
    settings = stage.spec.small_scale_test
    share = max(1, round(settings.share))
    phase = stage.phase(f"canary{suffix}", stage.weights(share), settings.requests, settings.rate_per_s)
    evidence.canary += phase.records
    return phase
