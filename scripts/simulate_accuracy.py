"""Error rates of the gates by simulation: `scripts/simulate_accuracy.py [TABLE ...]`, in an environment that has scipy.

Every table calls the product's own functions on simulated samples whose true values are known, and prints Markdown;
docs/gates.md quotes them. Quick, seeded versions are tests. Without names, all tables: some minutes.
"""

import sys
import time
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
from scipy import stats as scipy_stats

from slipstream.measure import betting, stats

CONFIDENCE = 0.95
MARGIN = 0.01

Drops = Callable[[np.random.Generator, int], np.ndarray]
"""(N,) paired differences of a graded score."""


def lost_whole(rng: np.random.Generator, n: int) -> np.ndarray:
    """Scores of 0.95 with a jitter of 0.005, of which 1.05 % fall to 0: a true drop of 1.0 points."""
    baseline, engine = (0.95 + rng.normal(0, 0.005, n) for _ in range(2))
    return np.clip(baseline, 0, 1) - np.where(rng.random(n) < 0.0105, 0, np.clip(engine, 0, 1))


def shifted(rng: np.random.Generator, n: int) -> np.ndarray:
    """Every score one point lower, with a spread of 0.05."""
    return np.clip(rng.normal(MARGIN, 0.05, n), -1, 1)


def spread(deviation: float) -> Drops:
    """An engine without any drop, whose scores differ from the baseline's by this standard deviation."""
    return lambda rng, n: np.clip(rng.normal(0, deviation, n), -1, 1)


def bca(values: np.ndarray) -> float:
    """The upper BCa bound, which the gate used before."""
    found = scipy_stats.bootstrap(
        (values,), np.mean, n_resamples=2000, confidence_level=2 * CONFIDENCE - 1, method="BCa", rng=0
    )
    return float(found.confidence_interval.high)


def graded() -> None:
    """Graded scores: how often an engine passes."""
    cases: list[tuple[str, Drops, Sequence[int]]] = [
        ("drop at the margin: rare samples lost whole", lost_whole, (50, 100, 200, 300, 500, 1000)),
        ("drop at the margin: every score a little lower", shifted, (300, 1000)),
        ("no drop, spread 0.005", spread(0.005), (100, 300, 350, 500)),
        ("no drop, spread 0.05", spread(0.05), (350, 500, 1000)),
        ("no drop, spread 0.1", spread(0.1), (1000, 2000, 5000)),
    ]
    print("| graded scores, allowed 1 point, 95 % | n | BCa | betting |\n| --- | --- | --- | --- |")
    for name, draw, sizes in cases:
        for n in sizes:
            rng, trials = np.random.default_rng(n), 400
            samples = [draw(rng, n) for _ in range(trials)]
            with np.errstate(all="ignore"):
                old = np.mean([bca(v) <= MARGIN for v in samples])
            new = np.mean([betting.mean_bounds(v, CONFIDENCE).high <= MARGIN for v in samples])
            print(f"| {name} | {n:,} | {100 * old:.1f} % | {100 * new:.1f} % |", flush=True)


@cache
def tango_high(lost: int, won: int, n: int, confidence: float) -> float:
    """The upper bound; few counts occur, and each often."""
    return stats.tango(lost, won, n, confidence).high


def winners(k: int, shared: float, confidence: float, *, trials: int, n: int = 1000, seed: int = 0) -> float:
    """Share of runs in which any of k engines, all at the margin, passes: the winner is then false.

    3 % of samples are discordant. `shared` is the share of errors that all engines have in common.
    """
    rng, passed = np.random.default_rng([k, int(100 * shared), seed]), 0
    p_lost, p_won = 0.02, 0.01
    for _ in range(trials):
        common, own = rng.random(n), rng.random((k, n))
        draws = np.where(rng.random((k, n)) < shared, common, own)
        lost, won = (draws < p_lost).sum(axis=1), ((draws >= p_lost) & (draws < p_lost + p_won)).sum(axis=1)
        passed += any(
            tango_high(int(a), int(b), n, confidence) <= p_lost - p_won for a, b in zip(lost, won, strict=True)
        )
    return passed / trials


def best_of() -> None:
    """Best of k engines that are all at the margin."""
    print("| engines | errors shared | false winners at 95 % | at 1 − 5 %/k |\n| --- | --- | --- | --- |")
    for k in (1, 2, 6, 20):
        for shared in (0.0, 0.9):
            alone, corrected = (winners(k, shared, c, trials=2000) for c in (CONFIDENCE, 1 - (1 - CONFIDENCE) / k))
            print(f"| {k} | {100 * shared:.0f} % | {100 * alone:.1f} % | {100 * corrected:.1f} % |", flush=True)


TABLES: dict[str, Callable[[], None]] = {"graded": graded, "best-of": best_of}


def main(names: Sequence[str]) -> None:
    for name in names or TABLES:
        began = time.monotonic()
        print(f"\n## {name}: {TABLES[name].__doc__}\n")
        TABLES[name]()
        print(f"\n{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
