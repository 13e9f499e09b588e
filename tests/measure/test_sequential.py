"""Sequential tests: evidence is never larger than its null hypothesis allows, and large where it should be."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.measure import sequential
from slipstream.measure.sequential import Peaks, Windows, log_excess, log_rate, log_share, reached

Rates = Callable[[np.random.Generator], tuple[float, float]]


def windows(rng: np.random.Generator, champion: float, challenger: float, n: tuple[int, int], count: int) -> Windows:
    columns = (rng.binomial(n[0], champion, count), np.full(count, n[0]), rng.binomial(n[1], challenger, count))
    return Windows.of(np.stack([*columns, np.full(count, n[1])], axis=1))


def crossed(evidence: np.ndarray, confidence: float) -> bool:
    """Whether it was enough at any look, not only the last."""
    return any(reached(evidence[: i + 1], confidence) for i in range(len(evidence)))


@pytest.mark.parametrize("rate", [0.0005, 0.005, 0.05, 0.5])
@pytest.mark.parametrize("n", [(25, 25), (24, 1), (5, 20)])
def test_looking_after_every_window_costs_no_false_alarm(rate: float, n: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    alarms = [crossed(log_excess(windows(rng, rate, rate, n, 200), 0.0, "above"), 0.95) for _ in range(150)]
    assert np.mean(alarms) <= 0.05 + 0.03


@pytest.mark.parametrize(("champion", "challenger"), [(0.0, 0.005), (0.003, 0.008), (0.01, 0.015), (0.1, 0.105)])
def test_an_excess_at_the_margin_passes_at_the_nominal_rate(champion: float, challenger: float) -> None:
    rng = np.random.default_rng(1)
    drawn = [windows(rng, champion, challenger, (25, 25), 200) for _ in range(150)]
    assert np.mean([crossed(log_excess(w, 0.005, "below"), 0.95) for w in drawn]) <= 0.05 + 0.03


def test_rates_that_drift_with_the_machine_are_nobodys_fault() -> None:
    """Windows in which both sides fail often, as in an outage: 5 windows of 100 with 40 % errors."""
    rng, alarms = np.random.default_rng(2), 0
    for _ in range(150):
        rates = np.where(rng.random(200) < 0.05, 0.4, 0.001)
        hits = [rng.binomial(25, rates) for _ in range(2)]
        w = Windows.of(np.stack([hits[0], np.full(200, 25), hits[1], np.full(200, 25)], axis=1))
        alarms += crossed(log_excess(w, 0.0, "above"), 0.95)
    assert alarms / 150 <= 0.05 + 0.03


def errors_needed(rate: float, count: int) -> list[float]:
    """Requests to the challenger until the evidence suffices at 99 %, in looks of 25; infinite if never."""
    rng, stops = np.random.default_rng(3), []
    for _ in range(60):
        evidence = log_excess(windows(rng, 0.0, rate, (25, 25), count), 0.0, "above")
        over = np.flatnonzero(evidence >= np.log(100))
        stops.append(25.0 * (over[0] + 1) if over.size else np.inf)
    return stops


def test_errors_needed_to_stop_do_not_grow_with_the_plan() -> None:
    small, large = np.median(errors_needed(0.05, 20)), np.median(errors_needed(0.05, 400))
    assert small == large
    assert 75 <= small <= 200
    assert np.quantile(errors_needed(0.005, 200), 0.9) <= 4000


def test_a_healthy_challenger_passes_after_some_600_requests() -> None:
    evidence = log_excess(windows(np.random.default_rng(4), 0.0, 0.0, (25, 25), 40), 0.005, "below")
    assert 400 <= 25 * (np.argmax(evidence >= np.log(20)) + 1) <= 800


@given(st.integers(0, 20), st.integers(1, 20))
def test_more_errors_of_the_challenger_are_never_less_evidence(errors: int, more: int) -> None:
    rows = np.tile([0.0, 50.0, 0.0, 50.0], (6, 1))
    few, many = rows.copy(), rows.copy()
    few[-1, 2], many[-1, 2] = errors, min(errors + more, 50)
    assert log_excess(Windows.of(few), 0.0, "above")[-1] <= log_excess(Windows.of(many), 0.0, "above")[-1] + 1e-9
    bounds = [sequential.excess_bound(Windows.of(w), 0.95) for w in (few, many)]
    assert bounds[0] <= bounds[1] + 1e-3


def test_nothing_seen_is_no_evidence() -> None:
    nothing = Windows.of([])
    assert not reached(log_excess(nothing, 0.0, "above"), 0.5)
    assert not reached(log_excess(nothing, 0.1, "below"), 0.5)
    assert sequential.excess_bound(nothing, 0.95) == sequential.rate_bound([], 0.95) == 1.0
    assert Windows.of([[0, 0, 3, 5], [1, 5, 0, 0]]).champion_n.size == 0  # one side alone compares nothing
    assert np.isnan(Peaks.of([]).ratio())
    assert np.isnan(Peaks.of([]).bounds(0.95)).all()


@pytest.mark.parametrize("n", [(50, 50), (38, 12), (5, 45)])
@pytest.mark.parametrize("autocorrelation", [0.0, 0.9])
def test_peaks_are_exact_at_the_limit_however_latencies_depend_on_each_other(
    n: tuple[int, int], autocorrelation: float
) -> None:
    """One stream, dealt to both sides at random; the challenger's answers are exactly twice as slow."""
    rng, alarms = np.random.default_rng(5), {"above": 0, "below": 0}
    for _ in range(150):
        rows = []
        for _ in range(40):
            log_ms = np.empty(sum(n))
            log_ms[0] = rng.normal()
            for i in range(1, len(log_ms)):
                log_ms[i] = autocorrelation * log_ms[i - 1] + np.sqrt(1 - autocorrelation**2) * rng.normal()
            ms = np.exp(log_ms)[rng.permutation(len(log_ms))]
            rows.append([ms[: n[0]].max(), n[0], 2 * ms[n[0] :].max(), n[1]])
        for side in ("above", "below"):
            alarms[side] += crossed(Peaks.of(rows).log_slower(2.0, side), 0.95)
    assert max(alarms.values()) / 150 <= 0.05 + 0.03


def test_peaks_tell_equal_from_twice_as_slow_within_a_second_or_two() -> None:
    rng = np.random.default_rng(6)
    equal = sequential.blocks(rng.lognormal(0, 0.4, 1000), rng.lognormal(0, 0.4, 1000), 50)
    low, high = equal.bounds(0.95)
    assert low < 1 < high < 2
    assert reached(equal.log_slower(2.0, "below"), 0.95)
    slow = sequential.blocks(rng.lognormal(0, 0.4, 1000), 4 * rng.lognormal(0, 0.4, 1000), 50)
    assert reached(slow.log_slower(2.0, "above"), 0.99)


def test_one_burst_counts_once_however_high() -> None:
    ms = np.ones(1000)
    burst = ms.copy()
    burst[100:130] = 1e6
    assert sequential.blocks(ms, burst, 50).log_slower(2.0, "above")[-1] < 0


@pytest.mark.parametrize(
    ("slow", "begins", "length"),
    [
        ([], [], 4.0),
        ([False] * 9, [], 4.0),
        ([True] * 3 + [False] * 2 + [True] * 3 + [False] * 9 + [True], [0, 17], (7 + 4) / 3),
        ([True] * 60, [0, 25, 50], 64 / 4),
    ],
)
def test_slow_answers_close_together_are_one_episode(slow: list[bool], begins: list[int], length: float) -> None:
    assert sequential.episodes(slow).tolist() == begins
    assert sequential.episode_length(slow) == pytest.approx(max(1.0, length))


def test_bursts_are_less_evidence_than_as_many_single_slow_answers() -> None:
    bursts, single = np.zeros(2000, bool), np.zeros(2000, bool)
    bursts[1000:1024] = True
    single[::83] = True
    assert log_rate(bursts, 0.01, "above")[-1] < log_rate(single, 0.01, "above")[-1]
    assert reached(log_rate(np.ones(500, bool), 0.01, "above"), 0.99)


def test_a_share_at_the_limit_passes_at_the_nominal_rate() -> None:
    rng = np.random.default_rng(7)
    drawn = [rng.random(4000) < 0.01 for _ in range(150)]
    assert np.mean([crossed(log_rate(slow, 0.01, "below"), 0.95) for slow in drawn]) <= 0.05 + 0.03
    assert reached(log_rate(np.zeros(1600, bool), 0.01, "below"), 0.95)


def test_less_than_its_share_is_noticed() -> None:
    rng = np.random.default_rng(8)
    assert reached(log_share(np.zeros(150, bool), 0.05, "below"), 0.99)
    alarms = [crossed(log_share(rng.random(2000) < 0.05, 0.05, "below"), 0.95) for _ in range(60)]
    assert np.mean(alarms) <= 0.05 + 0.06
