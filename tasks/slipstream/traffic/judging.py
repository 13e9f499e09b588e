"""The verdicts of the small-scale test, from the evidence gathered so far. Pure: no traffic, no registry."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from slipstream.contract import Verdict
from slipstream.data import Split
from slipstream.measure import gates
from slipstream.measure.metrics import base as metrics
from slipstream.measure.metrics.base import Metric, Records, metric_for
from slipstream.spec import Spec
from slipstream.traffic import answers
from slipstream.traffic.answers import Pair
from slipstream.traffic.base import Release
from slipstream.traffic.guarded import Count, served_ms
from slipstream.traffic.load import Record


@dataclass
class Evidence:
    """What shadow and canary have found."""

    spec: Spec
    split: Split
    challenger: Release
    cap_ms: float
    """Cap on the p99 that clients see."""
    noisy: bool = False
    """Whether others kept the machine busy, so that an absolute latency says little."""
    pairs: list[Pair] = field(default_factory=list)
    unanswered: int = 0
    """Mirrored requests that the champion answered and the challenger did not."""
    canary: list[Record] = field(default_factory=list)
    canary_count: Count = field(default_factory=Count)
    """Of the challenger in the canary, users' requests included."""

    def verdicts(self) -> tuple[Verdict, ...]:
        """One verdict for each question."""
        limits, objective = self.spec.guardrails, self.spec.objective
        rng, sure = np.random.default_rng(self.spec.seed), objective.confidence
        champion_ms, challenger_ms = self._server_ms()
        drop = metrics.drop(self.metric, *self._records(), sure, rng)
        found = [
            self._errors(),
            gates.disagreement(self._different(), len(self._asked_once()), limits.max_disagreement, sure),
            gates.accuracy_of(drop, limits.max_accuracy_drop, sure),
            self._forgiving(gates.p99_ratio(champion_ms, challenger_ms, limits.max_p99_ratio, sure, rng)),
            gates.p99_cap(served_ms(self.canary), self.cap_ms, sure),
        ]
        if objective.latency_p99_ms is not None:
            verdict = gates.p99_cap(challenger_ms, objective.latency_p99_ms, sure)
            found.append(self._forgiving(verdict.model_copy(update={"gate": "latency"})))
        return tuple(found)

    def figures(self) -> dict[str, Any]:
        """Numbers for the record."""
        champion_ms, challenger_ms = self._server_ms()
        quality = [100 * metrics.value(self.metric, records) for records in self._records()]
        return {
            "pairs": len(self.pairs),
            "samples": len(self._asked_once()),
            "different": self._different(),
            "unanswered": self.unanswered,
            "canary_requests": len(self.canary),
            "canary_answered_by_challenger": len(self._theirs()),
            "champion_quality": quality[0] if np.isfinite(quality[0]) else None,
            "challenger_quality": quality[1] if np.isfinite(quality[1]) else None,
            "champion_server_p50_ms": _median(champion_ms),
            "challenger_server_p50_ms": _median(challenger_ms),
            "noisy": self.noisy,
        }

    @property
    def metric(self) -> Metric:
        """The spec's."""
        return metric_for(self.spec.objective.metric)

    def _records(self) -> tuple[Records, Records]:
        """Those of champion's and challenger's answers."""
        return answers.records(self._asked_once(), self.split, self.metric)

    def _different(self) -> int:
        return answers.different(self._asked_once(), self.metric)

    def _asked_once(self) -> list[Pair]:
        """One pair for each sample. A short split is asked again and again, and the same answer is no new evidence."""
        return list({pair.sample: pair for pair in self.pairs}.values())

    def _server_ms(self) -> tuple[list[float], list[float]]:
        """Latencies inside the servers, on the same requests at the same time."""
        return [p.champion.latency_ms for p in self.pairs], [p.challenger.latency_ms for p in self.pairs]

    def _theirs(self) -> list[Record]:
        return [r for r in self.canary if r.release in (self.challenger.name, None)]

    def _errors(self) -> Verdict:
        """Unanswered mirrored requests and failed canary requests; one that nobody answered is the challenger's."""
        errors = self.unanswered + self.canary_count.errors
        n = len(self.pairs) + self.unanswered + self.canary_count.requests
        return gates.error_rate(errors, n, self.spec.guardrails.max_error_rate, self.spec.objective.confidence)

    def _forgiving(self, verdict: Verdict) -> Verdict:
        """A latency that fails on a noisy machine may be a neighbour's fault: measure on before saying no."""
        if verdict.answer != "fail" or not self.noisy:
            return verdict
        reason = f"{verdict.reason}; but this machine was too busy to hold that against the challenger"
        return verdict.model_copy(update={"answer": "inconclusive", "reason": reason})


def _median(values: list[float]) -> float | None:
    return float(np.median(values)) if values else None
