"""mAP: the same as pycocotools on whole sets and on resamples, without asking it again."""

import contextlib
import io

import numpy as np
import pytest

pytest.importorskip("pycocotools", reason="needs pycocotools")

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tests.measure.metrics.contract import Case, MetricContract
from tests.measure.metrics.scenes import CLASSES, made, perfect

from slipstream.errors import InputError
from slipstream.measure.metrics.base import metric_for, value
from slipstream.measure.metrics.detection import decode, iou


class TestMeanAP(MetricContract):
    @pytest.fixture
    def case(self) -> Case:
        outputs, labels = made(150)
        return Case(metric_for("map"), labels, perfect(labels), outputs)


def coco_ap(outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """AP of each class by pycocotools from its own JSON forms: annotations, and results through `loadRes`."""
    truth, results = [], []
    for i, (sample, answer) in enumerate(zip(labels, outputs, strict=True)):
        for kind, x1, y1, x2, y2 in sample[sample[:, 0] >= 0].tolist():
            box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": 0}
            truth.append({"id": len(truth) + 1, "image_id": i, "category_id": int(kind)} | box)
        found = decode(answer)
        for (x1, y1, x2, y2), score, kind in zip(found.boxes.tolist(), found.scores, found.classes, strict=True):
            box = [x1, y1, max(x2 - x1, 0), max(y2 - y1, 0)]
            results.append({"image_id": i, "category_id": int(kind), "bbox": box, "score": float(score)})
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        categories = [{"id": c} for c in range(CLASSES)]
        coco.dataset = {"images": [{"id": i} for i in range(len(labels))], "categories": categories} | {
            "annotations": truth
        }
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # (thresholds, recalls, classes), all areas, 100 boxes
    return np.where((precision > -1).all(axis=(0, 1)), precision.mean(axis=(0, 1)), np.nan)


@pytest.mark.parametrize(("seed", "noise"), [(1, 0.5), (2, 2.0), (3, 4.0)])
def test_ap_is_that_of_pycocotools(seed: int, noise: float) -> None:
    outputs, labels = made(120, seed, noise)
    metric, theirs = metric_for("map"), coco_ap(outputs, labels)
    records = metric.evaluate(outputs, labels)
    assert value(metric, records) == pytest.approx(np.nanmean(theirs), abs=1e-9)
    assert metric.by_class(records, labels) == pytest.approx({c: ap for c, ap in enumerate(theirs) if ap == ap})
    assert 0.02 < value(metric, records) < 0.95


def test_ap_of_resamples_is_that_of_pycocotools_on_the_resampled_images() -> None:
    """Also where a resample has no object of a class at all, and where it has an image five times."""
    outputs, labels = made(40, seed=4)
    metric = metric_for("map")
    records = metric.evaluate(outputs, labels)
    rows = np.random.default_rng(0).integers(0, 40, (6, 40))
    rows[5] = rows[5] % 8
    found = metric.values(records, np.stack([np.bincount(r, minlength=40) for r in rows]).astype(float))
    for ap, row in zip(found, rows, strict=True):
        assert ap == pytest.approx(np.nanmean(coco_ap(outputs[row], labels[row])), abs=1e-9)


def test_a_large_resample_is_computed_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs, labels = made(50, seed=6)
    metric = metric_for("map")
    records = metric.evaluate(outputs, labels)
    counts = np.random.default_rng(0).integers(0, 3, (9, 50)).astype(float)
    whole = metric.values(records, counts)
    monkeypatch.setattr("slipstream.measure.metrics.detection.BLOCK", 100)
    assert metric.values(records, counts) == pytest.approx(whole, abs=1e-12)


def test_of_boxes_of_one_class_that_overlap_the_best_is_kept() -> None:
    answer = np.zeros((5, 4 + 2), np.float32)
    answer[:, :4] = [[0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 5], [0, 0, 10, 10], [30, 30, 40, 40]]
    answer[:, 4] = [0.7, 0.9, 0.6, 0.01, 0.04]
    answer[3, 5] = 0.5  # the other class, at the same place
    found = decode(answer)
    assert found.scores.tolist() == pytest.approx([0.9, 0.6, 0.5])
    assert found.classes.tolist() == [0, 0, 1]
    assert iou(found.boxes[:1], found.boxes).round(3).tolist() == [[1.0, 0.556, 0.9]]


def test_boxes_without_area_overlap_nothing() -> None:
    boxes = np.array([[0, 0, 0, 5], [5, 5, 2, 2], [0, 0, 4, 4]], float)
    assert iou(boxes, boxes).tolist() == [[0, 0, 0], [0, 0, 0], [0, 0, 1]]


def answer(*boxes: tuple[int, float, float]) -> np.ndarray:
    """One answer with a 10×10 box for each (class, x1, score)."""
    outputs = np.zeros((3, 4 + 2), np.float32)
    for row, (kind, x, score) in zip(outputs, boxes, strict=False):
        row[:4], row[4 + kind] = (x, 0, x + 10, 10), score
    return outputs


@pytest.mark.parametrize(
    ("one", "other", "differ"),
    [
        (answer((0, 0, 0.9)), answer((0, 1, 0.8)), False),
        (answer((0, 0, 0.51)), answer((0, 0, 0.49)), False),
        (answer((0, 0, 0.9)), answer((1, 0, 0.9)), True),
        (answer((0, 0, 0.9)), answer((0, 6, 0.9)), True),
        (answer((0, 0, 0.9)), answer(), True),
        (answer((0, 0, 0.9)), answer((0, 0, 0.9), (1, 20, 0.6)), True),
        (answer((0, 0, 0.3)), answer(), False),
        (answer(), answer(), False),
    ],
)
def test_answers_differ_by_boxes_that_one_of_them_is_sure_of(one: np.ndarray, other: np.ndarray, differ: bool) -> None:
    assert metric_for("map").differ(one, other) == metric_for("map").differ(other, one) == differ


GOOD = np.array([[[0, 0, 0, 5, 5], [-1, -1, -1, -1, -1]]], np.float32)
OF_CLASS_2 = np.array([[[2, 0, 0, 0, 0], [0, 0, 0, 0, 0]]], np.float32)


@pytest.mark.parametrize(
    ("outputs", "labels", "message"),
    [
        (np.zeros((1, 3, 6)), np.zeros(1), r"labels must be \(N, objects, 5\)"),
        (np.zeros((1, 6)), GOOD, r"outputs have shape \(1, 6\), not \(1, anchors, 4 \+ classes\)"),
        (np.zeros((1, 3, 4)), GOOD, r"outputs have shape \(1, 3, 4\)"),
        (np.zeros((1, 3, 6)), GOOD + OF_CLASS_2, "2 class scores, but the labels' classes go up to 2"),
        (np.zeros((1, 3, 6)), GOOD * [[[1, 1, 1, 0, 1]]], "a labelled box has no area"),
        (np.full((1, 3, 6), 30.0), GOOD, "scores run from 30 to 30, not from 0 to 1"),
        (np.full((1, 3, 6), -2.0), GOOD, "scores run from -2 to -2"),
    ],
)
def test_what_is_no_detection_is_an_error(outputs: np.ndarray, labels: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        metric_for("map").check(outputs, labels, "engine e")
