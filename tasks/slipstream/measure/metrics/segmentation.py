"""Semantic segmentation: outputs (N, classes, H, W) float logits; labels (N, H, W) integers, -1 where not judged."""

import numpy as np
import numpy.typing as npt

from slipstream.contract.arrays import Array
from slipstream.errors import DataError, EngineError, InputError
from slipstream.measure.metrics.base import Records, finite, require_finite
from slipstream.measure.metrics.classification import mean_over_classes
from slipstream.measure.stats import Floats

IGNORED = -1
SAME_IOU = 0.75
"""Two answers are the same if their label maps have at least this mean IoU."""


class MeanIoU:
    """Mean over classes of the intersection over union of all pixels of the class in all samples.

    The measure of PASCAL VOC (Everingham et al. 2015, section 4.3): intersections and unions are summed over the whole
    set before they are divided, so it is not a mean over samples; its drop is bounded by the bootstrap. A class that
    occurs in neither labels nor answers does not count.
    """

    name, mean = "miou", False
    distributions: tuple[str, ...] = ()

    def classes(self, shape: tuple[int, ...]) -> int | None:
        """One map for each class."""
        return shape[1] if len(shape) == 4 else None

    def check_labels(self, labels: Array) -> None:
        """See the protocol."""
        if labels.ndim != 3 or not np.issubdtype(labels.dtype, np.integer):
            rest = "".join(f", {size}" for size in labels.shape[1:])
            raise DataError(f"labels must be (N, height, width) integers for miou, not (N{rest}) {labels.dtype}")
        if labels.size and labels.min() < IGNORED:
            raise DataError(
                f"labels must count from 0 for miou, but the least is {labels.min()}; pixels that are not to be judged "
                f"are {IGNORED}"
            )

    def check(self, outputs: Array, labels: Array, what: str, error: type[InputError] = EngineError) -> None:
        """See the protocol."""
        self.check_labels(labels)
        n, height, width = labels.shape
        if outputs.ndim != 4 or (len(outputs), *outputs.shape[2:]) != labels.shape:
            raise error(f"{what}: outputs have shape {outputs.shape}, not ({n}, classes, {height}, {width})")
        if labels.size and labels.max() >= outputs.shape[1]:
            raise error(
                f"{what}: {outputs.shape[1]} outputs, but labels run from {labels.min()} to {labels.max()}; pixels "
                f"that are not to be judged are {IGNORED}"
            )
        require_finite(outputs, what, error)

    def evaluate(self, outputs: Array, labels: Array) -> Records:
        """Return (N,) pixels of each class in the intersection and in the union of label and answer."""
        classes = outputs.shape[1]
        answers = np.where(finite(outputs)[:, None, None], outputs.argmax(axis=1), classes)
        table = confusion(labels, answers, classes)
        records = np.empty(len(labels), np.dtype([("intersection", np.int32, classes), ("union", np.int32, classes)]))
        records["intersection"] = np.diagonal(table, axis1=1, axis2=2)
        records["union"] = table.sum(axis=2) + table[:, :, :classes].sum(axis=1) - records["intersection"]
        return records

    def values(self, records: Records, counts: Floats) -> Floats:
        """See the protocol."""
        return mean_over_classes(_ious(records, counts))

    def by_class(self, records: Records, labels: Array) -> dict[int, float]:
        """See the protocol."""
        ious = _ious(records, np.ones((1, len(records))))[0]
        return {c: float(iou) for c, iou in enumerate(ious) if not np.isnan(iou)}

    def differ(self, one: Array, other: Array) -> bool:
        """Return whether the mean IoU of the two label maps is below 0.75."""
        if one.shape != other.shape or not (np.isfinite(one).all() and np.isfinite(other).all()):
            return True
        records = self.evaluate(one[None], other.argmax(axis=0)[None])
        return bool(self.values(records, np.ones((1, 1)))[0] < SAME_IOU)


def confusion(labels: Array, answers: Array, classes: int) -> npt.NDArray[np.int64]:
    """Return (N, classes, classes + 1) pixels by label and answer; the last answer is for a model without one."""
    judged = labels != IGNORED
    image = np.broadcast_to(np.arange(len(labels))[:, None, None], labels.shape)
    cell = (image * classes + labels) * (classes + 1) + answers
    size = len(labels) * classes * (classes + 1)
    return np.bincount(cell[judged], minlength=size).reshape(-1, classes, classes + 1)


def _ious(records: Records, counts: Floats) -> Floats:
    """Return (R, classes) IoU of each class; NaN if it occurs in neither labels nor answers."""
    intersection, union = (counts @ records[field].astype(np.float64) for field in ("intersection", "union"))
    ious: Floats = np.divide(intersection, union, out=np.full(union.shape, np.nan), where=union > 0)
    return ious


MIOU = MeanIoU()
