"""What stage 3 measures: the traffic moves step by step, guarded. Moves no alias."""

from slipstream.contract import Verdict, combine
from slipstream.measure import gates
from slipstream.traffic.guarded import CAP, Count, Stage, served_ms
from slipstream.traffic.load import Record

EXTRA = 3
"""Repetitions of the last step while a verdict is inconclusive, at most."""


def measure(stage: Stage) -> tuple[Verdict, ...]:
    """Write 2. The verdicts over all requests; where the cap was broken, those of a second attempt."""
    stage.probe(stage.spec.rollout.rate_per_s)
    verdicts = _climb(stage)
    if len(verdicts) == 1 and verdicts[0].gate == CAP:
        stage.once_more(verdicts[0], stage.spec.rollout.rate_per_s)
        verdicts = _climb(stage)
    return verdicts


def _climb(stage: Stage) -> tuple[Verdict, ...]:
    """Step by step to all the traffic; ends at once with the first guardrail, alone, or failing verdict."""
    settings, records, count = stage.spec.rollout, list[Record](), Count()
    shares = [*settings.steps, *[settings.steps[-1]] * EXTRA]
    verdicts: tuple[Verdict, ...] = ()
    for number, share in enumerate(shares, start=1):
        name = f"{share}%" if number <= len(settings.steps) else f"{share}%-{number - len(settings.steps) + 1}"
        phase = stage.phase(name, stage.weights(share), settings.requests, settings.rate_per_s)
        if phase.breach is not None:
            return (phase.breach,)
        records, count = records + phase.records, count + phase.count
        verdicts = _judge(stage, records, count)
        answer = combine(verdicts)
        if answer == "fail" or (answer == "pass" and number >= len(settings.steps)):
            break
    return verdicts


def _judge(stage: Stage, records: list[Record], count: Count) -> tuple[Verdict, ...]:
    """Errors of the challenger, and the p99 that clients see, over all requests of the rollout so far."""
    limits, sure = stage.spec.guardrails, stage.spec.objective.confidence
    return (
        gates.error_rate(count.errors, count.requests, limits.max_error_rate, sure),
        gates.p99_cap(served_ms(records), stage.cap_ms(), sure),
    )
