"""Names, batches, and the errors that name the model."""

from typing import Any

import numpy as np
import pytest

from slipstream.data.splits import Split
from slipstream.errors import EngineError, ModelError, SpecError
from slipstream.measure.metrics.base import batches, identity, metric_for, record
from slipstream.plugins import METRICS, short_name


class Table:
    """A model whose inputs are the outputs."""

    def run(self, batch: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return batch


def test_every_name_of_the_table_is_a_metric() -> None:
    assert {name: metric_for(name).name for name in METRICS} == {name: name for name in METRICS}
    assert all(identity(name) is None for name in METRICS)
    assert (short_name("map"), short_name("mine.scores:within")) == ("map", "within")


def test_a_name_that_is_no_function_is_refused() -> None:
    with pytest.raises(SpecError, match="cannot import nowhere_at_all"):
        metric_for("nowhere_at_all:score")


def test_progress_is_told_for_each_batch() -> None:
    split = Split(np.eye(4, dtype=np.float32)[np.arange(1001) % 4], np.arange(1001) % 4)
    calls: list[int] = []
    found = record(Table(), split, metric_for("top1"), what="x", progress=lambda: calls.append(1))
    assert found.mean() == 1
    assert len(calls) == batches(1001) == 5


def test_the_error_class_is_the_callers() -> None:
    split = Split(np.array([[np.nan, 1]], np.float32), np.array([0]))
    with pytest.raises(ModelError, match="the baseline: 1 of 1 outputs hold NaN"):
        record(Table(), split, metric_for("top1"), what="the baseline", error=ModelError)


def test_a_model_that_drops_samples_is_refused() -> None:
    class Short:
        def run(self, batch: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            return batch[:1]

    split = Split(np.eye(3, dtype=np.float32), np.array([0, 1, 2]))
    with pytest.raises(EngineError, match=r"not \(3, classes\)"):
        record(Short(), split, metric_for("top1"), what="x")
