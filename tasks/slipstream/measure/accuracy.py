"""Quality of a model that has been built or loaded, scored per sample, so that two models compare in pairs."""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from slipstream.data import Split
from slipstream.errors import EngineError, InputError

TOP = {"top1": 1, "top5": 5}
"""Metric → how many of the highest outputs may hold the label."""
BATCH = 250


class Runs(Protocol):
    """A loaded engine, or a candidate in its own framework."""

    def run(self, batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """(N, …) inputs to (N, classes) outputs."""
        ...


def batches(samples: int) -> int:
    """How many times `scores` reports progress."""
    return -(-samples // BATCH)


def scores(
    model: Runs,
    split: Split,
    metric: str,
    *,
    what: str,
    progress: Callable[[], None] = lambda: None,
    error: type[InputError] = EngineError,
) -> npt.NDArray[np.float64]:
    """(N,) scores of a model on a split: 1 where the label is among the highest outputs, else 0.

    `what` names the model in errors. Raises `error` when the outputs are no class scores: wrong shape or NaN.
    A quantized ONNX model can be right while the engine built from it is not (NVIDIA/Model-Optimizer#126).
    """
    found = []
    for start in range(0, len(split), BATCH):
        inputs, labels = split.inputs[start : start + BATCH], split.labels[start : start + BATCH]
        outputs = np.asarray(model.run(inputs))
        _check(outputs, labels, what, error)
        found.append(_hits(outputs, labels, TOP[metric]))
        progress()
    return np.concatenate(found).astype(np.float64)


def _hits(outputs: npt.NDArray[Any], labels: npt.NDArray[np.int64], top: int) -> npt.NDArray[np.bool_]:
    """(N,) whether fewer than `top` classes rank above the label; among equal outputs the lower index ranks first."""
    own = outputs[np.arange(len(labels)), labels][:, None]
    classes = np.arange(outputs.shape[1])[None, :]
    above = (outputs > own) | ((outputs == own) & (classes < labels[:, None]))
    hits: npt.NDArray[np.bool_] = above.sum(axis=1) < top
    return hits


def _check(outputs: npt.NDArray[Any], labels: npt.NDArray[np.int64], what: str, error: type[InputError]) -> None:
    if outputs.ndim != 2 or len(outputs) != len(labels):
        raise error(f"{what}: outputs have shape {outputs.shape}, not ({len(labels)}, classes)")
    if labels.size and (labels.min() < 0 or labels.max() >= outputs.shape[1]):
        raise error(f"{what}: {outputs.shape[1]} outputs, but labels run from {labels.min()} to {labels.max()}")
    bad = int((~np.isfinite(outputs)).any(axis=1).sum())
    if bad:
        raise error(
            f"{what}: {bad} of {len(outputs)} outputs hold NaN or infinity; the model is broken, not inaccurate"
        )


def worst_class(
    baseline: npt.NDArray[np.float64],
    engine: npt.NDArray[np.float64],
    labels: npt.NDArray[np.int64],
    classes: tuple[str, ...] = (),
) -> tuple[str, float]:
    """Name and drop (percentage points) of the class that lost most; all arrays are (N,)."""
    present = np.unique(labels)
    drops = [100.0 * float((baseline[labels == c] - engine[labels == c]).mean()) for c in present]
    worst = int(np.argmax(drops))
    label = int(present[worst])
    return (classes[label] if label < len(classes) else str(label)), drops[worst]
