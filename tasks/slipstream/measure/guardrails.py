"""Verdicts of stages 2 and 3: champion and challenger in the same windows, judged while the requests arrive.

All evidence is always valid (sequential.py), so it may be evaluated at any time. A guardrail passes when the upper
bound is within its limit. It fails when the challenger is certainly worse than allowed: with a fifth of the error
probability that the objective's confidence leaves, since a stage has five guardrails and a rejection is final.
Everything else is inconclusive, and so is every failure that an outage or an overloaded machine may explain.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from slipstream.contract import Answer, Verdict
from slipstream.measure import sequential
from slipstream.measure.sequential import Peaks, Windows, reached
from slipstream.measure.stats import Bounds, unknown

GUARDRAILS = 5
"""errors, p99_ratio, p99_cap, disagreement, accuracy: the guardrails that may reject a healthy release by chance."""
LEAST_ERRORS = 5
"""Minimum number of failed requests for a final rejection, however unlikely fewer may be: a handful can be one
client's."""
BLOCK = 50
"""Requests in a block whose slowest answers are compared: about a p98, in half a second at 100 requests/s."""
TAIL = 0.99
"""The percentile that the latency guardrails protect."""
SMALL_SERVER_MIB = 512.0
"""Servers below this size are not compared: they hold little but their libraries."""


@dataclass(frozen=True)
class _Gate:
    """A gate's name, its limit and the unit of both."""

    name: str
    limit: float
    unit: str

    def verdict(self, answer: Answer, reason: str, value: Bounds | None = None) -> Verdict:
        """Return a verdict in which an unknown number is None, since JSON has no NaN."""
        value = value or unknown()
        estimate, low, high = (v if math.isfinite(v) else None for v in (value.estimate, value.low, value.high))
        return Verdict(
            gate=self.name, answer=answer, reason=reason, estimate=estimate, low=low, high=high, limit=self.limit,
            unit=self.unit, n=value.n,
        )  # fmt: skip

    def within(self, value: Bounds, what: str, confidence: float) -> Verdict:
        """Return pass if the upper bound is within the limit, fail if the lower bound is beyond it."""
        if not value.known:
            return self.verdict("inconclusive", f"{value.n:,} usable answers are too few", value)
        answer: Answer = "pass" if value.high <= self.limit else "fail" if value.low > self.limit else "inconclusive"
        return self.verdict(answer, f"{what} ({_percent(confidence)}), limit {self.limit:g}", value)


def certainty(confidence: float) -> float:
    """Return the confidence with which a guardrail rejects: all of them share the error probability."""
    return 1.0 - (1.0 - confidence) / GUARDRAILS


def looks_confidence(confidence: float, look: int) -> float:
    """Return the confidence of the `look`-th look (from 1) at a bound that is not always valid.

    α/(k(k + 1)) sums to α over all looks (Howard and Ramdas, Bernoulli 28:1704–1728, 2022, section 3.1).
    """
    return 1.0 - (1.0 - confidence) / (look * (look + 1))


def errors(windows: Windows, limit_pp: float, confidence: float) -> Verdict:
    """Judge the challenger's failed requests above the champion's rate in the same windows, in percentage points."""
    gate, limit, n = _Gate("errors", limit_pp, "pp"), limit_pp / 100, int(windows.challenger_n.sum())
    if not n:
        return gate.verdict("inconclusive", "no window in which both releases answered")
    high = sequential.excess_bound(windows, confidence)
    what = (
        f"{_failed(windows.challenger_hits, windows.challenger_n)}, and of the champion's "
        f"{_failed(windows.champion_hits, windows.champion_n)} in the same windows; "
        f"excess at most {100 * high:.2f} points ({_percent(confidence)}), limit {limit_pp:g}"
    )
    answer: Answer = "inconclusive"
    if certainly_more(windows, limit, confidence):
        answer = "fail"
    elif reached(sequential.log_excess(windows, limit, "below"), confidence):
        answer = "pass"
    return gate.verdict(answer, what, Bounds(100 * windows.excess, math.nan, 100 * high, n))


def certainly_more(windows: Windows, limit: float, confidence: float) -> bool:
    """Return whether the challenger's rate is certainly above the champion's, and its estimate by more than `limit`.

    The number of errors needed depends on neither the plan nor the limit: about 8 if as many requests go to the
    champion, at least LEAST_ERRORS otherwise.
    """
    if windows.challenger_hits.sum() < LEAST_ERRORS or windows.excess <= limit:
        return False
    return reached(sequential.log_excess(windows, 0.0, "above"), certainty(confidence))


def p99_ratio(champion_ms: npt.ArrayLike, challenger_ms: npt.ArrayLike, limit: float, confidence: float) -> Verdict:
    """Judge the challenger's p99 over the champion's, from (N,) latencies of the same N requests in their order.

    It passes if two conditions hold: the slowest answer of a typical block is less than `limit` times as slow (which
    detects what slows every request), and less than 1 % more of its answers than of the champion's are slower than
    `limit` times the champion's p99 (which detects rare slow answers and bursts of them).
    """
    a, b = np.asarray(champion_ms, dtype=np.float64), np.asarray(challenger_ms, dtype=np.float64)
    n = len(a)
    if n < BLOCK or not (np.isfinite(a).all() and np.isfinite(b).all() and (a > 0).all() and (b > 0).all()):
        return _Gate("p99_ratio", limit, "×").verdict("inconclusive", f"{n:,} usable pairs are too few", unknown(n))
    peaks, slow_ms = sequential.blocks(a, b, BLOCK), limit * float(np.quantile(a, TAIL))
    windows = sequential.episode_windows(a > slow_ms, b > slow_ms)
    margin = 1.0 - TAIL
    typical = typical_ratio(peaks, limit, confidence)
    answer: Answer = "inconclusive"
    if typical.answer == "fail" or reached(sequential.log_excess(windows, margin, "above"), certainty(confidence)):
        answer = "fail"
    elif typical.passed and reached(sequential.log_excess(windows, margin, "below"), confidence):
        answer = "pass"
    length = sequential.episode_length(a > slow_ms, b > slow_ms)
    what = (
        f"p99 {np.quantile(b, TAIL):.2f} ms, champion {np.quantile(a, TAIL):.2f} ms; {typical.reason}; "
        f"{100 * np.mean(b > slow_ms):.2f} % of its answers took longer than {limit:g} times the champion's p99, of "
        f"the champion's {100 * np.mean(a > slow_ms):.2f} %, excess at most "
        f"{100 * sequential.excess_bound(windows, confidence):.2f} points, allowed {100 * margin:g}; "
        f"{n:,} pairs, worth {n / length:,.0f} independent ones"
    )
    return typical.model_copy(update={"answer": answer, "reason": what, "n": n})


def typical_ratio(peaks: Peaks, limit: float, confidence: float) -> Verdict:
    """Judge how many times as slow the challenger's slowest answer in a typical block is, for any traffic split."""
    gate, count = _Gate("p99_ratio", limit, "×"), len(peaks.champion_ms)
    n = int(peaks.challenger_n.sum())
    if not count:
        return gate.verdict("inconclusive", "no block of requests to both")
    low, high = peaks.bounds(confidence)
    answer: Answer = "inconclusive"
    if reached(peaks.log_slower(limit, "above"), certainty(confidence)):
        answer = "fail"
    elif reached(peaks.log_slower(limit, "below"), confidence):
        answer = "pass"
    at_most = f"at most {high:.2f}×" if math.isfinite(high) else "no upper bound yet"
    what = (
        f"in a typical block its slowest answer takes {peaks.ratio():.2f}× the champion's, {at_most} "
        f"({_percent(confidence)}), limit {limit:g}×, {count:,} blocks"
    )
    return gate.verdict(answer, what, Bounds(peaks.ratio(), low, high, n))


def p99_limit(gate: str, latencies_ms: Sequence[float], limit_ms: float, confidence: float) -> Verdict:
    """Judge the absolute limit on the p99: less than 1 % of the (N,) latencies, in the requests' order, are above
    it."""
    ms = np.asarray(latencies_ms, dtype=np.float64)
    if not ms.size or not np.isfinite(ms).all():
        return _Gate(gate, limit_ms, "ms").verdict("inconclusive", f"{ms.size:,} usable latencies", unknown(ms.size))
    slow, allowed = ms > limit_ms, 1.0 - TAIL
    answer: Answer = "inconclusive"
    if certainly_slow(slow, confidence):
        answer = "fail"
    elif reached(sequential.log_rate(slow, allowed, "below"), confidence):
        answer = "pass"
    p99, share = float(np.quantile(ms, TAIL)), 100 * sequential.rate_bound(slow, confidence)
    what = (
        f"p99 {p99:.2f} ms, limit {limit_ms:g} ms; {int(slow.sum()):,} of {ms.size:,} answers took longer, at most "
        f"{share:.2f} % ({_percent(confidence)}), allowed {100 * allowed:g} %"
    )
    return _Gate(gate, limit_ms, "ms").verdict(answer, what, Bounds(p99, math.nan, math.nan, ms.size))


def certainly_slow(slow: npt.ArrayLike, confidence: float) -> bool:
    """Return whether certainly more than 1 % of the answers are slow; (N,) booleans in the requests' order."""
    return reached(sequential.log_rate(slow, 1.0 - TAIL, "above"), certainty(confidence))


def disagreement(share: Bounds, max_percent: float, confidence: float) -> Verdict:
    """Judge the share of requests that champion and challenger answered differently, with bounds for this look."""
    rate = share.scaled(100.0)
    what = f"{rate.estimate:.2f} % of {rate.n:,} answers differ, at most {rate.high:.2f} %"
    return _Gate("disagreement", max_percent, "%").within(rate, what, confidence)


def accuracy(drop: Bounds, max_drop_pp: float, confidence: float) -> Verdict:
    """Judge the drop of the quality from the champion as a fraction, with bounds for this look."""
    pp = drop.scaled(100.0)
    what = f"drop {pp.estimate:.2f} points against the champion, at most {pp.high:.2f}, from {pp.n:,} samples"
    return _Gate("accuracy", max_drop_pp, "pp").within(pp, what, confidence)


def memory(challenger_mib: float, champion_mib: float, max_mib: float, max_ratio: float) -> Verdict:
    """Judge the memory of the challenger's server: within the limit, and within `max_ratio` times the champion's."""
    limit = min(max_mib, max(max_ratio * champion_mib, SMALL_SERVER_MIB)) if champion_mib > 0 else max_mib
    what = f"the server holds {challenger_mib:.0f} MiB, the champion's {champion_mib:.0f} MiB, limit {limit:.0f} MiB"
    answer: Answer = "pass" if challenger_mib <= limit else "fail"
    return _Gate("memory", limit, "MiB").verdict(answer, what, Bounds(challenger_mib, math.nan, math.nan, 1))


def undecided(verdict: Verdict, why: str) -> Verdict:
    """Return a failure that has another possible explanation as inconclusive; any other verdict unchanged."""
    if verdict.answer != "fail":
        return verdict
    reason = f"{verdict.reason}; not held against the challenger, since {why}"
    return verdict.model_copy(update={"answer": "inconclusive", "reason": reason})


def _failed(hits: npt.NDArray[np.float64], n: npt.NDArray[np.float64]) -> str:
    return f"{hits.sum():,.0f} of {n.sum():,.0f} requests failed"


def _percent(confidence: float) -> str:
    return f"{100 * confidence:.4g} % confidence"
