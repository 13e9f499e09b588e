"""The metric seam: what a module under metrics/ implements, and the common parts of all metrics.

A metric turns the answers to labeled samples into records, one for each sample. From them it computes its value for any
resample. Two models can therefore be compared in pairs whether the metric is a mean over samples (top1) or is computed
from all of them at once (mAP), and a model answers every sample only once.
"""

import importlib
from collections.abc import Callable
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from slipstream import digests
from slipstream.contract.arrays import Array
from slipstream.data.splits import Split
from slipstream.data.user_code import user_code_digest
from slipstream.errors import EngineError, InputError
from slipstream.measure import stats
from slipstream.measure.stats import Bounds, Floats
from slipstream.plugins import METRICS
from slipstream.spec import Call

BATCH = 250

Records: TypeAlias = Array
"""(N,) data that a metric needs of each sample's answer: a number, or several in a structured dtype; never an
object."""


class Metric(Protocol):
    """Quality of answers, from 0, the worst value, to 1, the best."""

    name: str
    """Its name in MLflow and in the report."""
    mean: bool
    """Whether the records are scores in [0, 1] whose mean is the value. If so, the exact paired methods apply."""
    distributions: tuple[str, ...]
    """PyPI distributions whose versions are part of the identity of what is measured."""

    def classes(self, shape: tuple[int, ...]) -> int | None:
        """Return the number of classes in outputs of this shape, batch first; None if outputs have none."""
        ...

    def check_labels(self, labels: Array) -> None:
        """Raise DataError unless these can be labels of samples: (N, …), of the metric's shape and kind."""
        ...

    def check(self, outputs: Array, labels: Array, what: str, error: type[InputError] = EngineError) -> None:
        """Raise `error`, which names `what`, unless these can be answers to samples with these labels.

        Raise DataError for labels that no model can have answers to, SpecError for outputs that the metric cannot
        judge. outputs: (N, …), labels: (N, …). NaN and infinity are rejected: such a model is broken, not inaccurate.
        """
        ...

    def evaluate(self, outputs: Array, labels: Array) -> Records:
        """Return (N,) records of checked answers. One with NaN, as traffic may bring, is wrong whatever its label."""
        ...

    def values(self, records: Records, counts: Floats) -> Floats:
        """Return (R,) values of R resamples: counts (R, N) is how often each contains each sample. NaN without any
        class."""
        ...

    def by_class(self, records: Records, labels: Array) -> dict[int, float]:
        """Return the value for each class; classes without a sample are left out."""
        ...

    def differ(self, one: Array, other: Array) -> bool:
        """Return whether two answers (…) to the same sample would lead to different actions. NaN differs from
        everything."""
        ...


class Mean:
    """Common parts of metrics that are a mean of (N,) float64 scores."""

    mean = True
    distributions: tuple[str, ...] = ()

    def values(self, records: Records, counts: Floats) -> Floats:
        """See the protocol."""
        total: Floats = counts @ records / counts.sum(axis=1)
        return total

    def by_class(self, records: Records, labels: Array) -> dict[int, float]:
        """See the protocol; empty if a label is not a class."""
        if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
            return {}
        return {int(c): float(records[labels == c].mean()) for c in np.unique(labels)}


class Runs(Protocol):
    """A loaded engine, or a candidate in its own framework."""

    def run(self, batch: Array) -> Array:
        """Return (N, …) outputs for inputs (N, …)."""
        ...


def metric_for(name: str) -> Metric:
    """Return the metric that a spec names. Raise SpecError if it is the user's and cannot be imported."""
    if name in METRICS:
        info = METRICS[name]
        metric: Metric = getattr(importlib.import_module(info.module), info.attribute)
        return metric
    from slipstream.measure.metrics.user import UserMetric

    return UserMetric(name)


def identity(name: str) -> str | None:
    """Return the digest of a metric's code if it is the user's or another package's; None for this package, whose code
    counts anyway."""
    if name not in METRICS:
        return user_code_digest(Call(function=name))
    return ", ".join(digests.plugin(METRICS[name].module).values()) or None


def batches(samples: int) -> int:
    """Return how many times `record` reports progress."""
    return -(-samples // BATCH)


def record(
    model: Runs,
    split: Split,
    metric: Metric,
    *,
    what: str,
    progress: Callable[[], None] = lambda: None,
    error: type[InputError] = EngineError,
) -> Records:
    """Return (N,) records of a model's answers to a split.

    `what` names the model in errors. Raise `error` if the outputs are not valid answers: wrong shape or NaN. A
    quantized ONNX model can be correct while the engine built from it is not (NVIDIA/Model-Optimizer#126).
    """
    records = []
    for start in range(0, len(split), BATCH):
        inputs, labels = split.inputs[start : start + BATCH], split.labels[start : start + BATCH]
        outputs = np.asarray(model.run(inputs))
        metric.check(outputs, labels, what, error)
        records.append(metric.evaluate(outputs, labels))
        progress()
    return np.concatenate(records)


def value(metric: Metric, records: Records) -> float:
    """Return the metric of all samples; NaN if there are none."""
    if not len(records):
        return float("nan")
    return float(metric.values(records, np.ones((1, len(records))))[0])


def drop(metric: Metric, baseline: Records, engine: Records, confidence: float, rng: np.random.Generator) -> Bounds:
    """Return the metric's drop from baseline to engine on the same samples, as a fraction, with its bounds.

    baseline, engine: (N,) records in the same order. A mean of scores: `stats.paired_drop`; anything else:
    `stats.paired_bootstrap`, in which a resample takes the same samples for both.
    """
    if metric.mean:
        return stats.paired_drop(baseline, engine, confidence)
    if len(baseline) != len(engine):
        return stats.unknown(len(baseline))

    def difference(counts: Floats) -> Floats:
        return metric.values(baseline, counts) - metric.values(engine, counts)

    return stats.paired_bootstrap(difference, len(baseline), confidence, rng)


def worst_class(
    metric: Metric, baseline: Records, engine: Records, labels: Array, classes: tuple[str, ...] = ()
) -> tuple[str, float]:
    """Return name and drop (percentage points) of the class with the largest drop; without classes, of all samples."""
    before, after = (metric.by_class(records, labels) for records in (baseline, engine))
    drops = {c: before[c] - after[c] for c in before if c in after}
    if not drops:
        return "all samples", 100.0 * (value(metric, baseline) - value(metric, engine))
    worst = max(drops, key=lambda c: drops[c])
    return (classes[worst] if worst < len(classes) else str(worst)), 100.0 * drops[worst]


def counted_from_one(least: float, most: float, classes: int) -> str:
    """Return a hint for labels beyond the last class that run from 1 to the number of classes; otherwise empty."""
    return "; they seem to count from 1: subtract 1" if least >= 1 and most == classes else ""


def finite(outputs: Array) -> npt.NDArray[np.bool_]:
    """Return (N,) which of the answers (N, …) hold neither NaN nor infinity."""
    axes = tuple(range(1, outputs.ndim))
    return np.asarray(np.isfinite(outputs).all(axis=axes))


def require_finite(outputs: Array, what: str, error: type[InputError]) -> None:
    """Raise `error` if an answer holds NaN or infinity."""
    bad = int((~finite(outputs)).sum())
    if bad:
        raise error(
            f"{what}: {bad} of {len(outputs)} outputs hold NaN or infinity; the model is broken, not inaccurate"
        )
