"""mIoU, compared with a separate count of pixels."""

import numpy as np
import pytest
from tests.measure.metrics.contract import Case, MetricContract

from slipstream.errors import InputError
from slipstream.measure.metrics.base import metric_for, value

CLASSES, SIZE = 4, 12


def made(n: int = 90, seed: int = 0) -> Case:
    """A square of one class on background; worse answers shift it, or take another class."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((n, SIZE, SIZE), np.int64)
    answers = labels.copy()
    for label, answer in zip(labels, answers, strict=True):
        kind, (y, x) = rng.integers(1, CLASSES), rng.integers(0, 6, 2)
        label[y : y + 5, x : x + 5] = kind
        answer[y + 1 : y + 6, x : x + 5] = kind if rng.random() < 0.9 else rng.integers(1, CLASSES)
    perfect, worse = (np.moveaxis(np.eye(CLASSES, dtype=np.float32)[a], 3, 1) for a in (labels, answers))
    return Case(metric_for("miou"), labels, perfect, worse)


class TestMeanIoU(MetricContract):
    @pytest.fixture
    def case(self) -> Case:
        return made()


def test_it_is_the_mean_of_each_classs_pixels_over_the_whole_set() -> None:
    case = made()
    answers, ious = case.worse.argmax(1), []
    for c in range(CLASSES):
        both, either = (answers == c) & (case.labels == c), (answers == c) | (case.labels == c)
        ious.append(both.sum() / either.sum())
    records = case.records(case.worse)
    assert value(case.metric, records) == pytest.approx(np.mean(ious))
    assert case.metric.by_class(records, case.labels) == pytest.approx(dict(enumerate(ious)))


def test_ignored_pixels_and_absent_classes_do_not_count() -> None:
    labels = np.array([[[0, 0], [-1, -1]]])
    outputs = np.zeros((1, 3, 2, 2), np.float32)
    outputs[0, 0, 0] = outputs[0, 2, 1] = 1  # class 2 only where nothing is judged
    metric = metric_for("miou")
    metric.check(outputs, labels, "x")
    records = metric.evaluate(outputs, labels)
    assert metric.by_class(records, labels) == {0: 1.0}
    assert value(metric, records) == 1


def test_a_few_pixels_make_no_difference_and_a_lost_item_does() -> None:
    case = made()
    near = case.perfect[0].copy()
    near[:, 0] = np.eye(CLASSES)[0][:, None]
    assert not case.metric.differ(case.perfect[0], near)
    nothing = np.zeros_like(near)
    nothing[0] = 1
    assert case.metric.differ(case.perfect[0], nothing) and case.metric.differ(nothing, case.perfect[0])


@pytest.mark.parametrize(
    ("outputs", "labels", "message"),
    [
        ((2, 3, 4, 4), np.zeros(2, int), r"labels must be \(N, height, width\) integers"),
        ((2, 3, 4, 4), np.zeros((2, 4, 4)), "integers for miou, not .* float64"),
        ((2, 3, 2, 4), np.zeros((2, 4, 4), int), r"shape \(2, 3, 2, 4\), not \(2, classes, 4, 4\)"),
        ((2, 3), np.zeros((2, 4, 4), int), r"shape \(2, 3\)"),
        ((2, 3, 4, 4), np.full((2, 4, 4), 255), "3 outputs, but labels run from 255 to 255; .* judged are -1"),
    ],
)
def test_what_is_no_map_is_an_error(outputs: tuple[int, ...], labels: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        metric_for("miou").check(np.zeros(outputs, np.float32), labels, "engine e")
