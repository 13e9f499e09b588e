"""Measurements of stage 3: the traffic moves step by step under guardrails. Moves no alias.

Champion and challenger are compared in every step. At the last one, the champion no longer answers users; it then gets
a copy of every request if the splitter can mirror to it, so that the comparison continues.
"""

import datetime
import logging
from collections.abc import Sequence

from slipstream.contract import Verdict, combine
from slipstream.errors import DataError
from slipstream.measure import guardrails, sequential
from slipstream.measure.waivers import waive
from slipstream.traffic.answers import Pair
from slipstream.traffic.guard import CAP
from slipstream.traffic.guarded import Phase, Stage
from slipstream.traffic.load import Record

log = logging.getLogger(__name__)

EXTRA = 3
"""Maximum repetitions of the last step that compares the two, while a verdict is inconclusive."""


def measure(stage: Stage) -> tuple[Verdict, ...]:
    """Return the verdicts over all requests, after the traffic has moved; those of a second attempt after a retest."""
    stage.probe(stage.spec.rollout.rate_per_s)
    verdicts = _climb(stage)
    if len(verdicts) == 1 and stage.retest(verdicts[0], stage.spec.rollout.rate_per_s):
        verdicts = _climb(stage)
    return verdicts


def _climb(stage: Stage) -> tuple[Verdict, ...]:
    """Move step by step to all the traffic; end at once with the first guardrail, alone, or failing verdict."""
    steps, verdicts = stage.spec.rollout.steps, tuple[Verdict, ...]()
    compared = [share for share in steps if share < 100 or _copies(stage)]
    for share in steps:
        for number in range(1, 2 + (EXTRA if share == max(compared, default=0) else 0)):
            phase = _step(stage, f"{share}%" if number == 1 else f"{share}%-{number}", share)
            if phase.breach is not None:
                return (phase.breach,)
            verdicts = _verdicts(stage)
            if combine(verdicts) != "inconclusive":
                break
        if combine(verdicts) == "fail":
            break
    return verdicts


def _copies(stage: Stage) -> bool:
    """Return whether a champion without traffic can be queried too: KServe gives it no address then."""
    return stage.controller.answers(stage.champion) is not None


def _step(stage: Stage, name: str, share: int) -> Phase:
    settings = stage.spec.rollout
    if share < 100 or not _copies(stage):
        return stage.phase(name, stage.weights(share), settings.requests, settings.rate_per_s)
    routes = stage.weights(share, mirror=stage.champion)
    records: list[Record] = []
    try:
        for phase, pairs, _ in stage.compared(name, routes, settings.requests, settings.rate_per_s):
            records += phase.records
            stage.seen.peaks += _peaks(pairs)
    except DataError as error:  # a log that users' own requests have filled; the earlier steps have been compared
        log.warning("rollout: the answers at 100 %% are not compared: %s", error)
        return Phase(name, records, None)
    return phase


def _peaks(pairs: Sequence[Pair]) -> list[list[float]]:
    """Return slowest answers of blocks of requests that both answered, in their order, as times in the servers."""
    champion_ms, challenger_ms = ([p.champion.latency_ms for p in pairs], [p.challenger.latency_ms for p in pairs])
    peaks = sequential.blocks(champion_ms, challenger_ms, guardrails.BLOCK)
    columns = (peaks.champion_ms, peaks.champion_n, peaks.challenger_ms, peaks.challenger_n)
    return [list(row) for row in zip(*(c.tolist() for c in columns), strict=True)]


def _verdicts(stage: Stage) -> tuple[Verdict, ...]:
    """Return errors, p99 and memory of the challenger against the champion's, over all requests of the rollout so
    far."""
    limits, sure, totals = stage.spec.guardrails, stage.spec.objective.confidence, stage.seen
    verdicts = (
        stage.errors(),
        stage.unless_crowded(guardrails.typical_ratio(sequential.Peaks.of(totals.peaks), limits.max_p99_ratio, sure)),
        stage.unless_crowded(guardrails.p99_limit(CAP, totals.challenger_ms, limits.max_p99_ms, sure)),
        stage.memory(),
    )
    return waive(verdicts, limits.waivers, datetime.datetime.now(datetime.UTC).date())
