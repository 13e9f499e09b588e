"""The verdicts of the small-scale test, from the evidence gathered so far. Sends nothing, moves no alias."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from slipstream.contract import Json, Verdict
from slipstream.measure import guardrails, stats
from slipstream.measure.metrics import base as metrics
from slipstream.measure.metrics.base import Metric, Records, metric_for
from slipstream.traffic import answers
from slipstream.traffic.answers import Pair
from slipstream.traffic.guard import CAP
from slipstream.traffic.guarded import Stage
from slipstream.traffic.load import Record


@dataclass
class Evidence:
    """Evidence of shadow and canary, in addition to the guardrails' counts in `stage.seen`."""

    stage: Stage
    latest: dict[int, Pair] = field(default_factory=dict)
    """Last pair of answers by sample: a short split is repeated, and the same answer is no new evidence. Not all pairs
    are kept, since answers may be large."""
    champion_ms: list[float] = field(default_factory=list)
    challenger_ms: list[float] = field(default_factory=list)
    """Latencies inside the servers, on the same requests at the same time, in the order of the requests."""
    unanswered: int = 0
    """Mirrored requests that the champion answered and the challenger did not."""
    canary: list[Record] = field(default_factory=list)
    looks: int = 0
    """How often the evidence was evaluated after more pairs were added."""

    def add_pairs(self, pairs: Sequence[Pair], unanswered: int) -> None:
        """Add more pairs, in the order of the requests."""
        self.latest |= {pair.sample: pair for pair in pairs}
        self.champion_ms += [pair.champion.latency_ms for pair in pairs]
        self.challenger_ms += [pair.challenger.latency_ms for pair in pairs]
        self.unanswered += unanswered

    def verdicts(self) -> tuple[Verdict, ...]:
        """Return one verdict for each question."""
        limits, objective, stage = self.stage.spec.guardrails, self.stage.spec.objective, self.stage
        rng, sure = np.random.default_rng(stage.spec.seed), objective.confidence
        at_this_look = guardrails.looks_confidence(sure, max(self.looks, 1))
        champion_ms, challenger_ms = self.champion_ms, self.challenger_ms
        drop = metrics.drop(self.metric, *self._records(), at_this_look, rng)
        differ = stats.wilson(self._different(), len(self.latest), at_this_look)
        served = [r.served_ms for r in self.canary if r.release == stage.challenger.name and not r.failed]
        verdicts = [
            stage.errors(),
            guardrails.disagreement(differ, limits.max_disagreement, at_this_look),
            guardrails.accuracy(drop, limits.max_accuracy_drop, at_this_look),
            stage.unless_crowded(guardrails.p99_ratio(champion_ms, challenger_ms, limits.max_p99_ratio, sure)),
            stage.unless_crowded(guardrails.p99_limit(CAP, [*challenger_ms, *served], limits.max_p99_ms, sure)),
            stage.memory(),
        ]
        if objective.latency_p99_ms is not None:
            verdict = guardrails.p99_limit("latency", challenger_ms, objective.latency_p99_ms, sure)
            verdicts.append(stage.unless_crowded(verdict))
        return tuple(verdicts)

    def figures(self) -> Json:
        """Return numbers for the record."""
        quality = [100 * metrics.value(self.metric, records) for records in self._records()]
        return {
            "pairs": len(self.champion_ms),
            "samples": len(self.latest),
            "different": self._different(),
            "unanswered": self.unanswered,
            "canary_requests": len(self.canary),
            "canary_answered_by_challenger": sum(r.release == self.stage.challenger.name for r in self.canary),
            "champion_quality": quality[0] if np.isfinite(quality[0]) else None,
            "challenger_quality": quality[1] if np.isfinite(quality[1]) else None,
            "champion_server_p50_ms": _median(self.champion_ms),
            "challenger_server_p50_ms": _median(self.challenger_ms),
            "noisy": self.stage.transient() is not None,
        }

    @property
    def metric(self) -> Metric:
        """The spec's."""
        return metric_for(self.stage.spec.objective.metric)

    def _records(self) -> tuple[Records, Records]:
        """Return those of champion's and challenger's answers."""
        return answers.records([*self.latest.values()], self.stage.split, self.metric)

    def _different(self) -> int:
        return answers.different(self.latest.values(), self.metric)


def _median(values: list[float]) -> float | None:
    return float(np.median(values)) if values else None
