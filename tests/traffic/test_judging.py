"""The verdicts of the small-scale test, on evidence that is made up."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.steps.stages import make_spec

from slipstream.contract import Verdict
from slipstream.data import Split
from slipstream.measure.gates import settle
from slipstream.traffic.answers import Answered, Pair
from slipstream.traffic.base import Release
from slipstream.traffic.guarded import Count
from slipstream.traffic.judging import Evidence
from slipstream.traffic.load import Record

SPLIT = Split(np.zeros((1000, 3), np.float32), np.zeros(1000, np.int64))
RIGHT, WRONG = np.array([1, 0, 0], np.float32), np.array([0, 1, 0], np.float32)
LIMITS = {"max_error_rate": 1, "max_p99_ms": 250, "max_p99_ratio": 2, "max_disagreement": 10}
CHALLENGER = Release(model="net", name="v2")


def pairs(n: int, *, wrong: int = 0, champion_ms: float = 2.0, challenger_ms: float = 1.0) -> list[Pair]:
    jitter = np.random.default_rng(0).lognormal(0, 0.1, (n, 2))
    return [
        Pair(
            i,
            Answered(champion_ms * jitter[i, 0], RIGHT),
            Answered(challenger_ms * jitter[i, 1], WRONG if i < wrong else RIGHT),
        )
        for i in range(n)
    ]


def canary(n: int, *, ms: float = 3.0) -> list[Record]:
    return [Record(f"r{i}", 0, 0.0, 200, "v2", np.zeros((1, 3), np.float32), ms) for i in range(n)]


def judged(tmp_path: Path, evidence: dict[str, Any], **spec: Any) -> dict[str, str]:
    spec = {"objective": {"confidence": 0.95}, "guardrails": LIMITS} | spec
    found = Evidence(make_spec(tmp_path, "net", **spec), SPLIT, CHALLENGER, 250.0, **evidence)
    return {v.gate: v.answer for v in found.verdicts()}


GOOD: dict[str, Any] = {"pairs": pairs(500), "canary": canary(500), "canary_count": Count(0, 500)}
LIMIT = {"objective": {"confidence": 0.95, "latency_p99_ms": 5}}


def test_good_evidence_passes_everything(tmp_path: Path) -> None:
    gates = ("errors", "disagreement", "accuracy", "p99_ratio", "p99_cap", "latency")
    assert judged(tmp_path, GOOD, **LIMIT) == dict.fromkeys(gates, "pass")


def test_no_evidence_passes_nothing(tmp_path: Path) -> None:
    assert set(judged(tmp_path, {}, **LIMIT).values()) == {"inconclusive"}


@pytest.mark.parametrize(
    ("change", "gate"),
    [
        ({"canary_count": Count(40, 500)}, "errors"),
        ({"unanswered": 60}, "errors"),
        ({"pairs": pairs(500, wrong=90)}, "disagreement"),
        ({"pairs": pairs(500, wrong=40)}, "accuracy"),
        ({"pairs": pairs(500, challenger_ms=5.0)}, "p99_ratio"),
        ({"canary": canary(500, ms=400)}, "p99_cap"),
        ({"pairs": pairs(500, champion_ms=20, challenger_ms=15)}, "latency"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_evidence_fails_its_gate(tmp_path: Path, change: dict[str, Any], gate: str) -> None:
    assert judged(tmp_path, GOOD | change, **LIMIT)[gate] == "fail"


@pytest.mark.parametrize(("samples", "answer"), [(900, "pass"), (150, "inconclusive")])
def test_the_same_sample_asked_again_is_no_new_evidence(tmp_path: Path, samples: int, answer: str) -> None:
    every = 15  # one in fifteen differs; asked 900 times the bound would be under the limit of 10 %
    asked = [replace(p, sample=i % samples) for i, p in enumerate(pairs(900, wrong=900))]
    right = [replace(p, challenger=p.champion) if p.sample % every else p for p in asked]
    assert judged(tmp_path, GOOD | {"pairs": right}, guardrails=LIMITS)["disagreement"] == answer


@pytest.mark.parametrize(("noisy", "answer"), [(False, "fail"), (True, "inconclusive")])
def test_a_latency_that_fails_on_a_noisy_machine_is_measured_on(tmp_path: Path, noisy: bool, answer: str) -> None:
    evidence = {"pairs": pairs(500, champion_ms=20, challenger_ms=15), "canary": canary(500), "noisy": noisy}
    assert judged(tmp_path, evidence, **LIMIT)["latency"] == answer


def verdict(gate: str, answer: Any) -> Verdict:
    return Verdict(gate=gate, answer=answer, reason="because")


def test_only_an_open_latency_under_noise_is_set_aside_and_only_beside_a_passed_ratio() -> None:
    ratio, errors = verdict("p99_ratio", "pass"), verdict("errors", "inconclusive")
    left, notes = settle((ratio, verdict("latency", "inconclusive"), errors), noisy=True, ratio="p99_ratio")
    assert left == (ratio, errors)
    assert "latency was not judged" in notes[0]
    for given, noisy in (
        ((ratio, verdict("latency", "inconclusive")), False),
        ((ratio, verdict("latency", "fail")), True),
        ((verdict("p99_ratio", "inconclusive"), verdict("latency", "inconclusive")), True),
    ):
        assert settle(given, noisy=noisy, ratio="p99_ratio") == (given, [])


def boxes(n: int, *, missed: int = 0) -> tuple[Split, list[Pair]]:
    """A detector's answers to n samples with an object each; the challenger misses some."""
    rng = np.random.default_rng(0)
    labels, found = np.full((n, 2, 5), -1, np.float32), []
    for i in range(n):
        low = rng.uniform(0, 30, 2)
        labels[i, 0] = (i % 3, *low, *(low + 12))
        champion = np.zeros((8, 4 + 3), np.float32)
        champion[0, :4], champion[0, 4 + i % 3] = labels[i, 0, 1:], 0.8
        challenger = champion + np.array([0.1] * 4 + [0] * 3, np.float32)
        challenger[:, 4:] *= 0.01 if i < missed else 0.95
        found.append(Pair(i, Answered(2.0 + 0.1 * rng.random(), champion), Answered(1.0, challenger)))
    return Split(np.zeros((n, 1), np.float32), labels), found


@pytest.mark.parametrize(("missed", "answer"), [(0, "pass"), (120, "fail")])
def test_boxes_are_judged_by_map_and_matched_boxes(tmp_path: Path, missed: int, answer: str) -> None:
    split, found = boxes(500, missed=missed)
    spec = make_spec(tmp_path, "net", objective={"confidence": 0.95, "metric": "map"})
    evidence = Evidence(spec, split, CHALLENGER, 250.0, pairs=found, canary=canary(500))
    answers = {v.gate: v.answer for v in evidence.verdicts()}
    assert (answers["accuracy"], answers["disagreement"]) == (answer, answer)
    figures = evidence.figures()
    assert figures["different"] == missed
    assert figures["champion_quality"] == pytest.approx(100)
    few = Evidence(spec, split, CHALLENGER, 250.0, pairs=found[-20:], canary=canary(500))
    assert {v.gate: v.answer for v in few.verdicts()}["accuracy"] == "inconclusive"
