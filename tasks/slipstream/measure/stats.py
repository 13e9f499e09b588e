"""Statistics behind the gates: arrays and a seeded generator in, numbers out.

Every bound is one-sided and holds separately with the given confidence, because every gate asks a one-sided question.
`low` and `high` together therefore cover with 1 − 2α. If the data cannot give a bound (no observations, NaN, too few),
the bound is NaN, and a gate turns NaN into `inconclusive`.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy import optimize, stats

Floats = npt.NDArray[np.float64]

SET_RESAMPLES = 2000
"""Bootstrap resamples of values that are computed from whole sets; the Monte Carlo error of a 95 % bound is then a few
percent of its distance."""
JACKKNIFE = 200
"""Maximum number of groups that the jackknife leaves out in turn."""
BOOTSTRAP_MIN = 30
"""With fewer pairs, a bootstrap of the mean covers too little (Efron and Tibshirani 1993, ch. 14)."""


@dataclass(frozen=True)
class Bounds:
    """An estimate between its lower and its upper confidence bound; NaN if there is none."""

    estimate: float
    low: float
    high: float
    n: int

    @property
    def known(self) -> bool:
        """Whether estimate and both bounds are finite numbers."""
        return all(math.isfinite(v) for v in (self.estimate, self.low, self.high))

    def scaled(self, factor: float) -> "Bounds":
        """Return the same in another unit, such as percent; `factor` is positive."""
        return Bounds(self.estimate * factor, self.low * factor, self.high * factor, self.n)


def unknown(n: int = 0) -> Bounds:
    """Return the result without usable data."""
    return Bounds(math.nan, math.nan, math.nan, n)


def paired_drop(baseline: npt.ArrayLike, engine: npt.ArrayLike, confidence: float) -> Bounds:
    """Return the drop of a mean score from baseline to engine on the same samples, as a fraction.

    baseline, engine: (N,) scores in [0, 1], one for each sample, in the same order. Scores that are all 0 or 1 use
    Tango's score interval, others a bound that holds for any distribution (measure/betting.py): a bootstrap cannot
    account for rare samples that an engine loses entirely and that were not drawn, and let a drop at the limit pass in
    13 to 56 % of test sets of 50 to 200 such scores.
    """
    from slipstream.measure import betting  # which builds on this module

    a, b = np.asarray(baseline, dtype=np.float64), np.asarray(engine, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape or a.size == 0 or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return unknown(a.size)
    if np.isin(a, (0.0, 1.0)).all() and np.isin(b, (0.0, 1.0)).all():
        return tango(int(((a == 1) & (b == 0)).sum()), int(((a == 0) & (b == 1)).sum()), a.size, confidence)
    return betting.mean_bounds(a - b, confidence)


def tango(lost: int, won: int, n: int, confidence: float) -> Bounds:
    """Return score bounds for the paired difference (lost − won) / n of two proportions.

    lost: samples that only the baseline got right; won: only the engine; n: all samples. Inverts the score test of H0:
    difference = Δ. The nuisance parameter is its restricted maximum likelihood estimate, which keeps the one-sided
    error at its nominal level where the Wald interval fails: few discordant pairs, the normal case for an engine (T.
    Tango, Statistics in Medicine 17:891–908, 1998, eq. 4 and 6).
    """
    if n <= 0 or lost < 0 or won < 0 or lost + won > n:
        return unknown(max(n, 0))
    z = float(stats.norm.ppf(confidence))
    estimate = (lost - won) / n
    low = _root(lambda delta: _tango_z(delta, lost, won, n) - z, -1.0, estimate)
    high = _root(lambda delta: _tango_z(delta, lost, won, n) + z, estimate, 1.0)
    return Bounds(estimate, low, high, n)


def _tango_z(delta: float, lost: int, won: int, n: int) -> float:
    """Return the score statistic of H0: difference = delta; it decreases as delta grows."""
    a = 2.0 * n
    b = -lost - won + (2.0 * n - lost + won) * delta
    c = -won * delta * (1.0 - delta)
    q = (math.sqrt(max(b * b - 4.0 * a * c, 0.0)) - b) / (2.0 * a)
    variance = n * (2.0 * q + delta * (1.0 - delta))
    numerator = lost - won - n * delta
    if variance <= 0.0:
        return math.copysign(math.inf, numerator) if numerator else 0.0
    return float(numerator / math.sqrt(variance))


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    """Return where a decreasing function crosses zero between low and high; without a crossing, the nearer end."""
    if function(low) <= 0.0:
        return low
    if function(high) >= 0.0:
        return high
    return float(optimize.brentq(function, low, high, xtol=1e-12))


def paired_bootstrap(
    difference: Callable[[Floats], Floats], n: int, confidence: float, rng: np.random.Generator
) -> Bounds:
    """Return expanded BCa bounds for a difference, within [−1, 1], of two values, each computed from a set of samples.

    difference: counts (R, N), how often each of the N samples is in each of R resamples, to (R,) differences. Both
    values of a difference must be of the same resample: what the samples have in common then cancels, as in a paired
    test (Efron and Tibshirani 1993, sections 8.3 and 14.3). The acceleration is the jackknife's (eq. 14.15), which
    leaves out one sample at a time or, above 200, one of 200 groups of them (Shao and Tu 1995, section 2.3).
    A mean over classes often depends on the few samples of a rare class. Then the resamples spread too little, and the
    bounds are read further out (`_expanded`): in simulations of F1 and IoU with such classes, plain BCa let a drop at
    the limit pass in 7 to 14 % of test sets, this in 3 to 9 %; the 9 % are of a class with 7 samples.
    If every resample agrees with the estimate, there is no spread to use: the bounds then limit how common a
    different value may still be (Wilson). NaN in any resample leaves no bound. No bootstrap can account for samples
    that matter, are rare, and were not drawn: these bounds are approximate, unlike those of scores.
    """
    if n < BOOTSTRAP_MIN:
        return unknown(n)
    estimate = float(difference(np.ones((1, n)))[0])
    drawn = np.concatenate([difference(_resample_counts(size, n, rng)) for size in _chunks(n, SET_RESAMPLES)])
    left_out = np.concatenate([difference(counts) for counts in _jackknife_counts(n, rng)])
    if not (math.isfinite(estimate) and np.isfinite(drawn).all() and np.isfinite(left_out).all()):
        return unknown(n)
    if np.ptp(drawn) <= 1e-12:
        margin = wilson(0, n, confidence).high
        return Bounds(estimate, max(estimate - margin, -1.0), min(estimate + margin, 1.0), n)
    influence = left_out.mean() - left_out
    bounds = _bca(estimate, drawn, influence, _expanded(confidence, influence))
    return replace(bounds, n=n)


def _expanded(confidence: float, influence: Floats) -> float:
    """Return the normal quantile, widened as far as the estimate depends on few samples.

    A bootstrap of n samples is too narrow by √((n − 1)/n) and knows its spread no better than n − 1 degrees of freedom
    allow (T. Hesterberg, The American Statistician 69:371–386, 2015, section 4.2.1). n is the number of samples, or
    groups, that share the variance equally: (Σu²)² / Σu⁴ of the influences u, Kish's (1965) effective sample size.
    """
    shares = influence**2
    if not shares.any():
        return float(stats.norm.ppf(confidence))
    n = max(float(shares.sum() ** 2 / (shares**2).sum()), 2.0)
    return math.sqrt(n / (n - 1)) * float(stats.t.ppf(confidence, n - 1))


def _resample_counts(resamples: int, n: int, rng: np.random.Generator) -> Floats:
    """Return (R, N) how often each sample is in each of R resamples of N samples, drawn with replacement."""
    drawn = rng.integers(0, n, (resamples, n)) + n * np.arange(resamples)[:, None]
    return np.bincount(drawn.ravel(), minlength=resamples * n).reshape(resamples, n).astype(np.float64)


def _jackknife_counts(n: int, rng: np.random.Generator) -> Iterator[Floats]:
    """Yield counts, in chunks, of the resamples that leave out one group of samples each; at most JACKKNIFE groups."""
    group = rng.permutation(n) % min(n, JACKKNIFE)
    first = 0
    for size in _chunks(n, min(n, JACKKNIFE)):
        yield (group[None, :] != np.arange(first, first + size)[:, None]).astype(np.float64)
        first += size


def _chunks(n: int, resamples: int) -> list[int]:
    """Return sizes of the parts in which resamples of n samples are drawn: at most 2 million draws each."""
    chunk = max(1, 2_000_000 // n)
    return [min(chunk, resamples - start) for start in range(0, resamples, chunk)]


def _bca(estimate: float, drawn: Floats, influence: Floats, z: float) -> Bounds:
    """Return BCa bounds from bootstrap values at the normal quantiles ±z.

    influence: how much each sample, or group of them, pulls the estimate up.
    """
    below = ((drawn < estimate).sum() + (drawn == estimate).sum() / 2) / drawn.size
    bias = float(stats.norm.ppf(np.clip(below, 1e-6, 1 - 1e-6)))
    squares = float((influence**2).sum())
    acceleration = float((influence**3).sum()) / (6.0 * squares**1.5) if squares > 0 else 0.0
    levels = [_bca_level(bias, acceleration, side) for side in (-z, z)]
    low, high = (float(q) for q in np.quantile(drawn, levels))
    return Bounds(estimate, min(low, estimate), max(high, estimate), influence.size)


def _bca_level(bias: float, acceleration: float, z: float) -> float:
    """Return the quantile of the bootstrap distribution that BCa reads for the normal quantile z."""
    shifted = bias + z
    if acceleration * shifted >= 1.0:  # past the pole, where the formula would come back from the other side
        return 1.0 if shifted > 0 else 0.0
    return float(stats.norm.cdf(bias + shifted / (1.0 - acceleration * shifted)))


def wilson(successes: int, n: int, confidence: float) -> Bounds:
    """Return score bounds for a proportion (E. B. Wilson, JASA 22:209–212, 1927)."""
    if n <= 0 or not 0 <= successes <= n:
        return unknown(max(n, 0))
    z = float(stats.norm.ppf(confidence))
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low = 0.0 if successes == 0 else max(centre - half, 0.0)
    high = 1.0 if successes == n else min(centre + half, 1.0)
    return Bounds(p, low, high, n)


def ratio_of_rounds(reference_ms: npt.ArrayLike, subject_ms: npt.ArrayLike, confidence: float) -> Bounds:
    """Return the speed-up, how many times faster the subject is than the reference, from interleaved rounds.

    reference_ms, subject_ms: (R,) median latency of each round; both were measured in the same round, so anything that
    slows the machine for a while slows both. The Hodges–Lehmann estimate of the log-ratios and its exact signed-rank
    bounds, exponentiated: one round in which other load hit only one of the two (3× is common on a shared machine)
    hardly moves it, while it would inflate a t interval (Hodges and Lehmann 1963; Hollander, Wolfe and Chicken,
    Nonparametric Statistical Methods, section 3.3).
    """
    a, b = np.asarray(reference_ms, dtype=np.float64), np.asarray(subject_ms, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape or a.size < min_rounds(confidence):
        return unknown(a.size)
    if not (np.isfinite(a).all() and np.isfinite(b).all() and (a > 0).all() and (b > 0).all()):
        return unknown(a.size)
    estimate, low, high = hodges_lehmann(np.log(a / b), confidence)
    return Bounds(math.exp(estimate), math.exp(low), math.exp(high), a.size)


def min_rounds(confidence: float) -> int:
    """Return the fewest rounds that can give a bound: all R signs agree by chance with probability 2^−R; 5 rounds at 95
    %."""
    return math.ceil(round(-math.log2(1.0 - confidence), 9))


def hodges_lehmann(values: npt.ArrayLike, confidence: float) -> tuple[float, float, float]:
    """Return the center of (N,) symmetrically distributed values, with bounds from the signed-rank null distribution.

    N is at least `min_rounds(confidence)`. The bounds are the k-th smallest and largest of the N(N + 1)/2 Walsh
    averages, with the largest k for which P[W ≤ k − 1] ≤ 1 − confidence.
    """
    v = np.asarray(values, dtype=np.float64)
    walsh = _walsh_averages(v)
    ways = np.ones(1)  # ways[w] = number of subsets of the ranks 1…N whose sum is w
    for rank in range(1, v.size + 1):
        ways = np.concatenate([ways, np.zeros(rank)]) + np.concatenate([np.zeros(rank), ways])
    cumulative = np.cumsum(ways) / 2.0**v.size
    k = int(np.searchsorted(cumulative, 1.0 - confidence + 1e-12, side="right"))
    assert k > 0, f"{v.size} values carry no bound at {confidence}"
    return float(np.median(walsh)), float(walsh[k - 1]), float(walsh[-k])


def center(values: npt.ArrayLike) -> float:
    """Return only the Hodges-Lehmann estimate: the median of the Walsh averages of (N,) values, N > 0."""
    return float(np.median(_walsh_averages(np.asarray(values, dtype=np.float64))))


def _walsh_averages(values: Floats) -> Floats:
    """Return (N(N + 1)/2,) means of all pairs, including each value with itself, in ascending order."""
    i, j = np.triu_indices(values.size)
    averages: Floats = np.sort((values[i] + values[j]) / 2.0)
    return averages


def min_queries(percentile: float, confidence: float = 0.99) -> int:
    """Return the fewest queries for a percentile: 64, 130, 662 and 6,636 for p90, p95, p99 and p99.9.

    LoadGen's early-stopping rule: the smallest n with P[Binomial(n, 1 − p) ≤ 1] ≤ 1 − confidence, so that one query
    above the limit could be tolerated (MLPerf Inference, loadgen/early_stopping.cc).
    """
    low, high = 1, 2
    while stats.binom.cdf(1, high, 1.0 - percentile) > 1.0 - confidence:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if stats.binom.cdf(1, middle, 1.0 - percentile) > 1.0 - confidence else (low, middle)
    return high


def percentile_bounds(values: npt.ArrayLike, percentile: float, confidence: float) -> Bounds:
    """Return distribution-free bounds of a percentile by order statistics; an infinite side means too few values.

    The k-th smallest of n values lies above the percentile p with probability P[Binomial(n, p) < k] (David and
    Nagaraja, Order Statistics, 2003, section 7.1).
    """
    v = np.sort(np.asarray(values, dtype=np.float64))
    if v.size == 0 or not np.isfinite(v).all():
        return unknown(v.size)
    below = stats.binom.cdf(np.arange(v.size), v.size, percentile)  # below[k − 1] = P[X_(k) ≥ quantile]
    upper = int(np.searchsorted(below, confidence))
    lower = int(np.searchsorted(below, 1.0 - confidence, side="right")) - 1
    estimate = float(v[min(math.ceil(percentile * v.size), v.size) - 1])
    high = float(v[upper]) if upper < v.size else math.inf
    low = float(v[lower]) if lower >= 0 else -math.inf
    return Bounds(estimate, low, high, v.size)
