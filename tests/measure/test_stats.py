"""The statistics: published values, independent recomputation, properties, and error rates by simulation."""

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import optimize
from scipy import stats as scipy_stats

from slipstream.measure import betting, stats

CONFIDENCE = 0.95
HITS = hnp.arrays(np.float64, st.shared(st.integers(1, 200), key="n"), elements=st.sampled_from([0.0, 1.0]))
POSITIVE = hnp.arrays(np.float64, st.integers(5, 60), elements=st.floats(0.01, 100))


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


# --- published values -------------------------------------------------------------------------------------------


def test_tango_gives_the_published_interval() -> None:
    """Airway hyper-responsiveness, Bentur et al. 2009: −0.517 to −0.026 (Fagerland, Lydersen, Laake 2014)."""
    bounds = stats.tango(1, 7, 21, 0.975)
    assert (round(bounds.low, 3), round(bounds.high, 3)) == (-0.517, -0.026)


def test_wilson_gives_the_published_interval() -> None:
    """81 of 263: 0.2553 to 0.3662 (Newcombe, Statistics in Medicine 17:857–872, 1998, table I, method 3)."""
    bounds = stats.wilson(81, 263, 0.975)
    assert (round(bounds.low, 4), round(bounds.high, 4)) == (0.2553, 0.3662)


@pytest.mark.parametrize(("percentile", "queries"), [(0.9, 64), (0.95, 130), (0.99, 662), (0.999, 6636)])
def test_min_queries_are_those_of_loadgen(percentile: float, queries: int) -> None:
    assert stats.min_queries(percentile) == queries


def test_hodges_lehmann_gives_the_published_interval() -> None:
    """Hamilton depression scale, 9 patients: −0.46, and −0.786 to −0.010 at 96.1 % (Hollander and Wolfe, table 3.1)."""
    before = np.array([1.83, 0.50, 1.62, 2.48, 1.68, 1.88, 1.55, 3.06, 1.30])
    after = np.array([0.878, 0.647, 0.598, 2.05, 1.06, 1.29, 1.06, 3.14, 1.29])
    assert stats.hodges_lehmann(after - before, 0.98) == pytest.approx((-0.46, -0.786, -0.010), abs=6e-4)


# --- independent recomputation ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("lost", "won", "n"), [(12, 2, 50), (0, 0, 100), (5, 0, 40), (0, 9, 60), (30, 25, 1000)])
def test_tango_bounds_solve_the_score_equation_with_a_numerical_likelihood(lost: int, won: int, n: int) -> None:
    """The restricted maximum likelihood estimate, here by a numerical search instead of the closed form."""
    z = scipy_stats.norm.ppf(CONFIDENCE)
    bounds = stats.tango(lost, won, n, CONFIDENCE)
    for delta, sign in ((bounds.high, -1), (bounds.low, 1)):
        q = _restricted_mle(lost, won, n, delta)
        score = (lost - won - n * delta) / math.sqrt(n * (2 * q + delta * (1 - delta)))
        assert score == pytest.approx(sign * z, abs=2e-3)


def _restricted_mle(lost: int, won: int, n: int, delta: float) -> float:
    def loss(q: float) -> float:
        cells = ((lost, q + delta), (won, q), (n - lost - won, 1 - 2 * q - delta))
        return -sum(count * math.log(max(p, 1e-300)) for count, p in cells if count)

    low, high = max(0.0, -delta), (1 - delta) / 2
    return float(optimize.minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x)


@pytest.mark.parametrize("n", [80, 500])
def test_the_set_bootstrap_of_a_mean_is_scipys_bca(n: int) -> None:
    """Averaged over seeds, since one bound scatters; of 500 samples the jackknife leaves out groups."""
    values = np.random.default_rng(n).exponential(size=n) / 10 - 0.05

    def mean(counts: np.ndarray) -> np.ndarray:
        result: np.ndarray = counts @ values / n
        return result

    ours = [stats.paired_bootstrap(mean, n, 0.975, np.random.default_rng(seed)) for seed in range(10)]
    theirs = scipy_stats.bootstrap((values,), np.mean, n_resamples=20_000, rng=rng()).confidence_interval
    for side in ("low", "high"):
        got, expected = np.mean([getattr(b, side) for b in ours]), getattr(theirs, side)
        assert got == pytest.approx(expected, abs=0.1 * (theirs.high - theirs.low))  # it is expanded
    assert ours[0].estimate == pytest.approx(values.mean())


def test_bounds_are_read_further_out_where_few_samples_matter() -> None:
    z = scipy_stats.norm.ppf(CONFIDENCE)
    even, few = np.ones(2000), np.r_[np.zeros(995), np.ones(5)]
    assert stats._expanded(CONFIDENCE, even) == pytest.approx(z, abs=0.002)
    assert stats._expanded(CONFIDENCE, few) == pytest.approx(math.sqrt(5 / 4) * scipy_stats.t.ppf(CONFIDENCE, 4))
    assert stats._expanded(CONFIDENCE, np.r_[np.zeros(999), 1]) == stats._expanded(CONFIDENCE, few[-2:])


def test_a_jackknife_leaves_out_every_sample_once() -> None:
    for n in (30, 200, 999):
        counts = np.concatenate(list(stats._jackknife_counts(n, rng())))
        assert len(counts) == min(n, stats.JACKKNIFE)
        assert ((counts == 0).sum(axis=0) == 1).all()
        left_out = (counts == 0).sum(axis=1)
        assert left_out.max() - left_out.min() <= 1


def test_resample_counts_add_up() -> None:
    counts = stats._resample_counts(50, 33, rng())
    assert counts.shape == (50, 33) and (counts.sum(axis=1) == 33).all() and counts.max() > 2


def test_hodges_lehmann_agrees_with_inverting_scipys_test() -> None:
    """The bounds are where the exact one-sided signed-rank test stops rejecting."""
    values = np.random.default_rng(4).normal(0.3, 1, 9)
    _, low, high = stats.hodges_lehmann(values, CONFIDENCE)
    for bound, side, inside in ((low, "greater", 1e-6), (high, "less", -1e-6)):
        p_in = scipy_stats.wilcoxon(values - bound - inside, alternative=side, method="exact").pvalue
        p_out = scipy_stats.wilcoxon(values - bound + inside, alternative=side, method="exact").pvalue
        assert p_out <= 0.05 < p_in


def test_ratio_of_rounds_is_taken_back_from_the_logs() -> None:
    reference, subject = np.array([4.0, 8.0, 2.0, 6.0, 5.0]), np.array([2.0, 2.0, 1.0, 2.0, 2.0])
    bounds = stats.ratio_of_rounds(reference, subject, CONFIDENCE)
    assert (bounds.low, bounds.high) == pytest.approx((2.0, 4.0)), "five rounds: the smallest and largest ratio"
    assert 2.4 < bounds.estimate < 2.8


def test_one_round_that_hit_only_one_subject_hardly_matters() -> None:
    reference = np.array([2.0, 2.1, 1.9, 2.0, 2.05, 1.95, 2.0, 40.0])
    bounds = stats.ratio_of_rounds(reference, np.ones(8), CONFIDENCE)
    assert bounds.estimate == pytest.approx(2.0, rel=0.05)
    assert bounds.low > 1.9


# --- nothing to go on -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bounds",
    [
        stats.paired_drop([], [], CONFIDENCE),
        stats.paired_drop([1.0, math.nan], [1.0, 0.0], CONFIDENCE),
        stats.paired_drop([1.0, 0.0], [1.0], CONFIDENCE),
        betting.mean_bounds([0.5, 1.5], CONFIDENCE),
        betting.mean_bounds([0.5, math.nan], CONFIDENCE),
        stats.paired_bootstrap(lambda counts: counts[:, 0] * 0, 29, CONFIDENCE, rng()),
        stats.paired_bootstrap(lambda counts: counts[:, 0] * math.nan, 100, CONFIDENCE, rng()),
        stats.paired_bootstrap(lambda counts: np.where(counts[:, 0] > 3, math.nan, 0.1), 100, CONFIDENCE, rng()),
        stats.wilson(0, 0, CONFIDENCE),
        stats.wilson(5, 3, CONFIDENCE),
        stats.ratio_of_rounds([1.0] * 4, [1.0] * 4, CONFIDENCE),
        stats.ratio_of_rounds([1.0] * 5 + [math.nan], [1.0] * 6, CONFIDENCE),
        stats.ratio_of_rounds([1.0] * 5 + [0.0], [1.0] * 6, CONFIDENCE),
        stats.percentile_bounds([], 0.99, CONFIDENCE),
        stats.percentile_bounds([1.0, math.nan], 0.99, CONFIDENCE),
    ],
)
def test_unusable_data_give_unknown_bounds(bounds: stats.Bounds) -> None:
    assert not bounds.known


def test_few_values_give_no_upper_bound_of_a_p99() -> None:
    assert stats.percentile_bounds(np.arange(298.0), 0.99, CONFIDENCE).high == math.inf
    assert stats.percentile_bounds(np.arange(299.0), 0.99, CONFIDENCE).high == 298.0


def test_resamples_that_all_agree_leave_as_much_doubt_as_equal_pairs() -> None:
    bounds = stats.paired_bootstrap(lambda counts: counts[:, 0] * 0, 300, CONFIDENCE, rng())
    assert bounds.high == stats.wilson(0, 300, CONFIDENCE).high > 0.005


def test_equal_scores_still_leave_doubt_in_proportion_to_the_sample() -> None:
    few, many = (stats.paired_drop(np.full(n, 0.5), np.full(n, 0.5), CONFIDENCE) for n in (30, 3000))
    assert few.high > 10 * many.high > 0


# --- properties -------------------------------------------------------------------------------------------------


@given(HITS, HITS, st.randoms(use_true_random=False))
def test_order_of_samples_does_not_matter(baseline: np.ndarray, engine: np.ndarray, random: object) -> None:
    order = np.array(random.sample(range(baseline.size), baseline.size))  # type: ignore[attr-defined]
    straight = stats.paired_drop(baseline, engine, CONFIDENCE)
    assert stats.paired_drop(baseline[order], engine[order], CONFIDENCE) == straight


@settings(max_examples=20)
@given(hnp.arrays(np.float64, (2, 40), elements=st.floats(0, 1, width=16)), st.permutations(range(40)))
def test_order_does_not_matter_for_graded_scores(scores: np.ndarray, order: list[int]) -> None:
    straight = stats.paired_drop(scores[0], scores[1], CONFIDENCE)
    assert stats.paired_drop(scores[0][order], scores[1][order], CONFIDENCE) == straight


@given(POSITIVE, st.randoms(use_true_random=False))
def test_order_of_rounds_and_queries_does_not_matter(values: np.ndarray, random: object) -> None:
    order = np.array(random.sample(range(values.size), values.size))  # type: ignore[attr-defined]
    other = np.roll(values, 1)
    a, b = (stats.ratio_of_rounds(values[o], other[o], CONFIDENCE) for o in (slice(None), order))
    assert (a.low, a.high) == pytest.approx((b.low, b.high))
    assert stats.percentile_bounds(values, 0.9, CONFIDENCE) == stats.percentile_bounds(values[order], 0.9, CONFIDENCE)


@given(st.integers(0, 60), st.integers(0, 60), st.integers(1, 500))
def test_one_more_lost_sample_raises_both_bounds(lost: int, won: int, rest: int) -> None:
    n = lost + won + rest
    before, after = stats.tango(lost, won, n, CONFIDENCE), stats.tango(lost + 1, won, n, CONFIDENCE)
    assert after.high >= before.high - 1e-9
    assert after.low >= before.low - 1e-9
    assert before.low <= before.estimate <= before.high


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 500))
def test_swapping_the_roles_mirrors_the_interval(lost: int, won: int, rest: int) -> None:
    n = max(lost + won + rest, 1)
    one, other = stats.tango(lost, won, n, CONFIDENCE), stats.tango(won, lost, n, CONFIDENCE)
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low), abs=1e-9)


@given(POSITIVE, st.floats(1.01, 10))
def test_a_faster_subject_has_the_larger_ratio(reference: np.ndarray, factor: float) -> None:
    subject = np.roll(reference, 1)
    slow, fast = (stats.ratio_of_rounds(reference, subject / f, CONFIDENCE) for f in (1, factor))
    assert fast.low == pytest.approx(slow.low * factor)


# --- error rates ------------------------------------------------------------------------------------------------


def exceeds(misses: int, trials: int, rate: float) -> bool:
    """Whether so many misses are implausible (1 in 1,000) at this rate."""
    return bool(scipy_stats.binom.sf(misses - 1, trials, rate) < 1e-3)


@pytest.mark.parametrize(("n", "p_lost", "drop"), [(10_000, 0.02, 0.01), (1000, 0.04, 0.02), (2000, 0.012, 0.01)])
def test_a_drop_at_the_margin_passes_at_the_nominal_rate(n: int, p_lost: float, drop: float) -> None:
    """True drop = allowed drop: the upper bound lies below it, a false pass, in 5 % of experiments."""
    trials = 20_000
    counts = rng().multinomial(n, [p_lost, p_lost - drop, 1 - 2 * p_lost + drop], trials)[:, :2]
    high: Callable[[int, int], float] = cache(lambda lost, won: stats.tango(lost, won, n, CONFIDENCE).high)
    pairs, times = np.unique(counts, axis=0, return_counts=True)
    misses = sum(int(t) for (lost, won), t in zip(pairs, times, strict=True) if high(int(lost), int(won)) < drop)
    assert not exceeds(misses, trials, 0.052), misses / trials  # a score test is approximate: 0.2 points of slack
    assert misses / trials > 0.03, "the bound is so wide that it would reject good engines"


@pytest.mark.parametrize("shape", ["normal", "cauchy"])
def test_a_speedup_of_one_passes_at_the_nominal_rate(shape: str) -> None:
    """Also when some rounds are wildly off, as on a shared machine."""
    trials = 4000
    logs = rng().normal(0, 0.1, (trials, 8)) if shape == "normal" else 0.1 * rng().standard_cauchy((trials, 8))
    misses = sum(stats.hodges_lehmann(row, CONFIDENCE)[1] > 0 for row in logs)
    assert not exceeds(misses, trials, 0.05), misses / trials
    assert misses / trials > 0.025


def test_a_p99_at_the_limit_passes_at_no_more_than_the_nominal_rate() -> None:
    trials, limit = 2000, -math.log(0.01)
    values = rng().exponential(size=(trials, 662))
    misses = sum(stats.percentile_bounds(row, 0.99, CONFIDENCE).high < limit for row in values)
    assert not exceeds(misses, trials, 0.05), misses / trials


def ratio_difference(rows: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """rows (N, 4): numerators and denominators of two ratios of sums, as those of an IoU."""

    def difference(counts: np.ndarray) -> np.ndarray:
        sums = counts @ rows
        result: np.ndarray = sums[:, 0] / sums[:, 1] - sums[:, 2] / sums[:, 3]
        return result

    return difference


@pytest.mark.parametrize("n", [60, 400])
def test_a_drop_of_a_ratio_of_sums_at_the_margin_passes_about_at_the_nominal_rate(
    n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes are skewed and one model loses up to half of what the other finds: true ratios 0.8 and 0.7."""
    monkeypatch.setattr(stats, "SET_RESAMPLES", 500)
    trials, generator, misses = 250, rng(), {"high": 0, "low": 0}
    for _ in range(trials):
        size = generator.lognormal(3, 0.7, n)
        first = size * generator.beta(8, 2, n)
        rows = np.stack([first, size, first * generator.choice([1.0, 0.5], n, p=[0.75, 0.25]), size], axis=1)
        bounds = stats.paired_bootstrap(ratio_difference(rows), n, CONFIDENCE, generator)
        misses["high"] += bounds.high < 0.1
        misses["low"] += bounds.low > 0.1
    for side, missed in misses.items():
        assert not exceeds(missed, trials, 0.06), (side, missed / trials)
        assert missed > 0, f"the {side} bound is so wide that nothing ever passes"
