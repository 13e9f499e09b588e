"""Object detection: COCO's mean average precision.

Outputs are one tensor (N, anchors, 4 + classes) float: for each anchor the corners x1, y1, x2, y2 of its box in pixels,
then a score in [0, 1] for each class. The network computes these itself; `decode` only drops low scores and suppresses
all but the best of overlapping boxes. Labels are (N, M, 5) float: class, x1, y1, x2, y2 of each object; rows beyond a
sample's objects are -1.
"""

import contextlib
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from slipstream.contract.arrays import Array
from slipstream.errors import DataError, EngineError, InputError
from slipstream.measure.metrics.base import Records, counted_from_one, finite, require_finite
from slipstream.measure.metrics.classification import mean_over_classes
from slipstream.measure.stats import Floats

if TYPE_CHECKING:  # imported only where boxes are matched
    from pycocotools.coco import COCO

BOX = 4
"""Numbers of a box, before the scores of its classes."""
LEAST_SCORE = 0.05
"""Boxes with a lower score are dropped, as detectors do before COCO's evaluation (Lin et al. 2017, section 4)."""
CANDIDATES, DETECTIONS = 300, 100
"""Maximum boxes of a sample before and after suppression; COCO judges at most 100."""
OVERLAP = 0.6
"""IoU above which the lower-scoring of two boxes of one class is suppressed."""
THRESHOLDS = np.linspace(0.5, 0.95, 10)
"""IoU thresholds above which a box is a hit; AP is the mean over these (cocodataset.org, detection evaluation)."""
RECALLS = np.linspace(0, 1, 101)
"""Recalls at which the precision is read, as in COCOeval, including its rounding."""
SURE, SAME_IOU = 0.5, 0.5
"""Score above which a box counts as an answer, and the IoU at which two boxes are the same."""
BLOCK = 4_000_000
"""Maximum numbers in one intermediate array of the resampled AP: 32 MB."""


@dataclass(frozen=True)
class Detections:
    """Boxes of one sample, by descending score."""

    boxes: npt.NDArray[np.float64]
    """(D, 4) corners x1, y1, x2, y2."""
    scores: npt.NDArray[np.float64]
    classes: npt.NDArray[np.intp]

    def __len__(self) -> int:
        return len(self.scores)


def decode(answer: Array, least_score: float = LEAST_SCORE) -> Detections:
    """Return the detections in one answer (anchors, 4 + classes): greedy suppression within each class.

    An answer that holds NaN has none.
    """
    scores = answer[:, BOX:].astype(np.float64)
    anchors, classes = np.nonzero(scores >= least_score if np.isfinite(answer).all() else np.zeros(scores.shape, bool))
    order = np.argsort(-scores[anchors, classes], kind="stable")[:CANDIDATES]
    anchors, classes = anchors[order], classes[order]
    boxes = answer[anchors, :BOX].astype(np.float64)
    rivals = (iou(boxes, boxes) > OVERLAP) & (classes[:, None] == classes)
    survivors = np.ones(len(order), bool)
    for best in range(len(order)):
        if survivors[best]:
            survivors[best + 1 :] &= ~rivals[best, best + 1 :]
    chosen = np.flatnonzero(survivors)[:DETECTIONS]
    return Detections(boxes[chosen], scores[anchors[chosen], classes[chosen]], classes[chosen])


def iou(one: Floats, other: Floats) -> Floats:
    """Return intersections over unions (A, B) of boxes (A, 4) and (B, 4); a box without area overlaps nothing."""
    low = np.maximum(one[:, None, :2], other[None, :, :2])
    high = np.minimum(one[:, None, 2:], other[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(axis=2)
    areas = [np.clip(b[:, 2:] - b[:, :2], 0, None).prod(axis=1) for b in (one, other)]
    union = areas[0][:, None] + areas[1][None, :] - shared
    ratios: Floats = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
    return ratios


class MeanAP:
    """COCO's AP: the mean over classes, and over IoU thresholds from 0.5 to 0.95, of the interpolated precision.

    Boxes are matched to objects within each sample, once, by pycocotools. Precision and recall are those of all samples
    together, so AP is not a mean over samples: a resample sums the same matches with other weights, without a second
    matching, and the bootstrap bounds the drop.
    """

    name, mean = "map", False
    distributions = ("pycocotools",)

    def classes(self, shape: tuple[int, ...]) -> int | None:
        """One score for each class, after the box."""
        return shape[2] - BOX if len(shape) == 3 and shape[2] > BOX else None

    def check_labels(self, labels: Array) -> None:
        """See the protocol."""
        if labels.ndim != 3 or labels.shape[2] != 5:
            rest = "".join(f", {size}" for size in labels.shape[1:]) or ","
            raise DataError(f"labels must be (N, objects, 5) for map, class and box of each object, not (N{rest})")
        kinds = labels[..., 0]
        objects = labels[kinds >= 0]
        if (kinds != np.floor(kinds)).any():
            raise DataError("labels must have whole numbers as classes for map, counted from 0; padding is -1")
        if (objects[:, 3:] <= objects[:, 1:3]).any():
            raise DataError("a labelled box has no area; boxes are x1, y1, x2, y2, and padding is -1")

    def check(self, outputs: Array, labels: Array, what: str, error: type[InputError] = EngineError) -> None:
        """See the protocol."""
        self.check_labels(labels)
        classes = self.classes(outputs.shape)
        if classes is None or len(outputs) != len(labels):
            raise error(f"{what}: outputs have shape {outputs.shape}, not ({len(labels)}, anchors, 4 + classes)")
        kinds = labels[..., 0]
        if (kinds >= classes).any():
            hint = counted_from_one(kinds[kinds >= 0].min(), kinds.max(), classes)
            raise error(f"{what}: {classes} class scores, but the labels' classes go up to {kinds.max():g}{hint}")
        require_finite(outputs, what, error)
        scores = outputs[..., BOX:]
        if scores.size and (scores.min() < -0.01 or scores.max() > 1.01):  # INT8 may miss 0 and 1 by a step
            raise error(
                f"{what}: scores run from {scores.min():g} to {scores.max():g}, not from 0 to 1; outputs are x1, y1, "
                "x2, y2 and then a probability for each class"
            )

    def evaluate(self, outputs: Array, labels: Array) -> Records:
        """Return (N,) class, score and hits of each detection, and the number of objects of each class."""
        classes = outputs.shape[2] - BOX
        whole = finite(outputs)
        predictions = [decode(answer) if fine else _nothing() for answer, fine in zip(outputs, whole, strict=True)]
        records = np.zeros(len(labels), _record(classes))
        records["class"] = -1
        hits = _matched(predictions, labels, classes)
        for record, detections, hit in zip(records, predictions, hits, strict=True):
            record["class"][: len(detections)] = detections.classes
            record["score"][: len(detections)] = detections.scores
            record["hits"][: len(detections)] = hit
        kinds = labels[..., 0]
        records["objects"] = (kinds[:, :, None] == np.arange(classes)).sum(axis=1).reshape(len(labels), classes)
        return records

    def values(self, records: Records, counts: Floats) -> Floats:
        """See the protocol."""
        return mean_over_classes(_precisions(records, counts))

    def by_class(self, records: Records, labels: Array) -> dict[int, float]:
        """See the protocol."""
        precisions = _precisions(records, np.ones((1, len(records))))[0]
        return {c: float(ap) for c, ap in enumerate(precisions) if not np.isnan(ap)}

    def differ(self, one: Array, other: Array) -> bool:
        """Return whether a confident box of either answer (score 0.5) has no counterpart in the other.

        A counterpart has the same class, an IoU of at least 0.5, and at least half that score. Two answers therefore do
        not differ merely because a score is slightly above the limit in one and slightly below it in the other.
        """
        if one.shape != other.shape or not (np.isfinite(one).all() and np.isfinite(other).all()):
            return True
        a, b = (decode(answer, SURE / 2) for answer in (one, other))
        same = (iou(a.boxes, b.boxes) >= SAME_IOU) & (a.classes[:, None] == b.classes)
        missed = (a.scores >= SURE) & ~same.any(axis=1)
        return bool(missed.any() or ((b.scores >= SURE) & ~same.any(axis=0)).any())


def _nothing() -> Detections:
    return Detections(np.empty((0, BOX)), np.empty(0), np.empty(0, np.intp))


def _record(classes: int) -> np.dtype[np.void]:
    return np.dtype(
        [
            ("class", np.int16, DETECTIONS),
            ("score", np.float64, DETECTIONS),
            ("hits", np.bool_, (DETECTIONS, len(THRESHOLDS))),
            ("objects", np.int32, (classes,)),
        ]
    )


def _matched(predictions: list[Detections], labels: Array, classes: int) -> list[npt.NDArray[np.bool_]]:
    """Return for each sample (D, thresholds): whether pycocotools matches the detection to an object."""
    from pycocotools.cocoeval import COCOeval

    hits = [np.zeros((len(d), len(THRESHOLDS)), bool) for d in predictions]
    place = [(i, k) for i, d in enumerate(predictions) for k in range(len(d))]
    if not place:
        return hits
    with contextlib.redirect_stdout(io.StringIO()):  # it prints the duration of each part
        evaluation = COCOeval(_truth(labels, classes), _answers(predictions, classes), "bbox")
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.params.maxDets, evaluation.params.iouThrs = [DETECTIONS], THRESHOLDS
        evaluation.evaluate()
    for judged in evaluation.evalImgs:
        for column, number in enumerate(judged["dtIds"] if judged else ()):
            i, k = place[number - 1]
            hits[i][k] = judged["dtMatches"][:, column] > 0
    return hits


def _truth(labels: Array, classes: int) -> "COCO":
    objects = [(i, int(row[0]), row[1:]) for i, sample in enumerate(labels) for row in sample if row[0] >= 0]
    return _coco(len(labels), classes, [_annotation(i, c, box) for i, c, box in objects])


def _answers(predictions: list[Detections], classes: int) -> "COCO":
    boxes = [
        _annotation(i, int(c), box) | {"score": float(score)}
        for i, d in enumerate(predictions)
        for c, box, score in zip(d.classes, d.boxes, d.scores, strict=True)
    ]
    return _coco(len(predictions), classes, boxes)


def _annotation(sample: int, label: int, box: Array) -> dict[str, object]:
    """Return a box in COCO's form: corner, width and height."""
    x1, y1, x2, y2 = (float(v) for v in box)
    width, height = max(x2 - x1, 0.0), max(y2 - y1, 0.0)
    return {
        "image_id": sample,
        "category_id": label,
        "bbox": [x1, y1, width, height],
        "area": width * height,
        "iscrowd": 0,
    }


def _coco(samples: int, classes: int, boxes: list[dict[str, object]]) -> "COCO":
    """Return a COCO data set. Numbers start at 1, since a match with number 0 counts as none."""
    from pycocotools.coco import COCO

    coco = COCO()
    coco.dataset = {
        "images": [{"id": i} for i in range(samples)],
        "categories": [{"id": c} for c in range(classes)],
        "annotations": [box | {"id": number} for number, box in enumerate(boxes, start=1)],
    }
    coco.createIndex()
    return coco


def _precisions(records: Records, counts: Floats) -> Floats:
    """Return (R, classes) AP of each class; NaN if it has no object."""
    classes = records["objects"].shape[1]
    precisions = np.empty((len(counts), classes))
    for c in range(classes):
        objects = counts @ records["objects"][:, c].astype(np.float64)
        sample, slot = np.nonzero(records["class"] == c)
        order = np.argsort(-records["score"][sample, slot], kind="stable")
        sample, slot = sample[order], slot[order]
        step = max(1, BLOCK // max(len(sample), 1))
        for start in range(0, len(counts), step):
            part = slice(start, start + step)
            precisions[part, c] = _precision(counts[part][:, sample], records["hits"][sample, slot], objects[part])
    return precisions


def _precision(weights: Floats, hits: npt.NDArray[np.bool_], objects: Floats) -> Floats:
    """Return (R,) AP of one class in R resamples.

    weights: (R, D) how often each detection occurs, by descending score; hits: (D, thresholds); objects: (R,). The
    precision at a recall is the greatest at that recall or a higher one, read at 0, 0.01, … 1 (pycocotools,
    COCOeval.accumulate). It changes only at hits, so only hits are examined; n copies of one detection in a row are one
    step of weight n, since the precision at the end of a row of hits is its greatest.
    """
    detections = np.cumsum(weights, axis=1)
    total = np.zeros(len(weights))
    for threshold in range(hits.shape[1]):
        at = np.flatnonzero(hits[:, threshold])
        if not len(at):
            continue
        right = np.cumsum(weights[:, at], axis=1)
        precision = np.maximum.accumulate((right / np.maximum(detections[:, at], 1))[:, ::-1], axis=1)[:, ::-1]
        recall = right / np.maximum(objects, 1)[:, None]
        # Number of recalls above 0 that are reached with each hit; 0 is reached at once.
        reached = np.diff(np.searchsorted(RECALLS, recall, side="right") - 1, axis=1, prepend=0)
        total += precision[:, 0] + (reached * precision).sum(axis=1)
    return np.where(objects > 0, total / (len(RECALLS) * hits.shape[1]), np.nan)


MAP = MeanAP()
