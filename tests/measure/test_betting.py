"""The bound for graded scores: error rates by simulation, and what it needs."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats as scipy_stats

from slipstream.measure import betting, sizes, stats

CONFIDENCE = 0.95
MARGIN = 0.01
TRIALS = 250
VALUES = hnp.arrays(np.float64, st.integers(1, 60), elements=st.floats(-1, 1, width=16))


def false_passes(draw: Callable[[np.random.Generator, int], np.ndarray], n: int, margin: float) -> int:
    rng = np.random.default_rng(n)
    return sum(betting.mean_bounds(draw(rng, n), CONFIDENCE).high <= margin for _ in range(TRIALS))


def plausible(misses: int) -> bool:
    return bool(scipy_stats.binom.sf(misses - 1, TRIALS, 0.05) > 1e-3)


def lost_whole(rng: np.random.Generator, n: int) -> np.ndarray:
    """Scores near 0.95 of which 1.05 % are lost whole: a true drop of 1.0 points."""
    scores = 0.95 + rng.normal(0, 0.005, (2, n))
    return np.clip(scores[0], 0, 1) - np.where(rng.random(n) < 0.0105, 0, np.clip(scores[1], 0, 1))


@pytest.mark.parametrize("n", [50, 100, 200, 300, 400, 700])
def test_rare_samples_that_are_lost_whole_do_not_pass_at_the_margin(n: int) -> None:
    """BCa let 56, 37, 13 and 3 % pass with 50, 100, 200 and 300 samples."""
    assert plausible(false_passes(lost_whole, n, MARGIN))


@pytest.mark.parametrize("n", [50, 320, 1000])
@pytest.mark.parametrize(
    "draw",
    [
        lambda rng, n: (rng.random(n) < MARGIN).astype(float),
        lambda rng, n: rng.choice([-1.0, 0.0, 1.0], n, p=[0.02, 0.95, 0.03]),
        lambda rng, n: np.clip(rng.normal(MARGIN, 0.05, n), -1, 1),
        lambda rng, n: rng.uniform(-1, 1 + 2 * MARGIN, n).clip(-1, 1),
        lambda rng, n: np.where(rng.random(n) < 0.001, 1.0, 0.009 / 0.999),
    ],
    ids=["lost", "lost and won", "shifted", "wide", "few lost beside a shift"],
)
def test_a_drop_at_the_margin_passes_at_no_more_than_the_nominal_rate(
    draw: Callable[[np.random.Generator, int], np.ndarray], n: int
) -> None:
    assert plausible(false_passes(draw, n, MARGIN))


def test_a_harmless_engine_passes() -> None:
    rng = np.random.default_rng(0)
    passed = {
        (n, spread): np.mean(
            [betting.mean_bounds(rng.normal(0, spread, n), CONFIDENCE).high <= MARGIN for _ in range(100)]
        )
        for n, spread in ((330, 0.001), (1000, 0.05), (3000, 0.1))
    }
    assert all(rate > 0.9 for rate in passed.values()), passed


@given(VALUES, st.randoms(use_true_random=False))
def test_order_does_not_matter(values: np.ndarray, random: object) -> None:
    order = np.array(random.sample(range(values.size), values.size))  # type: ignore[attr-defined]
    assert betting.mean_bounds(values[order], CONFIDENCE) == betting.mean_bounds(values, CONFIDENCE)


@settings(max_examples=50)
@given(VALUES, st.floats(0, 0.5), st.data())
def test_a_greater_value_never_lowers_the_bound(values: np.ndarray, more: float, data: st.DataObject) -> None:
    worse = values.copy()
    index = data.draw(st.integers(0, values.size - 1))
    worse[index] = min(worse[index] + more, 1.0)
    before, after = betting.mean_bounds(values, CONFIDENCE), betting.mean_bounds(worse, CONFIDENCE)
    assert after.high >= before.high - 1e-8
    assert -1 <= before.low <= before.estimate <= before.high <= 1


@given(VALUES)
def test_swapping_the_roles_mirrors_the_interval(values: np.ndarray) -> None:
    one, other = betting.mean_bounds(values, CONFIDENCE), betting.mean_bounds(-values, CONFIDENCE)
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low), abs=1e-8)


@pytest.mark.parametrize(("margin", "confidence"), [(0.01, 0.95), (0.02, 0.99), (0.005, 1 - 0.05 / 6)])
def test_the_least_number_of_samples_is_the_least(margin: float, confidence: float) -> None:
    n = betting.least_samples(margin, confidence)
    assert betting.mean_bounds(np.zeros(n), confidence).high <= margin
    assert betting.mean_bounds(np.zeros(n - 1), confidence).high > margin
    assert n >= math.log(1 - confidence) / math.log(1 - margin)  # no method needs fewer


def test_the_least_number_for_scores_of_0_and_1_is_the_least() -> None:
    n = sizes.least(MARGIN, CONFIDENCE, graded=False)
    assert n == 268
    assert stats.tango(0, 0, n, CONFIDENCE).high <= MARGIN < stats.tango(0, 0, n - 1, CONFIDENCE).high


def test_the_needed_number_gives_the_promised_power() -> None:
    """A harmless engine with 1 and 5 % discordance passes in about 80 % of test sets of that size."""
    for discordance in (0.01, 0.05):
        n = sizes.needed(MARGIN, CONFIDENCE, discordance)
        counts = np.random.default_rng(0).multinomial(n, [discordance / 2, discordance / 2, 1 - discordance], 500)
        passed = np.mean([stats.tango(int(a), int(b), n, CONFIDENCE).high <= MARGIN for a, b, _ in counts])
        assert 0.72 < passed < 0.9, (discordance, n, passed)
