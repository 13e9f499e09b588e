"""Head to head: ratios within one run decide, and the pick ends on any machine."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.steps.stages import PASS, evidence

from slipstream.contract.evidence import Noise, Race, Row
from slipstream.measure import race as races
from slipstream.measure.latency import Comparison, Plan, Round
from slipstream.steps.choice import Choice

CONFIDENCE = 0.95
QUIET = Noise(clean_rounds=8, rounds=8, others_cores=0.0)


def race(*, crowded: bool = False, rounds: int = 8, jitter: float = 0.0, **times_ms: float) -> Race:
    """Every round has a pace of its own, between half and twice as fast, which all subjects share."""
    rng = np.random.default_rng(0)
    pace = np.exp(rng.uniform(-0.7, 0.7, rounds))
    taken = {
        n: tuple(float(v) for v in ms * pace * np.exp(rng.normal(0, jitter, rounds))) for n, ms in times_ms.items()
    }
    best = {name: min(values) / 2 for name, values in taken.items()}
    return Race(rounds_ms=taken, best_ms=best, noise=QUIET, crowded=crowded, cores=2)


def choice(prefer: str, given: Race | None, **sizes: int) -> Choice:
    rows = {
        name: Row(cell=name, evidence=evidence(size=size), verdicts=(PASS,), status="passed")
        for name, size in sizes.items()
    }
    return Choice(prefer, CONFIDENCE, rows, given)


def test_the_faster_engine_of_one_run_is_picked_whatever_its_own_run_said() -> None:
    """0.202 ms was once released over 0.127 ms: eager had been slower in the other engine's run (15.1× and 13.7×)."""
    given = race(one=0.127, other=0.202, eager=2.0, jitter=0.05)
    picked = choice("latency", given, one=900, other=500)
    assert picked.best(picked.entrants) == "one"
    ratio = races.time_ratio(given, "other", "one", CONFIDENCE)
    assert 1.3 < ratio.low < ratio.estimate == pytest.approx(0.202 / 0.127, rel=0.1)
    assert "one is the best of 2 passing engines by latency: 0.1" in picked.reason("one")


def test_of_engines_that_may_be_equally_fast_the_smaller_is_picked_then_the_first_by_name() -> None:
    given = race(b=0.1, a=0.1, c=0.3)
    swaying = tuple(ms * (1.05 if i % 2 else 0.97) for i, ms in enumerate(given.rounds_ms["a"]))
    given = given.model_copy(update={"rounds_ms": {**given.rounds_ms, "a": swaying}})
    assert choice("latency", given, b=900, a=800, c=100).best(["b", "a", "c"]) == "a"
    assert choice("latency", given, b=800, a=800, c=100).best(["b", "a", "c"]) == "a"
    assert choice("latency", given, b=700, a=800, c=100).best(["c", "b", "a"]) == "b"


def test_where_others_took_the_cores_everything_may_be_equal_and_the_pick_still_ends() -> None:
    given = race(one=0.1, other=0.18, jitter=0.3, crowded=True)
    bounds = races.time_ratio(given, "other", "one", CONFIDENCE)
    assert bounds.low < 1 < bounds.high
    assert choice("latency", given, one=900, other=500).best(["one", "other"]) == "other"


def test_engines_that_took_no_part_come_after_those_that_did() -> None:
    given = race(one=0.5)
    assert choice("latency", given, one=900, elsewhere=1).best(["one", "elsewhere"]) == "one"
    assert choice("latency", None, one=900, elsewhere=1).best(["one", "elsewhere"]) == "elsewhere"
    assert choice("latency", None).best([]) is None


@pytest.mark.parametrize(("prefer", "winner"), [("size", "small"), ("accuracy", "small"), ("throughput", "fast")])
def test_speed_breaks_ties_where_the_objective_prefers_something_else(prefer: str, winner: str) -> None:
    given = race(fast=0.1, small=0.2)
    rows = {
        "fast": Row(cell="fast", evidence=evidence(size=900, quality=90), verdicts=(PASS,), status="passed"),
        "small": Row(cell="small", evidence=evidence(size=500, quality=91), verdicts=(PASS,), status="passed"),
    }
    assert Choice(prefer, CONFIDENCE, rows, given).best(["fast", "small"]) == winner
    equal = {n: r.model_copy(update={"evidence": evidence()}) for n, r in rows.items()}
    assert Choice(prefer, CONFIDENCE, equal, given).best(["small", "fast"]) == "fast"


@given(st.permutations(["a", "b", "c", "d"]), st.permutations(range(8)))
def test_the_order_of_engines_and_rounds_does_not_matter(names: list[str], order: list[int]) -> None:
    given = race(a=0.1, b=0.11, c=0.12, d=0.3, jitter=0.05)
    moved = given.model_copy(update={"rounds_ms": {n: tuple(given.rounds_ms[n][i] for i in order) for n in names}})
    for one, other in ((races.time_ms(given), races.time_ms(moved)),):
        assert other == pytest.approx(one)
    sizes = dict.fromkeys("abcd", 5)
    assert choice("latency", moved, **sizes).best(names) == choice("latency", given, **sizes).best(["a", "b", "c", "d"])


def test_the_time_that_is_shown_never_contradicts_the_order_of_the_ratios() -> None:
    given = race(a=0.1, b=0.13, c=0.5, jitter=0.02)
    shown = races.time_ms(given)
    assert sorted(shown, key=shown.__getitem__) == ["a", "b", "c"]
    assert shown["c"] / shown["a"] == pytest.approx(races.time_ratio(given, "c", "a", CONFIDENCE).estimate, rel=0.05)


def test_a_race_is_made_of_the_rounds_that_count() -> None:
    latencies = {"one": np.array([1.0, 2.0, 9.0]), "other": np.array([4.0, 4.0, 4.0])}
    rounds = tuple(Round(latencies, others) for others in (0.0, 0.0, 0.9))
    plan = Plan(rounds=3, clean_rounds=2, max_rounds=3)
    median, mean = (races.of(Comparison(rounds, plan), threads=1, mean=m) for m in (False, True))
    assert median.rounds_ms["one"] == (2.0, 2.0) and mean.rounds_ms["one"] == (4.0, 4.0)
    assert not median.noise.noisy
    noisy = races.of(Comparison(rounds, Plan(rounds=3, clean_rounds=3, max_rounds=3)), threads=1, mean=False)
    assert noisy.noise.noisy and len(noisy.rounds_ms["one"]) == 3 and noisy.rounds_ms["one"][0] < 2
