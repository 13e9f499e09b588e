"""Interleaving, the noise guard and what is claimed from too few queries."""

import itertools
import os
import time
from collections.abc import Callable

import numpy as np
import pytest

pytest.importorskip("mlperf_loadgen", reason="needs the torch environment")

from slipstream.measure import latency, noise
from slipstream.measure.latency import Comparison, Plan, Round

SHORT = Plan(rounds=5, clean_rounds=5, max_rounds=7, block_ms=40, warmup_ms=10, block_warmup_ms=2, server_ms=200)


def busy(ms: float, seen: list[str] | None = None, name: str = "") -> Callable[[int], None]:
    def issue(_: int) -> None:
        if seen is not None and (not seen or seen[-1] != name):
            seen.append(name)
        end = time.perf_counter() + ms / 1e3
        while time.perf_counter() < end:
            pass

    return issue


def rounds(others: list[float | None], slow: float = 2.0) -> tuple[Round, ...]:
    """Rounds in which `b` takes `slow` times as long as `a`; loud rounds are ten times slower for both."""
    generator = np.random.default_rng(0)
    made = []
    for value in others:
        loud = 10.0 if value is None or value > 0.15 else 1.0
        made.append(
            Round(
                {"a": loud * generator.normal(1, 0.01, 300), "b": slow * loud * generator.normal(1, 0.01, 300)}, value
            )
        )
    return tuple(made)


def test_a_real_comparison_finds_the_real_ratio() -> None:
    seen: list[str] = []
    told: list[tuple[int, int]] = []
    subjects = {"fast": busy(0.3, seen, "fast"), "slow": busy(0.9, seen, "slow")}
    result = latency.compare(
        subjects, 10, SHORT, 0, tails=("fast",), progress=lambda done, total, others: told.append((done, total))
    )
    ratio = result.speedup("fast", "slow", 0.95)
    assert 2.0 < ratio.low <= ratio.estimate <= ratio.high < 4.0
    assert told[-1][0] == told[-1][1] == len(result.rounds) <= SHORT.max_rounds
    assert sum(len(r.latencies_ms["fast"]) for r in result.rounds) >= 662
    per_round = [seen[i : i + 2] for i in range(2, len(seen) - 1, 2)]
    assert ["fast", "slow"] in per_round or ["slow", "fast"] in per_round


def test_nobody_always_runs_first_or_after_the_same_neighbour() -> None:
    names = ("a", "b", "c")
    orders = [latency._rotated(names, turn) for turn in range(6)]
    assert {n: [o[0] for o in orders].count(n) for n in names} == {"a": 2, "b": 2, "c": 2}
    followed = [pair for o in orders for pair in itertools.pairwise(o)]
    assert {followed.count(pair) for pair in itertools.permutations(names, 2)} == {2}


def test_loud_rounds_are_dropped_when_enough_are_clean() -> None:
    result = Comparison(rounds([0.0, 1.0, 0.1, 0.02, 1.5, 0.1, 0.03]), SHORT)
    assert [r.others_cores for r in result.judged] == [0.0, 0.1, 0.02, 0.1, 0.03]
    assert not result.noise.noisy
    assert result.pooled_ms("a").max() < 2
    assert result.speedup("a", "b", 0.95).n == 5


def test_with_too_few_clean_rounds_all_count_and_it_is_said() -> None:
    result = Comparison(rounds([0.0, 1.0, 1.2, 0.9, 1.5]), SHORT)
    assert len(result.judged) == 5
    assert (result.noise.clean_rounds, result.noise.rounds, result.noise.noisy) == (1, 5, True)
    ratio = result.speedup("a", "b", 0.95)
    assert ratio.low < 2.0 < ratio.high * 1.01, "what slowed both cancels in the ratio"
    assert len(result.pooled_ms("a")) == 900, "the three quietest rounds: enough for a p99"


def test_in_noise_the_undisturbed_queries_are_compared() -> None:
    """Other load hits `b` ten times as often as `a`: medians would call it 30 times slower, not twice."""
    generator = np.random.default_rng(1)

    def latencies(undisturbed_ms: float, hit: float) -> np.ndarray:
        return undisturbed_ms * np.where(generator.random(300) < hit, 15.0, generator.normal(1, 0.02, 300))

    loud = tuple(Round({"a": latencies(1.0, 0.07), "b": latencies(2.0, 0.7)}, 1.5) for _ in range(7))
    ratio = Comparison(loud, SHORT).speedup("a", "b", 0.95)
    assert 1.9 < ratio.low < ratio.high < 2.2


@pytest.mark.parametrize("lucky", [0.02, 0.3])
def test_in_a_crowd_a_copy_is_not_called_faster_however_often_it_was_left_alone(lucky: float) -> None:
    """`a` and `b` are one engine; of b's queries few were left alone, of a's most."""
    generator = np.random.default_rng(2)

    def latencies(left_alone: float) -> np.ndarray:
        return np.where(
            generator.random(400) < left_alone, generator.normal(1, 0.02, 400), 4 * generator.random(400) + 1
        )

    crowd = Comparison(tuple(Round({"a": latencies(0.8), "b": latencies(lucky)}, 1.5) for _ in range(12)), SHORT)
    assert crowd.speedup("a", "b", 0.95, crowded=True).low < 1.02
    twice = tuple(Round({"a": latencies(0.8) / 2, "b": latencies(lucky)}, 1.5) for _ in range(12))
    assert Comparison(twice, SHORT).speedup("a", "b", 0.95, crowded=True).low > 1.02


def test_a_framework_without_its_cores_is_not_compared_with() -> None:
    cores = len(os.sched_getaffinity(0))
    quiet, loud = (Comparison(rounds([others] * 6), SHORT) for others in (0.05, 0.9))
    assert not quiet.crowded(cores)
    assert loud.crowded(cores)
    assert not loud.crowded(cores - 1)


def test_without_a_guard_nothing_is_called_clean() -> None:
    result = Comparison(rounds([None, None, None, None]), SHORT)
    assert result.noise.noisy
    assert result.noise.others_cores is None


def test_it_extends_itself_while_others_are_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    loads = iter([1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    monkeypatch.setattr(noise, "_others_s", _scripted(loads))
    result = latency.compare({"x": busy(0.2)}, 3, SHORT, 0)
    assert len(result.rounds) == 6
    assert len(result.clean) == 5
    assert not result.noise.noisy


def _scripted(loads: object) -> Callable[[object], float]:
    """CPU seconds of others: each watched block finds the next load."""
    state = {"start": 0.0, "open": False}

    def others_s(_: object) -> float:
        state["open"] = not state["open"]
        if state["open"]:
            state["start"] = time.monotonic()
            return 0.0
        return next(loads) * (time.monotonic() - state["start"])  # type: ignore[call-overload, no-any-return]

    return others_s


def test_no_percentile_from_too_few_queries() -> None:
    def told(n: int) -> tuple[bool, bool]:
        summary = latency.summary("SingleStream", np.linspace(1, 2, n))
        return summary.p90_ms is not None, summary.p99_ms is not None

    assert [told(n) for n in (63, 64, 661, 662)] == [(False, False), (True, False), (True, False), (True, True)]


def test_summary_is_in_the_units_it_names() -> None:
    summary = latency.summary("SingleStream", np.full(1000, 2.0))
    assert (summary.p50_ms, summary.p99_ms, summary.rate_per_s, summary.n) == (2.0, 2.0, 500.0, 1000)
    assert len(summary.quantiles_ms) == 101


def test_server_is_offered_half_of_what_it_can_do() -> None:
    served = latency.under_load(busy(1.0), 5, SHORT, 0, capacity_per_s=1000)
    assert (served.scenario, served.rate_per_s) == ("Server", 500.0)
    assert 50 <= served.n <= 200


def test_a_broken_subject_stops_the_comparison() -> None:
    def broken(_: int) -> None:
        raise ValueError("no engine")

    with pytest.raises(ValueError, match="no engine"):
        latency.compare({"ok": busy(0.1), "broken": broken}, 3, SHORT, 0)
