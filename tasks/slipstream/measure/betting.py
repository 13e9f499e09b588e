"""Bounds for the mean of values in [−1, 1] that hold for any distribution, with any number of samples.

A gambler who bets against "the mean is at least m" multiplies the capital by 1 + λ(m − x) at each value x. If the mean
really is m or more, no bet gains on average, so by Markov's inequality capital exceeds 1/α with probability at most α.
The upper bound is the largest m against which the capital stays below 1/α (I. Waudby-Smith and A. Ramdas, Estimating
means of bounded random variables by betting, JRSS B 86:1–27, 2024; this is their diversified Kelly bettor).

The bets λ are constant: the initial capital is divided over a fixed grid of them. The order of the samples therefore
cannot matter, nothing is drawn, and there is no asymptotic step. The bootstrap's asymptotic step fails if a rare sample
is lost entirely and none was seen. The price is width: if values spread widely, the bound needs two to three times the
samples of a normal approximation.
"""

import math

import numpy as np
import numpy.typing as npt
from scipy import optimize, special

from slipstream.measure.stats import Bounds, Floats, unknown

SHARES = 0.5 ** np.arange(8)
"""Bets, as shares of the largest that cannot lose more than the capital: 1, 1/2 … 1/128."""
FIRST = 0.8
"""Share of the capital on the largest bet, the best one for engines that hardly differ from their baseline; the rest is
spread evenly. It raises the minimum number of samples by 7 % above what any method needs."""
LOG_WEIGHTS = np.log(np.where(SHARES == 1.0, FIRST, (1.0 - FIRST) / (len(SHARES) - 1)))


def mean_bounds(values: npt.ArrayLike, confidence: float) -> Bounds:
    """Return bounds for the mean of (N,) values in [−1, 1], such as paired differences of scores."""
    v = np.asarray(values, dtype=np.float64)
    if v.ndim != 1 or v.size == 0 or not (np.abs(v) <= 1.0).all():
        return unknown(v.size)
    distinct, counts = np.unique(v, return_counts=True)
    estimate = float(distinct @ counts / v.size)
    high = _upper(distinct, counts, confidence)
    low = -_upper(-distinct, counts, confidence)
    return Bounds(estimate, min(low, estimate), max(high, estimate), v.size)


def _upper(distinct: Floats, counts: npt.NDArray[np.intp], confidence: float) -> float:
    goal = -math.log(1.0 - confidence)

    def missing(mean: float) -> float:
        return _log_capital(distinct, counts, mean) - goal

    start, end = float(distinct @ counts / counts.sum()), 1.0 - 1e-9
    if missing(end) < 0.0:
        return 1.0
    return float(optimize.brentq(missing, start, end, xtol=1e-9)) if missing(start) < 0.0 else start


def _log_capital(distinct: Floats, counts: npt.NDArray[np.intp], mean: float) -> float:
    """Return the logarithm of the capital after betting against `mean` or more; it grows with `mean`."""
    bets = SHARES / (1.0 - mean)
    with np.errstate(divide="ignore"):  # a bet that loses everything
        growth = np.log1p(np.maximum(bets[:, None] * (mean - distinct), -1.0)) @ counts
    return float(special.logsumexp(LOG_WEIGHTS + growth))


def least_samples(margin: float, confidence: float) -> int:
    """Return the fewest samples that can give a bound within `margin`: those of an engine that changes nothing.

    Without a difference the capital is at most FIRST · (1 − margin)^−n and a remainder of smaller bets. For a margin of
    0.01 at 95 % it is 321; a method that knew the bet needs 299, the n for which (1 − margin)^n is 5 %.
    """
    none, low, high = np.zeros(1), 0, 1
    goal = -math.log(1.0 - confidence)

    def enough(n: int) -> bool:
        return _log_capital(none, np.array([n]), margin) >= goal

    while not enough(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
