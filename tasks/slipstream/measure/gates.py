"""Gates of stage 1: evidence in, verdicts out. A gate never passes for lack of data. Stages 2 and 3: guardrails.py.

A gate passes only if the one-sided confidence bound on the bad side is within the limit. Missing data, NaN or too few
samples are `inconclusive`, which is checked first. Two rules distinguish `fail` from `inconclusive`:

- a finished measurement (accuracy, speed-up): fail if the estimate itself is beyond the limit, since no more data
  will come and the estimate already violates the limit;
- a latency: fail only if the bound on the good side is beyond the limit as well.
"""

import math
from dataclasses import dataclass

import numpy.typing as npt

from slipstream.contract import Answer, Verdict
from slipstream.measure import stats
from slipstream.measure.stats import Bounds


@dataclass(frozen=True)
class _Gate:
    """A gate's name, its limit and the unit of both; turns bounds into verdicts."""

    name: str
    limit: float
    unit: str

    def final(self, value: Bounds, what: str) -> Verdict:
        """Return the verdict of a finished measurement."""
        beyond = value.estimate > self.limit
        return self._judge(value, what, beyond=beyond)

    def guard(self, value: Bounds, what: str) -> Verdict:
        """Return the verdict of a guardrail that is evaluated repeatedly while data arrive."""
        return self._judge(value, what, beyond=value.low > self.limit)

    def _judge(self, value: Bounds, what: str, *, beyond: bool) -> Verdict:
        if not value.known:
            return self.verdict("inconclusive", f"{value.n:,} usable observations carry no bound", value)
        return self.verdict("pass" if value.high <= self.limit else "fail" if beyond else "inconclusive", what, value)

    def verdict(self, answer: Answer, reason: str, value: Bounds) -> Verdict:
        """Return a verdict in which an unknown number is None, since JSON has no NaN."""
        estimate, low, high = (v if math.isfinite(v) else None for v in (value.estimate, value.low, value.high))
        return Verdict(
            gate=self.name,
            answer=answer,
            reason=reason,
            estimate=estimate,
            low=low,
            high=high,
            limit=self.limit,
            unit=self.unit,
            n=value.n,
        )


def per_engine(confidence: float, competing: int) -> float:
    """Return the confidence of each bound, so that the best of `competing` engines is good with the given confidence.

    All engines are compared to find the winner, so the chance that any of them passes wrongly must stay within 1 −
    confidence: Bonferroni's bound, which holds however the engines' errors are related. Stepwise methods (Holm's, or a
    fixed order) do not apply: they bound wrong answers among hypotheses that are tested in an order set beforehand or
    by their strength, while the winner is chosen by speed, which does not favor the surest.
    """
    return 1.0 - (1.0 - confidence) / max(competing, 1)


def accuracy(
    baseline_scores: npt.ArrayLike, engine_scores: npt.ArrayLike, max_drop_pp: float, confidence: float
) -> Verdict:
    """Judge non-inferiority, paired on the same samples: the upper bound of the drop must be within the allowed drop.

    baseline_scores, engine_scores: (N,) in [0, 1]. Method: see `stats.paired_drop`.
    """
    return accuracy_of(stats.paired_drop(baseline_scores, engine_scores, confidence), max_drop_pp, confidence)


def accuracy_of(drop: Bounds, max_drop_pp: float, confidence: float, competing: int = 1) -> Verdict:
    """Judge the same, from a precomputed drop, with the confidence of each bound (`per_engine`)."""
    return _drop(_Gate("accuracy", max_drop_pp, "pp"), drop, confidence, competing, "drop")


def champion(drop: Bounds, max_drop_pp: float, confidence: float, competing: int, version: str) -> Verdict:
    """Judge the same against the champion: a retrained baseline may itself have become worse."""
    gate = _Gate("champion", max_drop_pp, "pp")
    return _drop(gate, drop, confidence, competing, f"against champion version {version}: drop")


def _drop(gate: _Gate, drop: Bounds, confidence: float, competing: int, what: str) -> Verdict:
    pp = drop.scaled(100.0)
    best = f" (the best of {competing})" if competing > 1 else ""
    reason = f"{what} {pp.estimate:.2f} points, {_bound(confidence)}{best} {pp.high:.2f}, allowed {gate.limit:g}"
    return gate.final(pp, f"{reason}, n {pp.n:,}").model_copy(update={"final": True})


def latency(latencies_ms: npt.ArrayLike, limit_ms: float, confidence: float, noisy: bool = False) -> Verdict:
    """Judge the p99 of single requests against the objective's limit; needs the 662 queries of LoadGen's rule.

    latencies_ms: (N,). On a noisy machine other load may cause a breach, so it is inconclusive, never a fail.
    """
    verdict = _p99("latency", latencies_ms, limit_ms, confidence, stats.min_queries(0.99))
    if noisy and verdict.answer == "fail":
        reason = f"{verdict.reason}; but others used the machine, so this is not held against the engine"
        return verdict.model_copy(update={"answer": "inconclusive", "reason": reason})
    return verdict


MIN_SPEEDUP = 1.02
"""Two copies of one ONNX Runtime engine in one process differed by about 1 % (2-core EPYC, under load): memory layout,
not speed. A smaller ratio than this is therefore not called faster."""


def speedup(
    ratio: Bounds,
    confidence: float,
    reference: str = "the baseline's FP32 engine on the same target",
    crowded: bool = False,
) -> Verdict:
    """Judge the speed-up: the lower bound of the ratio must be above 1.02. Pruned or INT8 engines often miss it.

    `crowded`: other processes took cores that both sides need, so the estimate is unreliable and only the widened
    interval decides: below 1.02 is "fail", across it "inconclusive".
    """
    gate = _Gate("speedup", MIN_SPEEDUP, "×")
    what = f"{ratio.estimate:.2f}× {reference}, {_bound(confidence, 'lower')} {ratio.low:.2f}×, from {ratio.n} rounds"
    if not ratio.known:
        return gate.verdict("inconclusive", f"{ratio.n} usable rounds say nothing about the speed-up", ratio)
    if crowded:
        what += ", made wider since others took the cores that it needs"
    if ratio.low > MIN_SPEEDUP:
        return gate.verdict("pass", what, ratio)
    if (ratio.high if crowded else ratio.estimate) <= MIN_SPEEDUP:
        return gate.verdict("fail", f"not faster: {what}", ratio)
    return gate.verdict("inconclusive", f"perhaps not faster: {what}", ratio)


def _p99(name: str, latencies_ms: npt.ArrayLike, limit_ms: float, confidence: float, needed: int) -> Verdict:
    gate = _Gate(name, limit_ms, "ms")
    p99 = stats.percentile_bounds(latencies_ms, 0.99, confidence)
    if math.isnan(p99.estimate):
        return gate.verdict("inconclusive", f"no usable latencies among {p99.n:,}", p99)
    if p99.n < needed and p99.low <= limit_ms:
        reason = f"{p99.n:,} queries are too few for a p99, which needs {needed:,}"
        return gate.verdict("inconclusive", reason, p99)
    high = f"{p99.high:.2f}" if math.isfinite(p99.high) else "unknown"
    what = f"p99 {p99.estimate:.2f} ms, bounds {p99.low:.2f} and {high} ms, limit {limit_ms:g} ms, n {p99.n:,}"
    if p99.low > limit_ms:
        return gate.verdict("fail", what, p99)
    return gate.guard(p99, what)


def _bound(confidence: float, side: str = "upper") -> str:
    return f"{100 * confidence:.4g} % {side} bound"
