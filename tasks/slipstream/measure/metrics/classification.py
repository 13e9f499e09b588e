"""Classification: outputs (N, classes) float, highest is best; labels (N,) integers from 0."""

import numpy as np

from slipstream.contract.arrays import Array
from slipstream.errors import DataError, EngineError, InputError, SpecError
from slipstream.measure.metrics.base import Mean, Records, counted_from_one, finite, require_finite
from slipstream.measure.stats import Floats

PREDICTION = np.dtype([("label", np.int32), ("answer", np.int32)])
NO_CLASS = -1
"""Answer recorded for a model that answered NaN."""


class Classes:
    """Common parts of metrics of class scores."""

    name: str
    top = 1
    """Outputs that may be the label; with no more classes than that, every answer is right."""

    def classes(self, shape: tuple[int, ...]) -> int | None:
        """One output for each class."""
        return shape[1] if len(shape) == 2 else None

    def check_labels(self, labels: Array) -> None:
        """See the protocol."""
        if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
            rest = "".join(f", {size}" for size in labels.shape[1:]) or ","
            raise DataError(f"labels must be (N,) integers for {self.name}, not (N{rest}) {labels.dtype}")
        if labels.size and labels.min() < 0:
            raise DataError(f"labels must count from 0 for {self.name}, but the least is {labels.min()}")

    def check(self, outputs: Array, labels: Array, what: str, error: type[InputError] = EngineError) -> None:
        """See the protocol."""
        self.check_labels(labels)
        if outputs.ndim != 2 or len(outputs) != len(labels):
            raise error(f"{what}: outputs have shape {outputs.shape}, not ({len(labels)}, classes)")
        classes = outputs.shape[1]
        if classes <= self.top:
            advice = (
                "give one score for each class, or write a metric as module:function"
                if classes == 1
                else "choose top1 or f1"
            )
            raise SpecError(
                f"objective.metric: {what} has {classes} outputs, so that {self.name} is always right; {advice}"
            )
        if labels.size and labels.max() >= classes:
            least, most = labels.min(), labels.max()
            hint = counted_from_one(least, most, classes)
            raise error(f"{what}: {classes} outputs, but labels run from {least} to {most}{hint}")
        require_finite(outputs, what, error)

    def differ(self, one: Array, other: Array) -> bool:
        """Return whether the largest outputs are at different positions."""
        if one.shape != other.shape or not (np.isfinite(one).all() and np.isfinite(other).all()):
            return True
        return int(one.argmax()) != int(other.argmax())


class TopK(Classes, Mean):
    """Share of samples whose label is among the `top` highest outputs."""

    def __init__(self, name: str, top: int) -> None:
        self.name, self.top = name, top

    def evaluate(self, outputs: Array, labels: Array) -> Records:
        """Return (N,) 1 if fewer than `top` classes rank above the label; among equal outputs the lower index ranks
        first.

        With ties counted as hits, an engine that answers all zeros would score 100 %.
        """
        own = outputs[np.arange(len(labels)), labels][:, None]
        classes = np.arange(outputs.shape[1])[None, :]
        above = (outputs > own) | ((outputs == own) & (classes < labels[:, None]))
        hits: Records = ((above.sum(axis=1) < self.top) & finite(outputs)).astype(np.float64)
        return hits


class MacroF1(Classes):
    """Mean over classes of F1 = 2·TP / (2·TP + FP + FN): every class has equal weight, however rare it is.

    As in scikit-learn's `f1_score(average="macro")`: over the classes that occur in labels or answers. It is not a mean
    over samples, so its drop is bounded by the bootstrap.
    """

    name, mean = "f1", False
    distributions: tuple[str, ...] = ()

    def evaluate(self, outputs: Array, labels: Array) -> Records:
        """Return (N,) label and answer."""
        records = np.empty(len(labels), PREDICTION)
        records["label"] = labels
        records["answer"] = np.where(finite(outputs), outputs.argmax(axis=1), NO_CLASS)
        return records

    def values(self, records: Records, counts: Floats) -> Floats:
        """See the protocol."""
        scores = self._scores(records, counts)
        return mean_over_classes(scores)

    def by_class(self, records: Records, labels: Array) -> dict[int, float]:
        """See the protocol."""
        scores = self._scores(records, np.ones((1, len(records))))[0]
        return {c: float(score) for c, score in enumerate(scores) if not np.isnan(score)}

    def _scores(self, records: Records, counts: Floats) -> Floats:
        """Return (R, classes) F1 of each class; NaN if it is neither label nor answer."""
        classes = np.arange(max(records["label"].max(), records["answer"].max()) + 1)
        label, answer = (records[field][:, None] == classes for field in ("label", "answer"))
        both, either = counts @ (label & answer), counts @ label.astype(np.float64) + counts @ answer
        scores: Floats = np.divide(2 * both, either, out=np.full(both.shape, np.nan), where=either > 0)
        return scores


def mean_over_classes(scores: Floats) -> Floats:
    """Return (R,) means of (R, classes) without NaN; NaN if all are NaN."""
    valid = ~np.isnan(scores)
    total, n = np.where(valid, scores, 0.0).sum(axis=1), valid.sum(axis=1)
    means: Floats = np.divide(total, n, out=np.full(len(scores), np.nan), where=n > 0)
    return means


TOP1, TOP5, F1 = TopK("top1", 1), TopK("top5", 5), MacroF1()
