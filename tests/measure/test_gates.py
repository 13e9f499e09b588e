"""Gates: no data is never a pass, and a worse candidate never gets a better answer."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from slipstream.contract import Verdict
from slipstream.measure import gates
from slipstream.measure.stats import Bounds, unknown

CONFIDENCE = 0.95
BADNESS = {"pass": 0, "inconclusive": 1, "fail": 2}
HITS = hnp.arrays(np.float64, st.shared(st.integers(1, 300), key="n"), elements=st.sampled_from([0.0, 1.0]))


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def accuracy(baseline: object, engine: object, limit: float = 1.0) -> Verdict:
    return gates.accuracy(np.asarray(baseline), np.asarray(engine), limit, CONFIDENCE)


@pytest.mark.parametrize(
    "verdict",
    [
        accuracy([], []),
        accuracy([1.0, math.nan], [1.0, 1.0]),
        accuracy([1.0], [1.0, 1.0]),
        gates.latency([], 5, CONFIDENCE),
        gates.latency([1.0] * 661, 5, CONFIDENCE),
        gates.latency([1.0] * 1000 + [math.nan], 5, CONFIDENCE),
        gates.speedup(unknown(2), CONFIDENCE),
    ],
    ids=lambda v: f"{v.gate}-{v.n}",
)
def test_missing_or_too_little_is_inconclusive(verdict: Verdict) -> None:
    assert verdict.answer == "inconclusive"
    assert verdict.reason
    assert verdict.model_dump_json()  # and can be written: no NaN, no infinity
    assert "NaN" not in verdict.model_dump_json()


@pytest.mark.parametrize(
    ("lost", "limit", "answer"),
    [(0, 1.0, "pass"), (70, 1.0, "pass"), (95, 1.0, "inconclusive"), (101, 1.0, "fail"), (300, 1.0, "fail")],
)
def test_accuracy_passes_only_when_the_upper_bound_is_within_the_allowed_drop(
    lost: int, limit: float, answer: str
) -> None:
    baseline = np.ones(10_000)
    engine = np.where(np.arange(10_000) < lost, 0.0, 1.0)
    verdict = accuracy(baseline, engine, limit)
    assert verdict.answer == answer
    assert verdict.estimate == pytest.approx(lost / 100)
    assert (verdict.limit, verdict.unit, verdict.n) == (limit, "pp", 10_000)
    assert f"drop {lost / 100:.2f} points" in verdict.reason


def test_latency_breach_on_a_noisy_machine_is_not_held_against_the_engine() -> None:
    slow = [9.0] * 1000
    assert gates.latency(slow, 5, CONFIDENCE).answer == "fail"
    noisy = gates.latency(slow, 5, CONFIDENCE, noisy=True)
    assert noisy.answer == "inconclusive"
    assert "others used the machine" in noisy.reason
    assert gates.latency([1.0] * 1000, 5, CONFIDENCE, noisy=True).answer == "pass"


@pytest.mark.parametrize(
    ("ratio", "answer"),
    [
        (Bounds(2.0, 1.8, 2.2, 8), "pass"),
        (Bounds(1.05, 0.98, 1.12, 8), "inconclusive"),
        (Bounds(1.03, 1.01, 1.05, 8), "inconclusive"),
        (Bounds(1.015, 1.01, 1.02, 8), "fail"),
        (Bounds(0.97, 0.9, 1.05, 8), "fail"),
        (Bounds(1.0, 1.0, 1.0, 8), "fail"),
    ],
)
def test_speedup_must_be_more_than_two_copies_of_one_engine_differ(ratio: Bounds, answer: str) -> None:
    verdict = gates.speedup(ratio, CONFIDENCE)
    assert verdict.answer == answer
    assert ("not faster" in verdict.reason) == (answer != "pass")


@pytest.mark.parametrize(
    ("ratio", "answer"),
    [
        (Bounds(2.0, 1.1, 3.0, 8), "pass"),
        (Bounds(4.9, 0.9, 5.2, 8), "inconclusive"),
        (Bounds(0.97, 0.5, 1.05, 8), "inconclusive"),
        (Bounds(0.5, 0.4, 0.6, 8), "fail"),
    ],
)
def test_in_a_crowd_the_interval_decides_alone(ratio: Bounds, answer: str) -> None:
    verdict = gates.speedup(ratio, CONFIDENCE, crowded=True)
    assert verdict.answer == answer
    assert "others took the cores" in verdict.reason


@given(HITS, HITS, st.floats(0.1, 20), st.data())
def test_losing_a_sample_never_improves_the_answer(
    baseline: np.ndarray, engine: np.ndarray, limit: float, data: st.DataObject
) -> None:
    worse = engine.copy()
    worse[data.draw(st.integers(0, engine.size - 1))] = 0.0
    assert BADNESS[accuracy(baseline, worse, limit).answer] >= BADNESS[accuracy(baseline, engine, limit).answer]


@settings(max_examples=30)
@given(hnp.arrays(np.float64, (2, 40), elements=st.floats(0, 1, width=16)), st.floats(0.1, 50), st.data())
def test_a_worse_graded_score_never_turns_fail_into_pass(scores: np.ndarray, limit: float, data: st.DataObject) -> None:
    worse = scores[1].copy()
    worse[data.draw(st.integers(0, 39))] *= data.draw(st.floats(0, 1, width=16))
    if accuracy(scores[0], scores[1], limit).answer == "fail":
        assert accuracy(scores[0], worse, limit).answer != "pass"


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1), st.floats(0.5, 20), st.floats(1, 5), st.integers(1, 1500))
def test_slower_requests_never_improve_the_answer(seed: int, limit: float, factor: float, n: int) -> None:
    latencies = np.random.default_rng(seed).exponential(size=n)
    slower = np.where(np.arange(n) % 3 == 0, latencies * factor, latencies)
    before, after = (gates.latency(v, limit, CONFIDENCE) for v in (latencies, slower))
    assert BADNESS[after.answer] >= BADNESS[before.answer]
