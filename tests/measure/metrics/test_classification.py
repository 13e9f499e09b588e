"""Scores of classes: top-k by a plain sort, macro F1 by scikit-learn."""

import numpy as np
import pytest
from tests.measure.metrics.contract import Case, MetricContract

from slipstream.errors import InputError
from slipstream.measure.metrics.base import metric_for, value, worst_class


def made(metric: str, n: int = 400, classes: int = 7) -> Case:
    """Every third answer is right by chance alone; the classes differ in how many samples they have."""
    generator = np.random.default_rng(5)
    labels = np.minimum(generator.geometric(0.3, n) - 1, classes - 1)
    perfect = np.eye(classes, dtype=np.float32)[labels]
    worse = perfect.copy()
    worse[::3] = generator.random((len(worse[::3]), classes))
    return Case(metric_for(metric), labels, perfect, worse)


class TestTop1(MetricContract):
    @pytest.fixture
    def case(self) -> Case:
        return made("top1")


class TestTop5(MetricContract):
    @pytest.fixture
    def case(self) -> Case:
        return made("top5", classes=30)


class TestF1(MetricContract):
    @pytest.fixture
    def case(self) -> Case:
        return made("f1")


def test_top1_and_top5_agree_with_a_plain_sort() -> None:
    generator = np.random.default_rng(0)
    outputs, labels = generator.normal(size=(1001, 12)), generator.integers(0, 12, 1001)
    ranked = np.argsort(-outputs, axis=1)
    top1, top5 = (metric_for(name).evaluate(outputs, labels) for name in ("top1", "top5"))
    assert np.array_equal(top1, (ranked[:, 0] == labels).astype(float))
    assert np.array_equal(top5, (ranked[:, :5] == labels[:, None]).any(axis=1).astype(float))


def test_a_constant_model_is_not_right_for_every_class() -> None:
    """With ties counted as hits, an engine that answers all zeros would score 100 %."""
    scores = metric_for("top1").evaluate(np.zeros((4, 3)), np.array([0, 1, 2, 0]))
    assert scores.tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize("classes", [2, 5, 40])
def test_f1_agrees_with_scikit_learn(classes: int) -> None:
    """40 classes for 60 samples: some are in labels only, some in answers only, some in neither."""
    f1_score = pytest.importorskip("sklearn.metrics", reason="needs scikit-learn").f1_score
    generator = np.random.default_rng(classes)
    outputs, labels = generator.normal(size=(60, classes)), generator.integers(0, classes, 60)
    metric = metric_for("f1")
    records = metric.evaluate(outputs, labels)
    answers = outputs.argmax(1)
    assert value(metric, records) == pytest.approx(f1_score(labels, answers, average="macro", zero_division=0))
    ours, theirs = metric.by_class(records, labels), f1_score(labels, answers, average=None, zero_division=0)
    assert list(ours) == sorted({*labels.tolist(), *answers.tolist()})
    assert list(ours.values()) == pytest.approx(list(theirs))


@pytest.mark.parametrize("metric", ["top1", "f1"])
@pytest.mark.parametrize(
    ("outputs", "labels", "message"),
    [
        ([[1.0, float("nan")], [1.0, 0.0]], [0, 0], "engine e: 1 of 2 outputs hold NaN"),
        ([[1.0, float("inf")]], [0], "NaN or infinity"),
        ([[[1.0, 2.0]]], [0], r"shape \(1, 1, 2\), not \(1, classes\)"),
        ([[1.0, 2.0]], [2], "2 outputs, but labels run from 2 to 2"),
        ([[1.0, 2.0]], [[0]], r"labels must be \(N,\) integers for \w+, not \(N, 1\)"),
        ([[1.0, 2.0]], [0.5], r"labels must be \(N,\) integers for \w+, not \(N,\) float64"),
    ],
)
def test_outputs_that_are_no_scores_are_errors(metric: str, outputs: object, labels: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        metric_for(metric).check(np.array(outputs), np.array(labels), "engine e")


def test_worst_class_is_the_one_that_lost_most() -> None:
    labels, metric = np.array([0, 0, 1, 1, 2, 2]), metric_for("top1")
    baseline, engine = np.array([1.0, 1, 1, 1, 0, 0]), np.array([1.0, 0, 0, 0, 1, 1])
    assert worst_class(metric, baseline, engine, labels, ("shirt", "coat", "bag")) == ("coat", 100.0)
    assert worst_class(metric, baseline, engine, labels) == ("1", 100.0)
