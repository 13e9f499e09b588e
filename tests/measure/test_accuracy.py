"""Scores per sample, and clear errors for outputs that are no class scores."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from slipstream.data import Split
from slipstream.errors import EngineError, ModelError
from slipstream.measure import accuracy


@dataclass
class Table:
    """A model whose inputs are the outputs."""

    def run(self, batch: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return batch


def split(outputs: object, labels: list[int]) -> Split:
    return Split(np.asarray(outputs, dtype=np.float32), np.array(labels, dtype=np.int64))


def test_top1_and_top5_agree_with_a_plain_sort() -> None:
    generator = np.random.default_rng(0)
    data = split(generator.normal(size=(1001, 12)), generator.integers(0, 12, 1001).tolist())
    ranked = np.argsort(-data.inputs, axis=1)
    calls: list[int] = []
    top1 = accuracy.scores(Table(), data, "top1", what="x", progress=lambda: calls.append(1))
    top5 = accuracy.scores(Table(), data, "top5", what="x")
    assert np.array_equal(top1, (ranked[:, 0] == data.labels).astype(float))
    assert np.array_equal(top5, (ranked[:, :5] == data.labels[:, None]).any(axis=1).astype(float))
    assert len(calls) == accuracy.batches(1001) == 5


def test_a_constant_model_is_not_right_for_every_class() -> None:
    """With ties counted as hits, an engine that answers all zeros would score 100 %."""
    scores = accuracy.scores(Table(), split(np.zeros((4, 3)), [0, 1, 2, 0]), "top1", what="x")
    assert scores.tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize(
    ("outputs", "labels", "message"),
    [
        ([[1.0, float("nan")], [1.0, 0.0]], [0, 0], "engine e: 1 of 2 outputs hold NaN"),
        ([[1.0, float("inf")]], [0], "NaN or infinity"),
        ([[[1.0, 2.0]]], [0], r"shape \(1, 1, 2\), not \(1, classes\)"),
        ([[1.0, 2.0]], [2], "2 outputs, but labels run from 2 to 2"),
    ],
)
def test_outputs_that_are_no_scores_are_errors(outputs: object, labels: list[int], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        accuracy.scores(Table(), split(outputs, labels), "top1", what="engine e")


def test_the_error_class_is_the_callers() -> None:
    with pytest.raises(ModelError, match="the baseline"):
        accuracy.scores(Table(), split([[float("nan")]], [0]), "top1", what="the baseline", error=ModelError)


def test_a_model_that_drops_samples_is_refused() -> None:
    class Short:
        def run(self, batch: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            return batch[:1]

    with pytest.raises(EngineError, match="not \\(3, classes\\)"):
        accuracy.scores(Short(), split(np.eye(3), [0, 1, 2]), "top1", what="x")


def test_worst_class_is_the_one_that_lost_most() -> None:
    labels = np.array([0, 0, 1, 1, 2, 2])
    baseline, engine = np.array([1.0, 1, 1, 1, 0, 0]), np.array([1.0, 0, 0, 0, 1, 1])
    assert accuracy.worst_class(baseline, engine, labels, ("shirt", "coat", "bag")) == ("coat", 100.0)
    assert accuracy.worst_class(baseline, engine, labels) == ("1", 100.0)
    assert accuracy.worst_class(engine, engine, labels)[1] == 0.0
