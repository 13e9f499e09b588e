"""The verdicts of the small-scale test, on evidence that is made up."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.steps.stages import make_spec

from slipstream.contract import Release, combine
from slipstream.data.splits import Split
from slipstream.traffic.answers import Answered, Pair
from slipstream.traffic.fake import FakeController
from slipstream.traffic.guard import Count
from slipstream.traffic.guarded import Stage
from slipstream.traffic.judging import Evidence
from slipstream.traffic.load import Record

SPLIT = Split(np.zeros((3000, 3), np.float32), np.zeros(3000, np.int64))
RIGHT, WRONG = np.array([1, 0, 0], np.float32), np.array([0, 1, 0], np.float32)
LIMITS = {"max_error_rate": 1, "max_p99_ms": 250, "max_p99_ratio": 2, "max_disagreement": 10, "max_accuracy_drop": 3}
CHAMPION, CHALLENGER = Release(model="net", name="v1"), Release(model="net", name="v2")


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


def evidence_of(stage: Stage, pairs: Sequence[Pair] = (), unanswered: int = 0, **more: Any) -> Evidence:
    evidence = Evidence(stage, **more)
    evidence.add_pairs(pairs, unanswered)
    return evidence


def canary(n: int, *, ms: float = 3.0) -> list[Record]:
    return [Record(f"r-{i}", 0, 0.0, 200, "v2", np.zeros((1, 3), np.float32), ms) for i in range(n)]


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeController]:
    control = FakeController(tmp_path)
    yield control
    control.close()


def stage_of(fake: FakeController, split: Split = SPLIT, errors: int = 0, **spec: Any) -> Stage:
    """A stage in which 2,600 requests went to each release, and so many of the challenger's failed."""
    spec = {"objective": {"confidence": 0.95}, "guardrails": LIMITS} | spec
    stage = Stage(make_spec(fake.folder, "net", **spec), fake, split, CHAMPION, CHALLENGER, "run")
    rest = errors
    for _ in range(26):
        stage.seen.tally.rows.append((Count(0, 100), Count(min(rest, 100), 100)))
        rest -= min(rest, 100)
    stage.seen.memory_mib = (100.0, 100.0)
    return stage


def judged(stage: Stage, evidence: dict[str, Any]) -> dict[str, str]:
    found = evidence_of(stage, **evidence)
    return {v.gate: v.answer for v in found.verdicts()}


GOOD: dict[str, Any] = {"pairs": pairs(2500), "canary": canary(100)}
LIMIT = {"objective": {"confidence": 0.95, "latency_p99_ms": 5}}


def test_good_evidence_passes_everything(fake: FakeController) -> None:
    gates = ("errors", "disagreement", "accuracy", "p99_ratio", "p99_cap", "memory", "latency")
    assert judged(stage_of(fake, **LIMIT), GOOD) == dict.fromkeys(gates, "pass")


def test_no_evidence_passes_nothing(fake: FakeController) -> None:
    stage = stage_of(fake, **LIMIT)
    stage.seen.tally.rows.clear()
    answers = judged(stage, {})
    assert answers.pop("memory") == "pass"
    assert set(answers.values()) == {"inconclusive"}


@pytest.mark.parametrize(
    ("change", "gate"),
    [
        ({"pairs": pairs(2500, wrong=350)}, "disagreement"),
        ({"pairs": pairs(2500, wrong=150)}, "accuracy"),
        ({"pairs": pairs(2500, challenger_ms=6.0)}, "p99_ratio"),
        ({"pairs": pairs(2500, champion_ms=300, challenger_ms=400)}, "p99_cap"),
        ({"pairs": pairs(2500, champion_ms=20, challenger_ms=15)}, "latency"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_evidence_fails_its_gate(fake: FakeController, change: dict[str, Any], gate: str) -> None:
    assert judged(stage_of(fake, **LIMIT), GOOD | change)[gate] == "fail"


@pytest.mark.parametrize(("errors", "answer"), [(0, "pass"), (4, "pass"), (26, "inconclusive"), (60, "fail")])
def test_errors_beyond_the_champions(fake: FakeController, errors: int, answer: str) -> None:
    assert judged(stage_of(fake, errors=errors), GOOD)["errors"] == answer


@pytest.mark.parametrize(("samples", "answer"), [(900, "pass"), (150, "inconclusive")])
def test_the_same_sample_asked_again_is_no_new_evidence(fake: FakeController, samples: int, answer: str) -> None:
    every = 15  # one in fifteen differs; asked 900 times the bound would be under the limit of 10 %
    asked = [replace(p, sample=i % samples) for i, p in enumerate(pairs(900, wrong=900))]
    right = [replace(p, challenger=p.champion) if p.sample % every else p for p in asked]
    assert judged(stage_of(fake), GOOD | {"pairs": right})["disagreement"] == answer


@pytest.mark.parametrize("change", [{"champion_ms": 20, "challenger_ms": 15}, {"challenger_ms": 6.0}])
def test_a_latency_that_fails_on_an_overloaded_machine_holds_the_release(
    fake: FakeController, change: dict[str, float]
) -> None:
    """Neither a failure nor set aside: what was asked for and cannot be judged is inconclusive."""
    stage = stage_of(fake, **LIMIT)
    assert "fail" in judged(stage, GOOD | {"pairs": pairs(2500, **change)}).values()
    stage.seen.crowds.append("processes of this machine waited for a processor 97 % of the time")
    verdicts = evidence_of(stage, pairs=pairs(2500, **change), canary=canary(100)).verdicts()
    assert combine(verdicts) == "inconclusive"
    assert any("97 % of the time" in v.reason for v in verdicts)


def test_later_looks_at_a_fixed_bound_ask_for_more(fake: FakeController) -> None:
    bounds = []
    for looks in (1, 2, 4):
        [verdict] = [
            v for v in evidence_of(stage_of(fake), pairs=pairs(2500), looks=looks).verdicts() if v.gate == "accuracy"
        ]
        assert verdict.high is not None
        bounds.append(verdict.high)
    assert bounds == sorted(bounds)


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
def test_boxes_are_judged_by_map_and_matched_boxes(fake: FakeController, missed: int, answer: str) -> None:
    split, found = boxes(500, missed=missed)
    stage = stage_of(fake, split, objective={"confidence": 0.95, "metric": "map"})
    evidence = evidence_of(stage, pairs=found, canary=canary(500))
    answers = {v.gate: v.answer for v in evidence.verdicts()}
    assert (answers["accuracy"], answers["disagreement"]) == (answer, answer)
    figures = evidence.figures()
    assert figures["different"] == missed
    assert figures["champion_quality"] == pytest.approx(100)
    few = evidence_of(stage, pairs=found[-20:], canary=canary(500))
    assert {v.gate: v.answer for v in few.verdicts()}["accuracy"] == "inconclusive"
