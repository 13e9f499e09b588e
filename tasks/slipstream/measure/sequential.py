"""Always-valid tests for stages 2 and 3: evidence that may be evaluated, and acted on, after every request.

Evidence is an e-process: a nonnegative process whose expectation under the null hypothesis never exceeds 1. By Ville's
inequality it reaches 1/α at any time with probability at most α, so neither frequent looks nor early stopping nor
additional requests cause false alarms (Ramdas, Grünwald, Vovk and Shafer, Statistical Science 38:576–601, 2023).
Everything here returns its logarithm.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Side = Literal["above", "below"]

EXPECTED_N = 200.0
"""Number of requests that the prior guess of a rate is worth; it affects how fast evidence grows, not its validity."""
RATE_FACTORS = (2.0, 5.0, 20.0)
"""Alternatives against "not above": the challenger's rate is this multiple of the champion's."""
MARGIN_FACTORS = (0.0, 0.5)
"""Alternatives against "not below": the excess is this fraction of the margin."""
PEAK_FACTORS = (0.1, 0.25, 0.5)
"""Alternatives for peaks: this fraction of the probability that chance alone gives."""


@dataclass(frozen=True)
class Windows:
    """Events (failures, slow answers) of champion and challenger in the same W windows; four arrays of shape (W,)."""

    champion_hits: Floats
    champion_n: Floats
    challenger_hits: Floats
    challenger_n: Floats

    @classmethod
    def of(cls, rows: npt.ArrayLike) -> "Windows":
        """Return windows from (W, 4) rows: champion's hits and n, challenger's hits and n. Rows with an empty side are
        dropped."""
        table = np.asarray(rows, dtype=np.float64).reshape(-1, 4)
        table = table[(table[:, 1] > 0) & (table[:, 3] > 0)]
        return cls(*(np.ascontiguousarray(column) for column in table.T))

    @property
    def champion_rate(self) -> float:
        """Share of the champion's requests; NaN without any."""
        return _rate(self.champion_hits, self.champion_n)

    @property
    def challenger_rate(self) -> float:
        """Share of the challenger's requests; NaN without any."""
        return _rate(self.challenger_hits, self.challenger_n)

    @property
    def excess(self) -> float:
        """The challenger's share minus the champion's."""
        return self.challenger_rate - self.champion_rate


def log_excess(windows: Windows, margin: float, side: Side) -> Floats:
    """Return (W,) evidence after each window that the challenger's rate is above, or below, the champion's plus
    `margin`.

    Each window multiplies the evidence by the likelihood of both sides' counts under an alternative, over that under
    its projection onto the line rate = champion's + margin (R. Turner and P. Grünwald, "Exact anytime-valid confidence
    intervals for contingency tables and beyond", Statistics & Probability Letters 198, 2023). The null need only hold
    in the mean of each window, so rates may drift and outages that hit both sides cost nothing; sizes of windows may
    differ. Alternatives are guessed from earlier windows, and mixed over the factors above.
    """
    a_hits, a_n, b_hits, b_n = windows.champion_hits, windows.champion_n, windows.challenger_hits, windows.challenger_n
    if a_n.size == 0:
        return np.empty(0)
    a_guess = (_before(a_hits) + 0.05) / (_before(a_n) + EXPECTED_N)
    mixed = []
    for factor in RATE_FACTORS if side == "above" else MARGIN_FACTORS:
        if side == "above":
            b_guess = np.maximum((_before(b_hits) + 0.5) / (_before(b_n) + EXPECTED_N / 2), margin + 1e-3)
            a = np.minimum(a_guess, (b_guess - margin) / factor)
            b = np.minimum(b_guess, 0.999)
        else:
            a = a_guess
            b = np.minimum((_before(b_hits) + 0.05) / (_before(b_n) + EXPECTED_N), a + margin * factor)
        a_null, b_null = _projection(a_n, b_n, a, b, margin)
        gain = _log_ratio(a_hits, a_n, a, a_null) + _log_ratio(b_hits, b_n, b, b_null)
        mixed.append(np.cumsum(gain))
    return _log_mean(mixed)


def excess_bound(windows: Windows, confidence: float) -> float:
    """Return an always-valid upper bound on the excess; 1 while nothing is known. Within 1e-4."""
    low, high = 0.0, 1.0 - 1e-6
    while high - low > 1e-4:
        middle = (low + high) / 2
        if reached(log_excess(windows, middle, "below"), confidence):
            high = middle
        else:
            low = middle
    return high if high < 0.999 else 1.0


def log_share(hits: npt.ArrayLike, share: npt.ArrayLike, side: Side) -> Floats:
    """Return (N,) evidence after each of N trials that they hit more, or less, often than with probability `share`.

    hits: (N,) booleans; share: one probability, or (N,) of them, each fixed before its trial. Likelihood ratios, mixed
    over alternatives in which the rarer outcome has 0.1 to 0.5 of its probability (below), or in which the miss has
    (above).
    """
    y = np.asarray(hits, dtype=bool)
    p = np.clip(np.broadcast_to(np.asarray(share, dtype=np.float64), y.shape), 1e-9, 1 - 1e-9)
    mixed = []
    for factor in PEAK_FACTORS:
        q = p * factor if side == "below" else 1.0 - (1.0 - p) * factor
        mixed.append(np.cumsum(np.where(y, np.log(q / p), np.log((1.0 - q) / (1.0 - p)))))
    return _log_mean(mixed)


def reached(evidence: Floats, confidence: float) -> bool:
    """Return whether the evidence after the last observation suffices to reject its null hypothesis."""
    return bool(evidence.size) and bool(evidence[-1] >= -math.log1p(-confidence))


@dataclass(frozen=True)
class Peaks:
    """The slowest answer of champion and challenger in each of the same B blocks, and their numbers of answers."""

    champion_ms: Floats
    champion_n: Floats
    challenger_ms: Floats
    challenger_n: Floats

    @classmethod
    def of(cls, rows: npt.ArrayLike) -> "Peaks":
        """Return peaks from (B, 4) rows, in the order of the fields."""
        return cls(*np.asarray(rows, dtype=np.float64).reshape(-1, 4).T)

    def log_slower(self, ratio: float, side: Side) -> Floats:
        """Return (B,) evidence that the challenger is more than (above), or less than (below), `ratio` times as slow.

        If all its answers were exactly `ratio` times as slow, each of a block's n + m answers would be equally likely
        to be the slowest after division, so the challenger has it with probability m / (n + m): whatever the latencies'
        distribution, and however they are correlated, as long as the two sides are exchangeable within a block. A
        burst, however high or long, counts for one block.
        """
        chance = self.challenger_n / (self.champion_n + self.challenger_n)
        return log_share(self.challenger_ms > ratio * self.champion_ms, chance, side)

    def ratio(self) -> float:
        """Return the typical block's ratio: the median, uncorrected; NaN without blocks."""
        return float(np.median(self.challenger_ms / self.champion_ms)) if self.champion_ms.size else math.nan

    def bounds(self, confidence: float) -> tuple[float, float]:
        """Return always-valid bounds on the ratio: the smallest and the largest that the evidence does not exclude."""
        low, high = math.nan, math.nan
        for ratio in np.geomspace(1 / 32, 32, 121):
            if reached(self.log_slower(float(ratio), "above"), confidence):
                low = float(ratio)
            if math.isnan(high) and reached(self.log_slower(float(ratio), "below"), confidence):
                high = float(ratio)
        return low, high


def blocks(champion_ms: npt.ArrayLike, challenger_ms: npt.ArrayLike, size: int) -> Peaks:
    """Return peaks of blocks of `size` pairs, from (N,) latencies of the same N requests in their order.

    A remainder smaller than a block is dropped.
    """
    a, b = np.asarray(champion_ms, dtype=np.float64), np.asarray(challenger_ms, dtype=np.float64)
    whole = len(a) // size * size
    n = np.full(whole // size, float(size))
    return Peaks(a[:whole].reshape(-1, size).max(axis=1), n, b[:whole].reshape(-1, size).max(axis=1), n)


GAP, LONGEST, EXPECTED_LENGTH = 2, 25, 4.0
"""Slow answers with at most GAP others between them belong to one episode (the runs method of extreme values: Ferro and
Segers, Journal of the Royal Statistical Society B 65:545–556, 2003); one of more than LONGEST requests counts again for
every LONGEST. EXPECTED_LENGTH is assumed until slow answers have shown the length of their episodes."""


def episodes(slow: npt.ArrayLike) -> npt.NDArray[np.intp]:
    """Return indices at which episodes of slow answers begin; slow: (N,) booleans in the order of the requests."""
    at = np.flatnonzero(np.asarray(slow, dtype=bool))
    if not at.size:
        return at
    begins = np.concatenate([[True], np.diff(at) > GAP + 1])
    first = at[np.maximum.accumulate(np.where(begins, np.arange(at.size), 0))]  # begin of each answer's episode
    part = (at - first) // LONGEST
    counted: npt.NDArray[np.intp] = at[begins | np.concatenate([[False], np.diff(part) > 0])]
    return counted


def episode_length(*slow: npt.ArrayLike) -> float:
    """Return the mean slow answers per episode over all sides, at least 1: N answers are worth N / length."""
    answers = sum(int(np.asarray(s, dtype=bool).sum()) for s in slow)
    return max(1.0, (answers + EXPECTED_LENGTH) / (sum(len(episodes(s)) for s in slow) + 1))


def episode_windows(champion: npt.ArrayLike, challenger: npt.ArrayLike, size: int = 100) -> Windows:
    """Return windows of `size` pairs that count episodes, and the number of independent requests.

    champion, challenger: (N,) booleans, whether the answer to the same request was slow. Slow answers come in bursts;
    counted one by one, they would overstate the evidence.
    """
    a, b = np.asarray(champion, dtype=bool), np.asarray(challenger, dtype=bool)
    length = episode_length(a, b)
    (a_hits, n), (b_hits, _) = (_per_window(s, length, size) for s in (a, b))
    return Windows(a_hits, n, b_hits, n)


def log_rate(slow: npt.ArrayLike, limit: float, side: Side, size: int = 100) -> Floats:
    """Return (W,) evidence that the share of slow answers is above, or below, `limit`; slow: (N,) booleans in order.

    Windows of `size` requests (the last may be shorter) in which episodes count, as in `episode_windows`.
    """
    flags = np.asarray(slow, dtype=bool)
    hits, n = _per_window(flags, episode_length(flags), size)
    guess = (_before(hits) + 0.05) / (_before(n) + EXPECTED_N / 2)
    mixed = []
    for factor in RATE_FACTORS if side == "above" else MARGIN_FACTORS:
        rate = np.maximum(guess, limit * factor) if side == "above" else np.minimum(guess, limit * factor)
        rate = np.clip(rate, 1e-9, 0.999)
        mixed.append(np.cumsum(_log_ratio(hits, n, rate, np.full(rate.shape, limit))))
    return _log_mean(mixed) if hits.size else np.empty(0)


def rate_bound(slow: npt.ArrayLike, confidence: float) -> float:
    """Return an always-valid upper bound on the share of slow answers; 1 while nothing is known. Within 1e-4."""
    low, high = 0.0, 1.0 - 1e-6
    while high - low > 1e-4:
        middle = (low + high) / 2
        if reached(log_rate(slow, middle, "below"), confidence):
            high = middle
        else:
            low = middle
    return high if high < 0.999 else 1.0


def _per_window(slow: npt.NDArray[np.bool_], length: float, size: int) -> tuple[Floats, Floats]:
    """Return episodes that begin in each window, and its requests divided by the episodes' length."""
    count = -(-len(slow) // size)
    n = np.minimum(size, len(slow) - size * np.arange(count)) / length
    hits = np.bincount(episodes(slow) // size, minlength=count)
    return np.minimum(hits, n), n


def _rate(hits: Floats, n: Floats) -> float:
    return float(hits.sum() / n.sum()) if n.size else math.nan


def _before(values: Floats) -> Floats:
    """Return the sums of all earlier values."""
    sums: Floats = np.cumsum(values) - values
    return sums


def _projection(a_n: Floats, b_n: Floats, a: Floats, b: Floats, margin: float) -> tuple[Floats, Floats]:
    """Return the point (x, x + margin) nearest to (a, b) in Kullback-Leibler divergence, weighted by the counts."""
    low = np.full(a.shape, 1e-12)
    high = np.full(a.shape, 1.0 - margin - 1e-12)
    for _ in range(50):
        x = (low + high) / 2
        slope = -a_n * (a - x) / (x * (1 - x)) - b_n * (b - x - margin) / ((x + margin) * (1 - x - margin))
        low, high = np.where(slope < 0, x, low), np.where(slope < 0, high, x)
    x = (low + high) / 2
    return x, x + margin


def _log_ratio(hits: Floats, n: Floats, rate: Floats, null: Floats) -> Floats:
    ratio: Floats = hits * np.log(rate / null) + (n - hits) * np.log((1 - rate) / (1 - null))
    return ratio


def _log_mean(mixed: list[Floats]) -> Floats:
    mean: Floats = np.logaddexp.reduce(np.array(mixed), axis=0) - math.log(len(mixed))
    return mean
