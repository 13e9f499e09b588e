"""The verdicts of the small-scale test, from the evidence gathered so far. Pure: no traffic, no registry."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from slipstream.contract import Verdict
from slipstream.data import Split
from slipstream.measure import gates
from slipstream.spec import Spec
from slipstream.traffic import answers
from slipstream.traffic.answers import Pair
from slipstream.traffic.base import Release
from slipstream.traffic.guarded import served_ms
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

    def verdicts(self) -> tuple[Verdict, ...]:
        """One verdict for each question."""
        limits, objective = self.spec.guardrails, self.spec.objective
        rng, sure = np.random.default_rng(self.spec.seed), objective.confidence
        champion_ms, challenger_ms = self._server_ms()
        labelled = answers.scores(self.pairs, self.split, objective.metric)
        found = [
            self._errors(),
            gates.disagreement(answers.different(self.pairs), len(self.pairs), limits.max_disagreement, sure),
            gates.accuracy(*labelled, limits.max_accuracy_drop, sure, rng),
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
        right = answers.scores(self.pairs, self.split, self.spec.objective.metric)
        return {
            "pairs": len(self.pairs),
            "different": answers.different(self.pairs),
            "unanswered": self.unanswered,
            "canary_requests": len(self.canary),
            "canary_answered_by_challenger": len(self._theirs()),
            "champion_quality": _percent(right[0]),
            "challenger_quality": _percent(right[1]),
            "champion_server_p50_ms": _median(champion_ms),
            "challenger_server_p50_ms": _median(challenger_ms),
            "noisy": self.noisy,
        }

    def _server_ms(self) -> tuple[list[float], list[float]]:
        """Latencies inside the servers, on the same requests at the same time."""
        return [p.champion.latency_ms for p in self.pairs], [p.challenger.latency_ms for p in self.pairs]

    def _theirs(self) -> list[Record]:
        return [r for r in self.canary if r.release in (self.challenger.name, None)]

    def _errors(self) -> Verdict:
        """Unanswered mirrored requests and failed canary requests; one that nobody answered is the challenger's."""
        errors = self.unanswered + sum(r.failed for r in self._theirs())
        n = len(self.pairs) + self.unanswered + len(self._theirs())
        return gates.error_rate(errors, n, self.spec.guardrails.max_error_rate, self.spec.objective.confidence)

    def _forgiving(self, verdict: Verdict) -> Verdict:
        """A latency that fails on a noisy machine may be a neighbour's fault: measure on before saying no."""
        if verdict.answer != "fail" or not self.noisy:
            return verdict
        reason = f"{verdict.reason}; but this machine was too busy to hold that against the challenger"
        return verdict.model_copy(update={"answer": "inconclusive", "reason": reason})


def _percent(scores: Any) -> float | None:
    return 100 * float(np.mean(scores)) if len(scores) else None


def _median(values: list[float]) -> float | None:
    return float(np.median(values)) if values else None
