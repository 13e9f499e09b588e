"""Guardrails: no data is never a pass, only certainty is a failure, and only a person's word replaces a verdict."""

import datetime

import numpy as np
import pytest

from slipstream.contract import Verdict
from slipstream.measure import guardrails
from slipstream.measure.pressure import Meter
from slipstream.measure.sequential import Peaks, Windows
from slipstream.measure.stats import Bounds, unknown
from slipstream.measure.waivers import waive
from slipstream.spec import Waiver

CONFIDENCE = 0.95


def windows(champion: int, challenger: int, n: int = 100, count: int = 25) -> Windows:
    """`count` windows of n requests to each, over which so many errors are spread evenly."""
    spread = [np.bincount(np.linspace(0, count - 1, k).astype(int), minlength=count) for k in (champion, challenger)]
    return Windows.of(np.stack([spread[0], np.full(count, n), spread[1], np.full(count, n)], axis=1))


@pytest.mark.parametrize(
    "verdict",
    [
        guardrails.errors(Windows.of([]), 0.5, CONFIDENCE),
        guardrails.errors(windows(0, 0, n=10), 0.5, CONFIDENCE),
        guardrails.p99_ratio([], [], 2, CONFIDENCE),
        guardrails.p99_ratio([1.0] * 500 + [np.nan], [1.0] * 501, 2, CONFIDENCE),
        guardrails.p99_ratio([1.0] * 300, [1.0] * 300, 2, CONFIDENCE),
        guardrails.typical_ratio(Peaks.of([]), 2, CONFIDENCE),
        guardrails.p99_limit("p99_cap", [], 250, CONFIDENCE),
        guardrails.p99_limit("p99_cap", [1.0] * 500, 250, CONFIDENCE),
        guardrails.p99_limit("p99_cap", [1.0] * 5000 + [np.nan], 250, CONFIDENCE),
        guardrails.disagreement(unknown(), 10, CONFIDENCE),
        guardrails.accuracy(unknown(7), 3, CONFIDENCE),
    ],
    ids=lambda v: f"{v.gate}-{v.n}",
)
def test_missing_or_too_little_is_inconclusive(verdict: Verdict) -> None:
    assert verdict.answer == "inconclusive"
    assert verdict.reason
    assert "NaN" not in verdict.model_dump_json()


@pytest.mark.parametrize(
    ("champion", "challenger", "answer"),
    [
        (0, 0, "pass"),
        (0, 1, "pass"),
        (50, 50, "inconclusive"),
        (0, 12, "inconclusive"),
        (0, 30, "fail"),
    ],
)
def test_errors_are_those_beyond_the_champions(champion: int, challenger: int, answer: str) -> None:
    """2,500 requests to each, 0.5 points allowed. Where both fail often the excess takes longer to bound, no more."""
    verdict = guardrails.errors(windows(champion, challenger), 0.5, CONFIDENCE)
    assert verdict.answer == answer
    assert f"{challenger:,} of 2,500 requests failed" in verdict.reason
    assert verdict.high is not None
    assert verdict.high > 100 * (challenger - champion) / 2500


def test_a_handful_of_errors_rejects_nothing_for_good() -> None:
    """Four errors where the champion has none in 20 times as many requests: one client can cause them."""
    rows = [[0, 95, hit, 5] for hit in (1, 0, 1, 1, 0, 1)] + [[0, 95, 0, 5]] * 14
    assert guardrails.errors(Windows.of(rows), 0.5, CONFIDENCE).answer == "inconclusive"
    rows[-1] = [0, 95, 1, 5]
    assert guardrails.errors(Windows.of(rows), 0.5, CONFIDENCE).answer == "fail"


def lognormal(n: int, scale: float = 1.0, seed: int = 0) -> np.ndarray:
    return np.asarray(scale * np.random.default_rng(seed).lognormal(2, 0.4, n))


@pytest.mark.parametrize(("scale", "answer"), [(1, "pass"), (2, "inconclusive"), (3, "fail"), (4, "fail")])
def test_p99_ratio_of_pairs(scale: float, answer: str) -> None:
    verdict = guardrails.p99_ratio(lognormal(2500), lognormal(2500, scale, 1), 2, CONFIDENCE)
    assert verdict.answer == answer
    assert "2,500 pairs, worth" in verdict.reason
    assert verdict.estimate == pytest.approx(scale, rel=0.15)


def test_p99_ratio_sees_rare_slow_answers_and_bursts_that_a_typical_block_hides() -> None:
    slow = lognormal(5000, 1, 1)
    for begin in range(200, 5000, 400):
        slow[begin : begin + 16] = 400
    verdict = guardrails.p99_ratio(lognormal(5000), slow, 2, CONFIDENCE)
    assert verdict.answer != "pass"
    assert "4.00 % of its answers" in verdict.reason or "3.84 % of its answers" in verdict.reason
    assert guardrails.typical_ratio(Peaks.of([[10, 50, 11, 50]] * 40), 2, CONFIDENCE).passed


def test_p99_limit_is_absolute() -> None:
    assert guardrails.p99_limit("latency", list(lognormal(2500)), 50, CONFIDENCE).answer == "pass"
    assert guardrails.p99_limit("latency", list(lognormal(2500)), 10, CONFIDENCE).answer == "fail"
    near = guardrails.p99_limit("latency", list(lognormal(2500)), float(np.quantile(lognormal(2500), 0.99)), CONFIDENCE)
    assert near.answer == "inconclusive"


@pytest.mark.parametrize(
    ("challenger", "champion", "answer"),
    [(100, 100, "pass"), (500, 100, "pass"), (600, 100, "fail"), (900, 500, "pass"), (1100, 500, "fail")],
)
def test_memory_is_compared_beyond_small_servers(challenger: float, champion: float, answer: str) -> None:
    assert guardrails.memory(challenger, champion, 4096, 2).answer == answer
    assert guardrails.memory(5000, 4000, 4096, 2).answer == "fail"
    assert guardrails.memory(600, 0, 4096, 2).answer == "pass"  # a server that does not tell is no reference


@pytest.mark.parametrize(("low", "high", "answer"), [(0, 2.9, "pass"), (1, 4, "inconclusive"), (3.1, 4, "fail")])
def test_a_fixed_bound_fails_only_where_it_is_certain(low: float, high: float, answer: str) -> None:
    bounds = Bounds((low + high) / 200, low / 100, high / 100, 500)
    assert guardrails.accuracy(bounds, 3, CONFIDENCE).answer == answer
    assert guardrails.disagreement(bounds, 3, CONFIDENCE).answer == answer


def test_looks_share_the_error_probability() -> None:
    spent = [1 - guardrails.looks_confidence(CONFIDENCE, look) for look in range(1, 200)]
    assert sum(spent) <= 0.05
    assert spent == sorted(spent, reverse=True)


def test_a_failure_that_something_else_explains_is_open() -> None:
    failed = Verdict(gate="errors", answer="fail", reason="8 of 100 failed")
    open_one = guardrails.undecided(failed, "everything waited")
    assert open_one.answer == "inconclusive"
    assert open_one.reason == "8 of 100 failed; not held against the challenger, since everything waited"
    passed = Verdict(gate="errors", answer="pass", reason="0 of 100 failed")
    assert guardrails.undecided(passed, "everything waited") == passed


TODAY = datetime.date(2026, 1, 31)
WORD = Waiver(gate="latency", by="Ann Smith", reason="measured on the target", until=TODAY)


def test_only_an_open_limit_is_waived_and_only_until_its_day() -> None:
    latency = Verdict(gate="latency", answer="inconclusive", reason="p99 51 ms")
    failed, errors = latency.model_copy(update={"answer": "fail"}), latency.model_copy(update={"gate": "errors"})
    [waived, *others] = waive((latency, failed, errors), [WORD], TODAY)
    assert waived.passed
    assert waived.reason == "waived by Ann Smith until 2026-01-31 (measured on the target); not judged: p99 51 ms"
    assert others == [failed, errors]
    assert waive((latency,), [WORD], TODAY + datetime.timedelta(days=1)) == (latency,)
    assert waive((latency,), [], TODAY) == (latency,)


def test_pressure_is_the_share_of_time_that_something_waited(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    file = tmp_path / "cpu"
    file.write_text("some avg10=99.03 avg60=95.19 avg300=57.74 total=1000000\nfull avg10=0.00 total=0\n")
    meter = Meter(file)
    clock[0] += 4
    file.write_text("some avg10=99.03 avg60=95.19 avg300=57.74 total=4000000\nfull avg10=0.00 total=0\n")
    assert meter.share() == pytest.approx(0.75)
    assert Meter(tmp_path / "missing").share() is None
